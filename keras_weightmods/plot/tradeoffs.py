"""A plot of the costs and gains of a change."""

import math
from typing import Any

from keras_weightmods.plot import style
from keras_weightmods.utils import checks


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
    ends = [rows[i]["perplexity"] for i in (order[0], order[-1])]
    for rank, i in enumerate(order):
        is_left = rows[i]["perplexity"] <= math.sqrt(math.prod(ends))
        # Beside the dot, whose diameter is the root of its area. Neighbors
        # alternate above and below.
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
