"""Pictures of weights."""

from typing import Any

import numpy as np
from keras import ops

from keras_weightmods.core.targets import resolve_targets
from keras_weightmods.ops import nm
from keras_weightmods.plot import style
from keras_weightmods.utils import checks
from keras_weightmods.utils.matrix import Axes, to_matrix


def kernel(
    kernel: Any,
    pattern: nm.Pattern | None = "2:4",
    axis: Axes = 0,
    *,
    rows: int = 32,
    columns: int = 48,
    ax: Any = None,
) -> Any:
    """Draw the pattern of a kernel: its values, zeros white.

    Args:
        kernel: Tensor, array or variable, of any shape. It is seen as a matrix
            of its contraction axes by all others. The first corner of this
            matrix is drawn.
        pattern: String `"n:m"` or pair of ints: a line is drawn between
            groups of m. `None` for none. Defaults to `"2:4"`.
        axis: Int or tuple of ints, the contraction axes. Defaults to `0`.
        rows: Int, the most inputs to draw. Defaults to `32`.
        columns: Int, the most outputs to draw. Defaults to `48`.
        ax: The matplotlib axes to draw in. Defaults to new ones.

    Returns:
        The axes.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If the pattern is malformed, or `rows` or `columns` is no
            positive int.

    Example:

    ```python
    import numpy as np
    import keras_weightmods as kwm

    weights = np.random.normal(size=(16, 24))
    ax = kwm.plot.kernel(kwm.ops.nm_project(weights, "2:4"))
    assert ax.get_xlabel() == "output"
    ```
    """
    checks.check_int("rows", rows, 1)
    checks.check_int("columns", columns, 1)
    m = None if pattern is None else nm.parse_pattern(pattern)[1]
    matrix = to_matrix(ops.convert_to_tensor(kernel), axis)
    inputs, outputs = matrix.shape
    values = _numpy(matrix)[:rows, :columns]
    ax = style.new_axes(ax)
    ax.grid(visible=False)
    most = np.abs(values).max() or 1.0
    shown = np.ma.masked_equal(values, 0)
    options = {"cmap": "RdBu_r", "interpolation": "nearest"}
    image = ax.imshow(shown, vmin=-most, vmax=most, **options)
    for place in range(m or len(values), len(values), m or 1):
        ax.axhline(place - 0.5, color=style.GRAY, linewidth=0.5)
    part = f"{len(values)} x {values.shape[1]} of {inputs} x {outputs}"
    title = f"{part}, {(values == 0).mean():.0%} zeros"
    label = "input, along the contraction"
    ax.set(xlabel="output", ylabel=label, title=title)
    ax.figure.colorbar(image, ax=ax, label="weight")
    return ax


def distribution(
    before: Any,
    after: Any = None,
    *,
    labels: tuple[str, str] = ("before", "after"),
    bins: int = 81,
    ax: Any = None,
) -> Any:
    """Draw the distribution of weights before and after a change.

    Args:
        before: An array, a list of arrays, or a Keras model. A model gives its
            kernels as its layers compute with them.
        after: The same after the change. Defaults to `None`, for one
            distribution alone.
        labels: Pair of strings, their names.
        bins: Int. Defaults to `81`.
        ax: The matplotlib axes to draw in. Defaults to new ones.

    Returns:
        The axes: the probability density of the weights, zeros among them,
        on a scale of logarithms.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If `bins` is no positive int.

    Example:

    ```python
    import numpy as np
    import keras_weightmods as kwm

    weights = np.random.normal(size=(64, 32)).astype("float32")
    pruned = kwm.ops.nm_project(weights, "2:4")
    ax = kwm.plot.distribution(weights, pruned)
    assert ax.get_yscale() == "log"
    ```
    """
    checks.check_int("bins", bins, 1)
    pair = [before] if after is None else [before, after]
    flat = [_all_weights(each) for each in pair]
    most = max(float(np.abs(each).max()) for each in flat) or 1.0
    edges = np.linspace(-most, most, bins + 1)
    ax = style.new_axes(ax)
    for values, label in zip(flat, labels):
        ax.hist(values, edges, histtype="step", density=True, label=label)
    ax.set(yscale="log", xlabel="weight", ylabel="probability density")
    if after is not None:
        style.legend(ax)
    return ax


def density(
    model: Any,
    pattern: nm.Pattern | None = "2:4",
    *,
    targets: Any = None,
    ax: Any = None,
) -> Any:
    """Draw the density of each kernel, and what a pattern keeps of it.

    Args:
        model: A built Keras model or layer.
        pattern: String `"n:m"` or pair of ints. The kept share of a kernel is
            `sum |w * mask| / sum |w|` under the mask of the n largest of each
            group of m: 1 where the kernel has the pattern. `None` to draw the
            density alone. Defaults to `"2:4"`.
        targets: The kernels, as `find_targets(model)` returns them or in a
            form that its `include` takes. Defaults to all.
        ax: The matplotlib axes to draw in. Defaults to new ones.

    Returns:
        The axes: kernels in the order of execution, the first on top.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If the pattern is malformed, or there is no kernel.

    Example:

    ```python
    import keras
    import keras_weightmods as kwm

    model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(8)])
    kwm.sparsify(model, "2:4", verbose=0)
    ax = kwm.plot.density(model)
    assert ax.get_xlim() == (0, 1)
    ```
    """
    n, m = (0, 1) if pattern is None else nm.parse_pattern(pattern)
    found = sorted(resolve_targets(model, targets), key=lambda t: t.depth)
    if not found:
        raise checks.error("targets", "such that they find a kernel", targets)
    names, densities, kept = [], [], []
    for target in found:
        weight = ops.convert_to_tensor(getattr(target.layer, target.attribute))
        values = np.abs(_numpy(weight)).astype("float64")
        names.append(target.path)
        densities.append((values != 0).mean())
        share = np.nan
        if pattern is not None and target.reason_not_nm(m) is None:
            mask = _numpy(nm.nm_mask(weight, pattern, target.contraction_axes))
            share = (values * mask).sum() / (values.sum() or 1)
        kept.append(share)
    ax = style.new_rows(ax, names)
    places = np.arange(len(names))
    ax.barh(places, densities, 0.6, label="density", alpha=0.5)
    if pattern is not None:
        options = {"color": style.COLORS[1], "label": f"kept by {n}:{m}"}
        ax.plot(kept, places, "o", clip_on=False, **options)
    label = "density, and share of the sum of |w| that is kept"
    ax.set(xlim=(0, 1), xlabel=label)
    style.legend(ax, above=True)
    return ax


def bits(report: Any, *, ax: Any = None) -> Any:
    """Draw the bits that each kernel was rounded to.

    Args:
        report: The `QuantizeReport` of `quantize`.
        ax: The matplotlib axes to draw in. Defaults to new ones.

    Returns:
        The axes: kernels in the order they were rounded, the first on top.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If `report` is not a `QuantizeReport`.

    Example:

    ```python
    import keras
    import numpy as np
    import keras_weightmods as kwm

    model = keras.Sequential(
        [keras.Input((64,)), keras.layers.Dense(64), keras.layers.Dense(8)]
    )
    x = np.random.normal(size=(512, 64))
    report = kwm.quantize(model, x, bits=3.5, refine=None, verbose=0)
    ax = kwm.plot.bits(report)
    assert len(ax.patches) == 2
    ```
    """
    rows = getattr(report, "kernels", ())
    if not rows or not hasattr(rows[0], "bits"):
        raise checks.error("report", "what `quantize` returns", report)
    ax = style.new_rows(ax, [row.path for row in rows])
    ax.barh(range(len(rows)), [row.bits for row in rows], 0.6, alpha=0.5)
    ax.set(xlim=(0, 8), xlabel="bits of a weight")
    return ax


def _all_weights(weights: Any) -> np.ndarray:
    if hasattr(weights, "layers"):
        found = resolve_targets(weights, None)
        weights = [getattr(each.layer, each.attribute) for each in found]
    elif not isinstance(weights, (list, tuple)):
        weights = [weights]
    return np.concatenate([_numpy(each).ravel() for each in weights])


def _numpy(tensor: Any) -> np.ndarray:
    array: np.ndarray = ops.convert_to_numpy(tensor)
    # matplotlib does not know the short floats.
    return array if array.dtype == bool else array.astype("float32")
