"""The methods of merging: one array of several models, on NumPy.

`METHODS` has everything about a method: its arguments, checks, and name in
mergekit. `register_merge_method` adds to it.

The function of a method yields slices of the flattened array, with the merged
values. Most go through the array in pieces, on all cores, so that memory never
holds whole models or arrays.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from keras_weightmods.merging import task as tasks
from keras_weightmods.merging.task import Task, rank
from keras_weightmods.patches.combine import (
    dropped,
    elected_mean,
    weighted_sum,
)
from keras_weightmods.utils import checks
from keras_weightmods.utils.matrix import stack_shape
from keras_weightmods.utils.parallel import map_ahead

# An angle below this is less than its rounding error; see `_slerp`.
_PARALLEL = 0.9995
_Parts = Iterator[tuple[slice, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class MergeMethod:
    """A way to merge.

    Attributes:
        function: Callable from a `Task` to an iterator of slices that cover
            the flattened array, in order, and of the merged values there.
        needs_base: Bool, whether it merges what the models have changed of a
            base, and not the models themselves.
        options: Dict from the names of its numbers to their defaults.
        bounds: Callable from the numbers for a weight to a dict, from their
            names to the bounds that `checks.check_float` takes.
        weights: String, what the weights of the models are: `"any"` numbers;
            those of a `"mean"`, of a sum above 0; `"shares"`, 0 or more too;
            `"votes"`, 0 or more, of which those that agree divide a sum;
            `"none"`, no weights.
        models: Pair of ints, the fewest and the most models; `None` for any
            number.
        mergekit: String, its name there; `None` for the same.
    """

    function: Callable[[Task], _Parts]
    needs_base: bool = True
    options: Mapping[str, float] = dataclasses.field(default_factory=dict)
    bounds: Callable[[Mapping[str, float]], Mapping[str, Any]] = (
        lambda numbers: {"density": {"above": 0.0, "most": 1.0}}
    )
    weights: str = "any"
    models: tuple[int, int | None] = (1, None)
    mergekit: str | None = None


def register_merge_method(
    name: str, function: Callable[[Task], _Parts], **fields: Any
) -> None:
    """Add a method with a name of its own to `merge`.

    Args:
        name: String, the `method` of `merge`.
        function: Callable that takes a `Task`, one array of all models. It
            returns an iterator of pairs: slices that cover the flattened array,
            in order, and the merged values there. `task.mapped(f)` makes one
            from a function from a slice to values. Read the arrays with
            `task.models(part)` and `task.changes(part)`.
        **fields: What the method needs: `needs_base`, `options`, `bounds`,
            `weights`, `models` and `mergekit`, see `MergeMethod`.

    Raises:
        ValueError: If a method of this package has the name, or an argument is
            wrong.

    Example:

    ```python
    import keras
    import numpy as np
    import keras_weightmods as kwm

    def median(task):
        return task.mapped(lambda part: np.median(task.models(part), axis=0))

    kwm.register_merge_method("median", median, needs_base=False)
    models = [
        keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
        for _ in range(4)
    ]
    kwm.merge(models[:3], models[3], "median", verbose=0)
    ```
    """
    if checks.check_string("name", name) in _BUILT_IN:
        raise checks.error("name", f"none of {sorted(_BUILT_IN)}", name)
    if not callable(function):
        raise checks.error("function", "a callable", function)
    method = MergeMethod(function, **fields)
    checks.check_choice("weights", method.weights, WEIGHTS)
    METHODS[name] = method


def mean(task: Task) -> Iterator[tuple[slice, np.ndarray]]:
    """Return the weighted mean of the models."""
    total = math.fsum(task.weights)
    shares = [weight / total for weight in task.weights]
    return _summed(task, shares)


def moved_mean(
    task: Task, is_whole: bool
) -> Iterator[tuple[slice, np.ndarray]]:
    """Move the base to the mean of the models by the sum of the weights.

    It moves at most the whole way. With `is_whole` it always does, unless no
    weight is above 0. Models with a negative weight do not count in the mean.
    """
    counted = [max(weight, 0.0) for weight in task.weights]
    step = min(max(math.fsum(task.weights), 0.0), 1.0)
    if is_whole:
        step = float(any(counted))
    total = math.fsum(counted) or 1.0
    shares = [step * weight / total for weight in counted]

    def merged(part):
        arrays = [*task.models(part), task.read(-1, part)]
        return weighted_sum(arrays, [*shares, 1 - step])

    return task.mapped(merged)


def _task_arithmetic(task):
    return _changed(task, weighted_sum)


def _ties(task):
    count = max(1, math.ceil(task.options["density"] * task.size))
    (least,) = task.kth_largest(count)

    def trimmed(changes, part):
        return [x * (rank(x) >= bound) for x, bound in zip(changes, least)]

    return _changed(task, elected_mean, trimmed)


def _dare(task, fuse=weighted_sum):
    density = task.options["density"]

    def kept(changes, part):
        return [
            # Each entry takes a draw of 64 bits.
            dropped(x, density, task.generator(model, part.start))
            for model, x in enumerate(changes)
        ]

    return _changed(task, fuse, kept)


def _breadcrumbs(task):
    removed = math.floor(task.options["gamma"] * task.size)
    kept = math.ceil(task.options["density"] * task.size)
    kept = max(1, min(kept, task.size - removed))
    # If none is removed, the largest is no bound.
    least, most = task.kth_largest(removed + kept, max(1, removed))
    if not removed:
        most = [np.inf] * len(task.weights)

    def inside(changes, part):
        return [
            x * ((rank(x) >= lower) & (rank(x) < upper))
            for x, lower, upper in zip(changes, least, most)
        ]

    return _changed(task, weighted_sum, inside)


def _della(task):
    count = task.shape[-1] if task.shape else 1
    if task.axes is not None:
        stacks, count, columns = stack_shape(task.shape, *task.axes)
    # An even number of rows: two draws of 32 bits are one of the generator.
    size = 2 * max(1, tasks.PIECE // (2 * count)) * count

    def drawn(changes, part):
        found = []
        for model, change in enumerate(changes):
            rows = change.reshape(-1, count)
            density, epsilon = task.options["density"], task.options["epsilon"]
            keep = keep_probabilities(rows, density, epsilon)
            generator = task.generator(model, part.start // 2)
            uniform = generator.random(rows.shape, dtype="float32")
            found.append((rows / keep * (uniform < keep)).reshape(-1))
        return found

    if task.axes is None:
        # Rows one after the other, as they are stored.
        yield from _changed(task, elected_mean, drawn, size)
        return
    whole = slice(0, task.size)
    base, *models = (
        _matrices(x, task).swapaxes(1, 2).reshape(-1)
        for x in (task.read(-1, whole), *task.models(whole))
    )
    in_rows = dataclasses.replace(
        task, read=lambda number, part: (*models, base)[number][part]
    )
    # Do not write into the base: it may be the model's own memory.
    rows = np.empty_like(base)
    for part, values in _changed(in_rows, elected_mean, drawn, size):
        rows[part] = values
    rows = rows.reshape(stacks, columns, count).swapaxes(1, 2)
    yield whole, _from_matrices(rows, task)


def _model_stock(task):
    count = len(task.weights)
    products = _products(task, lambda part: task.changes(part)[1])
    norms = np.sqrt(np.diag(products))
    cosines = [
        products[i, j] / (norms[i] * norms[j]) if norms[i] * norms[j] else 0.0
        for i, j in itertools.combinations(range(count), 2)
    ]
    cosine = min(max(float(np.mean(cosines)), 0.0), 1.0)
    ratio = count * cosine / (1 + (count - 1) * cosine)

    def merged(part):
        base, changes = task.changes(part)
        return base + ratio * weighted_sum(changes, [1 / count] * count)

    return task.mapped(merged)


def _slerp(task):
    products = _products(task, task.models)
    place = task.weights[1] / math.fsum(task.weights)
    shares = [1 - place, place]
    norm = math.sqrt(products[0, 0] * products[1, 1])
    cosine = products[0, 1] / norm if norm else 1.0
    if abs(cosine) < _PARALLEL:
        angle = math.acos(cosine)
        shares = [math.sin(x * angle) / math.sin(angle) for x in shares]
    return _summed(task, shares)


def _iso_c(task):
    if task.axes is None:
        total = math.fsum(task.weights)
        shares = [weight / total for weight in task.weights]
        yield from _task_arithmetic(dataclasses.replace(task, weights=shares))
        return
    whole = slice(0, task.size)
    base = task.read(-1, whole)
    total = np.zeros_like(base)
    for i, weight in enumerate(task.weights):
        total += weight * (task.read(i, whole) - base)
    # Iso-C (arXiv 2502.04959), equation 6: all singular values at their mean.
    left, values, right = np.linalg.svd(_matrices(total, task), False)
    made = np.mean(values, -1)[:, None, None] * (left @ right)
    yield whole, base + task.options["scale"] * _from_matrices(made, task)


WEIGHTS = ("any", "mean", "shares", "votes", "none")
_SCALE = {"scale": 1.0}
_DRAWN = {**_SCALE, "density": 0.1}
_SHARE = {"least": 0.0, "below": 1.0}
# Densities are close to those of the papers.
METHODS = {
    "linear": MergeMethod(mean, needs_base=False, weights="mean"),
    "slerp": MergeMethod(
        _slerp, needs_base=False, weights="shares", models=(2, 2)
    ),
    "task_arithmetic": MergeMethod(_task_arithmetic, options=_SCALE),
    "ties": MergeMethod(
        _ties, options={**_SCALE, "density": 0.2}, weights="votes"
    ),
    "dare": MergeMethod(_dare, options=_DRAWN, mergekit="dare_linear"),
    "dare_ties": MergeMethod(
        functools.partial(_dare, fuse=elected_mean),
        options=_DRAWN,
        weights="votes",
    ),
    "della": MergeMethod(
        _della,
        options={**_SCALE, "epsilon": 0.1, "density": 0.3},
        # Probabilities are density - epsilon to density + epsilon.
        bounds=lambda x: {
            "epsilon": _SHARE,
            "density": {"above": x["epsilon"], "most": 1 - x["epsilon"]},
        },
        weights="votes",
    ),
    "breadcrumbs": MergeMethod(
        _breadcrumbs,
        options={**_SCALE, "gamma": 0.01, "density": 0.15},
        # The share `gamma` of entries is dropped.
        bounds=lambda x: {
            "gamma": _SHARE,
            "density": {"above": 0.0, "most": 1 - x["gamma"]},
        },
    ),
    "model_stock": MergeMethod(_model_stock, weights="none", models=(2, None)),
    "iso_c": MergeMethod(_iso_c, options=_SCALE, weights="mean"),
}
_BUILT_IN = frozenset(METHODS)


def _summed(task, shares):
    """Merge as the weighted sum of the models."""
    return task.mapped(lambda part: weighted_sum(task.models(part), shares))


def _changed(task, fuse, keep=None, size=None):
    """Merge as the base plus `scale` times the combined changes.

    Args:
        task: `Task`.
        fuse: Callable that makes one array of those of all models and the
            weights.
        keep: Callable from the changes of a piece and its slice to those that
            count. Defaults to all.
        size: Int, of a piece.
    """

    def merged(part):
        base, changes = task.changes(part)
        if keep is not None:
            changes = keep(changes, part)
        return base + task.options["scale"] * fuse(changes, task.weights)

    return task.mapped(merged, size)


def _products(task, arrays):
    """Return the inner products of a task's arrays, as an upper triangle."""
    count = len(task.weights)
    pairs = list(itertools.combinations_with_replacement(range(count), 2))

    def of_piece(part):
        values, found = arrays(part), np.zeros((count, count))
        for i, j in pairs:
            found[i, j] = np.dot(values[i], values[j])
        return found

    return sum(map_ahead(of_piece, task.pieces()))


def keep_probabilities(
    rows: np.ndarray, density: float, epsilon: float
) -> np.ndarray:
    """Return the probabilities that DELLA (arXiv 2406.11617) keeps entries.

    They rise from `density - epsilon` for the smallest magnitude of a row to
    `density + epsilon` for the largest, in equal steps. If magnitudes are equal
    in float32, the first ranks lower.

    Args:
        rows: Array of shape `(rows, entries)`.
        density: Float in (0, 1].
        epsilon: Float, 0 or more.

    Returns:
        float32 array of that shape.
    """
    count = rows.shape[-1]
    # Size and place in one number sort 20 times as fast as `np.argsort`.
    order = rank(rows).view("uint32").astype("uint64") << np.uint64(32)
    order |= np.arange(rows.size, dtype="uint64").reshape(rows.shape)
    order.sort(axis=-1)
    order = (order & np.uint64(0xFFFFFFFF)).astype("intp")
    steps = np.linspace(-epsilon, epsilon, count) if count > 1 else np.zeros(1)
    keep = np.empty(rows.size, "float32")
    keep[order] = density + steps
    return keep.reshape(rows.shape)


def _order(task):
    """Return the axes of a kernel: stacks, rows, columns."""
    rows, stacks = task.axes
    inner = {*rows, *stacks}
    columns = (i for i in range(len(task.shape)) if i not in inner)
    return *stacks, *rows, *columns


def _matrices(flat, task):
    """Return a kernel as an array (stacks, contraction, output)."""
    sizes = stack_shape(task.shape, *task.axes)
    return flat.reshape(task.shape).transpose(_order(task)).reshape(sizes)


def _from_matrices(matrices, task):
    """Undo `_matrices`."""
    order = _order(task)
    whole = matrices.reshape([task.shape[axis] for axis in order])
    return whole.transpose(np.argsort(order)).reshape(-1)
