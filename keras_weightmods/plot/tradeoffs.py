"""Pictures of what a change costs, and what it brings."""

import math
import os
from typing import Any

from keras_weightmods.patches.patch import Patch
from keras_weightmods.patches.report import PatchContentsReport
from keras_weightmods.plot import style
from keras_weightmods.utils import checks
from keras_weightmods.utils.report import size_text


def layer_sizes(change: Any, *, ax: Any = None) -> Any:
    """Draw how large a patch is, weight by weight.

    Args:
        change: A `Patch`, its report, or the path of its file.
        ax: The matplotlib axes to draw in. Defaults to new ones.

    Returns:
        The axes: weights in the order of the model, the first on top. Of a
        delta, the bytes of the values that differ, without their places.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If the change is none of these, or the file is damaged.

    Example:

    ```python
    import keras
    import keras_weightmods as kwm

    start, clean, robust = (
        keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
        for _ in range(3)
    )
    signature = kwm.WeightSignature.extract(start, clean, robust, 1)
    ax = kwm.plot.layer_sizes(signature)
    assert ax.get_xlabel() == "KiB"
    ```
    """
    report = change
    if isinstance(change, (str, os.PathLike)):
        report = Patch.load(change).report()
    elif isinstance(change, Patch):
        report = change.report()
    if not isinstance(report, PatchContentsReport):
        expected = "a `Patch`, its report, or the path of its file"
        raise checks.error("change", expected, change)
    sizes = [row.nbytes for row in report.rows]
    ax = style.new_rows(ax, [row.path for row in report.rows])
    ax.barh(range(len(sizes)), [size / 1024 for size in sizes], 0.6)
    title = f"{size_text(sum(sizes))} in {len(sizes)} weights"
    ax.set(xlabel="KiB", title=title)
    return ax


def accuracy(
    scales: Any,
    accuracies: dict[str, Any],
    baselines: dict[str, float] | None = None,
    *,
    ax: Any = None,
) -> Any:
    """Draw accuracy against the scale of a patch.

    Args:
        scales: Sequence of numbers.
        accuracies: Dict from what was measured, as `"clean images"`, to the
            accuracies at these scales, in [0, 1].
        baselines: Dict from what was measured to an accuracy without any
            patch, drawn across. Defaults to none.
        ax: The matplotlib axes to draw in. Defaults to new ones.

    Returns:
        The axes.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there are not as many accuracies as scales.

    Example:

    ```python
    import keras_weightmods as kwm

    ax = kwm.plot.accuracy(
        [0, 0.5, 1],
        {"clean images": [0.95, 0.94, 0.89], "blurred": [0.4, 0.7, 0.8]},
        {"robust model, blurred": 0.85},
    )
    assert ax.get_ylim() == (0, 1)
    ```
    """
    if any(len(values) != len(scales) for values in accuracies.values()):
        expected = f"{len(scales)} numbers for each, one a scale"
        raise checks.error("accuracies", expected, accuracies)
    ax = style.new_axes(ax)
    for label, values in accuracies.items():
        ax.plot(scales, values, "o-", ms=4, label=label)
    for label, value in (baselines or {}).items():
        ax.axhline(value, ls="--", color=style.GRAY, label=label)
    ax.set(ylim=(0, 1), xlabel="scale of the patch", ylabel="accuracy")
    style.legend(ax)
    return ax


def speed(rows: Any, *, ax: Any = None) -> Any:
    """Draw tokens a second against perplexity.

    Args:
        rows: Iterable of dicts, one for each model, with

            - `name`: string.
            - `perplexity`: positive number, or what it is over that of the
              dense model, for all rows alike.
            - `tokens_per_second`: positive number.
            - `nbytes`: int, drawn as the area of the dot; optional.
            - `kind`: string, drawn as its color; optional.
        ax: The matplotlib axes to draw in. Defaults to new ones.

    Returns:
        The axes, both of logarithms. The best is on the upper left.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If there is no row, or one lacks a positive number.

    Example:

    ```python
    import keras_weightmods as kwm

    ax = kwm.plot.speed(
        [
            {"name": "dense", "perplexity": 18.0, "tokens_per_second": 31},
            {"name": "int8", "perplexity": 18.2, "tokens_per_second": 163},
        ]
    )
    assert ax.get_xlabel() == "perplexity"
    ```
    """
    rows = list(rows)
    numbers = ("perplexity", "tokens_per_second")
    if not rows or not all(
        checks.is_number(row.get(name)) and row[name] > 0
        for row in rows
        for name in numbers
    ):
        expected = f"dicts with `name` and, positive, {numbers}"
        raise checks.error("rows", expected, rows)
    ax = style.new_axes(ax, 8, 5)
    # In square points.
    areas = [float(row.get("nbytes", 4e7)) / 1e6 for row in rows]
    for kind in dict.fromkeys(row.get("kind") for row in rows):
        same = [i for i, row in enumerate(rows) if row.get("kind") == kind]
        places = ([rows[i][name] for i in same] for name in numbers)
        sizes = [areas[i] for i in same]
        ax.scatter(*places, s=sizes, alpha=0.5, label=kind)
    order = sorted(range(len(rows)), key=lambda i: rows[i]["perplexity"])
    for rank, i in enumerate(order):
        is_left = 2 * rank < len(rows)
        # Beside the dot, whose diameter is the root of its area; neighbors
        # above and below.
        away = 3 + math.sqrt(areas[i]) / 2
        ax.annotate(
            rows[i]["name"],
            [rows[i][name] for name in numbers],
            xytext=(away if is_left else -away, -9 if rank % 2 else 3),
            textcoords="offset points",
            ha="left" if is_left else "right",
            fontsize=7,
        )
    ax.set(xscale="log", yscale="log")
    style.plain_numbers(ax.xaxis)
    style.plain_numbers(ax.yaxis)
    ax.set(xlabel="perplexity", ylabel="tokens a second")
    if any("kind" in row for row in rows):
        for dot in style.legend(ax).legend_handles:
            dot.set_sizes([40])
    return ax
