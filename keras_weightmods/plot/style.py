"""The one style of all pictures."""

from typing import Any

from keras_weightmods.utils import checks

# Colors that color-blind readers can tell apart (Okabe and Ito), in order.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GRAY = "#777777"


def new_axes(
    ax: Any, width: float = 6.0, height: float = 3.6, grid: str = "both"
) -> Any:
    """Return `ax` in the style, or new axes where it is `None`.

    Args:
        ax: Axes of matplotlib, or `None`.
        width, height: Floats, inches of new axes.
        grid: `"x"`, `"y"` or `"both"`: the lines to read values by.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    if ax is None:
        try:
            from matplotlib import pyplot
        except ImportError as error:
            raise checks.not_installed(
                "`kwm.plot`", "matplotlib", error
            ) from error
        size = width, height
        ax = pyplot.subplots(figsize=size, layout="constrained")[1]
    ax.set_prop_cycle(color=COLORS)
    ax.spines[["top", "right"]].set_visible(False)
    ax.set_axisbelow(True)
    ax.grid(visible=True, axis=grid, color="#dddddd", linewidth=0.6)
    return ax


def new_rows(ax: Any, names: list[str]) -> Any:
    """Return axes with named rows for horizontal bars, the first on top."""
    ax = new_axes(ax, height=1.2 + 0.22 * len(names), grid="x")
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.set_ylim(len(names) - 0.4, -0.6)
    return ax


def plain_numbers(axis: Any) -> None:
    """Label a logarithmic axis with 1, 2, 5, 10, not with powers."""
    from matplotlib import ticker

    axis.set_major_locator(ticker.LogLocator(subs=(1, 1.2, 1.5, 2, 3, 5, 7)))
    axis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axis.set_minor_formatter(ticker.NullFormatter())


def legend(ax: Any, *args: Any, above: bool = False) -> Any:
    """Draw a legend, within the axes or above them."""
    place: dict[str, Any] = {"loc": "best"}
    if above:
        place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 2}
    return ax.legend(*args, fontsize=8, frameon=False, **place)
