"""The arithmetic of merging: one array of several models, on NumPy.

Each method is a generator of slices of the flattened array and of the merged
values there. Most go through the array in pieces, so that neither the models
nor whole arrays of them are in memory at once.
"""

import concurrent.futures
import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from keras_weightmods.ops.matrix import stack_shape

# Elements, of what is computed at a time: what the caches hold.
PIECE = 1 << 17
# Where an angle is less than its rounding, see `_slerp`.
_PARALLEL = 0.9995


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """One array to merge.

    Attributes:
        shape: Tuple of ints.
        read: Callable from the number of a model (-1 for the base) and a slice
            of the array flattened to the values there, float32 or float64.
        weights: Tuple of floats, one for each model.
        density: Float, the share of entries that a method keeps.
        options: `Options`.
        generators: Callable from the number of a model to a
            `numpy.random.Generator`, in the same state at each call.
        axes: Pair of tuples, the contraction and the stack axes of a kernel;
            `None` for any other weight.
    """

    shape: tuple[int, ...]
    read: Callable[[int, slice], np.ndarray]
    weights: tuple[float, ...]
    density: float
    options: "Options"
    generators: Callable[[int], np.random.Generator]
    axes: Any = None

    @property
    def size(self) -> int:
        """Int, the number of entries."""
        return math.prod(self.shape)

    def pieces(self) -> Iterator[slice]:
        """Yield slices that cover the array."""
        for start in range(0, self.size, PIECE):
            yield slice(start, min(start + PIECE, self.size))

    def models(self, part: slice) -> list[np.ndarray]:
        """Return the values of each model."""
        return [self.read(i, part) for i in range(len(self.weights))]

    def changes(self, part: slice) -> tuple[np.ndarray, list[np.ndarray]]:
        """Return the base's values, and what each model has changed."""
        base = self.read(-1, part)
        return base, [values - base for values in self.models(part)]

    def kth_largest(self, *counts: int) -> list[list[Any]]:
        """Return of each model the `count`-th largest of its changes."""
        return kth_largest(
            lambda: (self.changes(part)[1] for part in self.pieces()), *counts
        )


@dataclasses.dataclass(frozen=True)
class Options:
    """The numbers that a method takes; see `merge`."""

    scale: float = 1.0
    gamma: float = 0.01
    epsilon: float = 0.1


def mean(task: Task) -> Iterator[tuple[slice, np.ndarray]]:
    """The mean of the models with the weights."""
    total = math.fsum(task.weights)
    for part in task.pieces():
        shares = [weight / total for weight in task.weights]
        yield part, _weighted_sum(task.models(part), shares)


def moved_mean(
    task: Task, is_whole: bool
) -> Iterator[tuple[slice, np.ndarray]]:
    """The base moved to the mean of the models by the sum of the weights.

    By all of the way at most; with `is_whole` always, unless no weight is
    above 0. Models with a negative weight do not count in the mean.
    """
    counted = [max(weight, 0.0) for weight in task.weights]
    step = min(max(math.fsum(task.weights), 0.0), 1.0)
    if is_whole:
        step = float(any(counted))
    total = math.fsum(counted) or 1.0
    shares = [step * weight / total for weight in counted]
    for part in task.pieces():
        arrays = [*task.models(part), task.read(-1, part)]
        yield part, _weighted_sum(arrays, [*shares, 1 - step])


def _task_arithmetic(task):
    for part in task.pieces():
        base, changes = task.changes(part)
        total = _weighted_sum(changes, task.weights)
        yield part, base + task.options.scale * total


def _ties(task):
    count = max(1, math.ceil(task.density * task.size))
    (least,) = task.kth_largest(count)
    for part in task.pieces():
        base, changes = task.changes(part)
        kept = [x * (_rank(x) >= bound) for x, bound in zip(changes, least)]
        merged = elected_mean(kept, task.weights)
        yield part, base + task.options.scale * merged


def _dare(task, elect=False):
    generators = [task.generators(i) for i in range(len(task.weights))]
    for part in task.pieces():
        base, changes = task.changes(part)
        kept = [
            dropped(x, 1 - task.density, generator)
            for x, generator in zip(changes, generators)
        ]
        fuse = elected_mean if elect else _weighted_sum
        yield part, base + task.options.scale * fuse(kept, task.weights)


def _dare_ties(task):
    return _dare(task, elect=True)


def _breadcrumbs(task):
    removed = math.floor(task.options.gamma * task.size)
    kept = max(1, min(math.ceil(task.density * task.size), task.size - removed))
    # Without any removed, the largest is a bound that does not count.
    least, most = task.kth_largest(removed + kept, max(1, removed))
    if not removed:
        most = [np.inf] * len(task.weights)
    for part in task.pieces():
        base, changes = task.changes(part)
        inside = [
            x * ((_rank(x) >= lower) & (_rank(x) < upper))
            for x, lower, upper in zip(changes, least, most)
        ]
        total = _weighted_sum(inside, task.weights)
        yield part, base + task.options.scale * total


def _della(task):
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from _della_in(pool, task)


def _della_in(pool, task):
    generators = [task.generators(i) for i in range(len(task.weights))]

    def drawn(rows, generator):
        """Return a model's rows: what is drawn goes on from call to call."""
        keep = keep_probabilities(rows, task.density, task.options.epsilon)
        uniform = generator.random(rows.shape, dtype="float32")
        kept = np.where(uniform < keep, rows / keep, 0)
        return kept.astype(rows.dtype, copy=False)

    def merged(base, changes):
        kept = list(pool.map(drawn, changes, generators))
        return base + task.options.scale * elected_mean(kept, task.weights)

    count = max(1, _row_size(task))
    step = max(1, PIECE // count)
    if task.axes is None:
        # Rows one after the other, as they are stored.
        for start in range(0, task.size, step * count):
            part = slice(start, min(start + step * count, task.size))
            base, changes = task.changes(part)
            rows = [x.reshape(-1, count) for x in (base, *changes)]
            yield part, merged(rows[0], rows[1:]).reshape(-1)
        return
    whole = slice(0, task.size)
    base, *models = (
        _rows(x, task) for x in (task.read(-1, whole), *task.models(whole))
    )
    rows = np.empty_like(base)
    for start in range(0, len(base), step):
        part = slice(start, start + step)
        changes = [x[part] - base[part] for x in models]
        rows[part] = merged(base[part], changes)
    del base, models
    yield whole, _from_rows(rows, task)


def _model_stock(task):
    count = len(task.weights)
    products = np.zeros((count, count))
    for part in task.pieces():
        _, changes = task.changes(part)
        for i, j in itertools.combinations_with_replacement(range(count), 2):
            products[i, j] += np.dot(changes[i], changes[j])
    norms = np.sqrt(np.diag(products))
    cosines = [
        products[i, j] / (norms[i] * norms[j]) if norms[i] * norms[j] else 0.0
        for i, j in itertools.combinations(range(count), 2)
    ]
    cosine = min(max(float(np.mean(cosines)), 0.0), 1.0)
    ratio = count * cosine / (1 + (count - 1) * cosine)
    for part in task.pieces():
        base, changes = task.changes(part)
        average = _weighted_sum(changes, [1 / count] * count)
        yield part, base + ratio * average


def _slerp(task):
    products = np.zeros(3)
    for part in task.pieces():
        x, y = task.models(part)
        products += np.dot(x, x), np.dot(y, y), np.dot(x, y)
    place = task.weights[1] / math.fsum(task.weights)
    shares = [1 - place, place]
    norm = math.sqrt(products[0] * products[1])
    cosine = products[2] / norm if norm else 1.0
    if abs(cosine) < _PARALLEL:
        angle = math.acos(cosine)
        shares = [math.sin(x * angle) / math.sin(angle) for x in shares]
    for part in task.pieces():
        yield part, _weighted_sum(task.models(part), shares)


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
    flat = _from_matrices([isotropic(x) for x in _matrices(total, task)], task)
    yield whole, base + task.options.scale * flat


METHODS = {
    "linear": mean,
    "slerp": _slerp,
    "task_arithmetic": _task_arithmetic,
    "ties": _ties,
    "dare": _dare,
    "dare_ties": _dare_ties,
    "della": _della,
    "breadcrumbs": _breadcrumbs,
    "model_stock": _model_stock,
    "iso_c": _iso_c,
}


def elected_mean(arrays: list[np.ndarray], weights: Any = None) -> np.ndarray:
    """Return the mean of those entries that have the sign of their sum.

    TIES (arXiv 2306.01708), steps 2 and 3: zeros have no vote and do not
    count in the mean; zero where the votes cancel out. With weights, the vote
    is that of `weight * entry`, and the sum of those that agree is divided by
    the sum of their weights.

    Args:
        arrays: List of arrays of one shape and floating dtype.
        weights: List of floats, 0 or more. Defaults to ones.
    """
    weights = [1.0] * len(arrays) if weights is None else weights
    votes = _weighted_sum(arrays, weights)
    rises, falls = votes > 0, votes < 0
    total, divisor = np.zeros_like(votes), np.zeros_like(votes)
    for x, weight in zip(arrays, weights):
        agree = (x > 0) & rises | (x < 0) & falls
        # Ten times as fast as `np.where`, and NaN stays NaN.
        total += x * agree * x.dtype.type(weight)
        divisor += agree * x.dtype.type(weight)
    # Where none agree, the total is 0 too.
    divisor += divisor == 0
    return total / divisor


def dropped(
    x: np.ndarray, drop_rate: float, generator: np.random.Generator
) -> np.ndarray:
    """Drop entries at random and rescale the rest by `1 / (1 - rate)`.

    DARE (arXiv 2311.03099), equation 1: the expectation stays.

    Args:
        x: Array of a floating dtype.
        drop_rate: Float in [0, 1).
        generator: A `numpy.random.Generator`.
    """
    keep = generator.random(x.shape) >= drop_rate
    return np.where(keep, x, 0) / x.dtype.type(1 - drop_rate)


def keep_probabilities(
    rows: np.ndarray, density: float, epsilon: float
) -> np.ndarray:
    """Return the probabilities that DELLA (arXiv 2406.11617) keeps entries.

    From `density - epsilon` for the smallest magnitude of a row to `density +
    epsilon` for its largest, in equal steps from rank to rank. Of sizes that
    are equal in float32, the first is the lower.

    Args:
        rows: Array of shape `(rows, entries)`.
        density: Float in (0, 1].
        epsilon: Float, 0 or more.

    Returns:
        float32 array of that shape.
    """
    count = rows.shape[-1]
    # Size and place in one number: sorted 20 times as fast as `np.argsort`.
    order = _rank(rows).view("uint32").astype("uint64") << np.uint64(32)
    order |= np.arange(count, dtype="uint64")
    order.sort(axis=-1)
    order = (order & np.uint64(0xFFFFFFFF)).astype("intp")
    steps = np.linspace(-epsilon, epsilon, count) if count > 1 else np.zeros(1)
    keep = np.empty(rows.shape, "float32")
    np.put_along_axis(keep, order, (density + steps)[None], axis=-1)
    return keep


def isotropic(matrix: np.ndarray) -> np.ndarray:
    """Return a matrix with all singular values at their mean.

    Iso-C (arXiv 2502.04959), equation 6.
    """
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return values.mean() * (left @ right)


def kth_largest(
    parts: Callable[[], Iterator[list[np.ndarray]]], *counts: int
) -> list[list[Any]]:
    """Return the `count`-th largest size of each of several rows of numbers.

    In two passes over them. The bits of floats that are not negative are in
    the order of the numbers: the upper half of those sought is found in the
    first pass, the lower half in the second.

    Args:
        parts: Callable that returns an iterator of pieces of the rows, lists
            of an array for each. They go by their sizes in float32.
        *counts: Ints, from 1 to how many there are in a row.

    Returns:
        List with an entry for each count, the list of the sizes for each row.
    """
    uppers = _counted(parts, lambda row, bits: [bits >> 16])[:, 0]
    found = [[_place(row, count) for count in counts] for row in uppers]

    def lower(row, bits):
        return [bits[bits >> 16 == upper] & 0xFFFF for upper, _ in found[row]]

    lowers = _counted(parts, lower)
    bits = [
        [
            upper << 16 | _place(lowers[row, i], rest)[0]
            for row, (upper, rest) in enumerate(column)
        ]
        for i, column in enumerate(zip(*found))
    ]
    return [list(row) for row in np.array(bits, "uint32").view("float32")]


def _counted(parts, halves):
    """Return how often each half of 16 bits is in each of the rows.

    The rows are counted side by side, while the next piece is read. Shape
    `(rows, halves, 65536)`.
    """

    def counted(row, numbers):
        bits = _rank(numbers).view("uint32")
        return [np.bincount(x, minlength=1 << 16) for x in halves(row, bits)]

    total: Any = 0
    before: Any = None
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for arrays in parts():
            now = pool.map(counted, itertools.count(), arrays)
            if before is not None:
                total += np.array(list(before))
            before = now
        return total + np.array(list(before))


def _place(counts, count):
    """Return the bin of the `count`-th from the end, and its place in it."""
    above = np.cumsum(counts[::-1])
    place = int(np.searchsorted(above, count))
    found = counts.size - 1 - place
    return found, count - int(above[place] - counts[found])


def _rank(x):
    """Return the sizes of changes, as `kth_largest` compares them."""
    return np.abs(x).astype("float32", copy=False)


def _weighted_sum(arrays, weights):
    total = arrays[0] * arrays[0].dtype.type(weights[0])
    for x, weight in zip(arrays[1:], weights[1:]):
        total += x * x.dtype.type(weight)
    return total


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
    order = _order(task)
    shape = [task.shape[axis] for axis in order]
    whole = np.reshape(np.stack(matrices), shape)
    return whole.transpose(np.argsort(order)).reshape(-1)


def _row_size(task):
    """Return the length of the rows of `_rows`; 1 for a single number."""
    if task.axes is None:
        return task.shape[-1] if task.shape else 1
    return stack_shape(task.shape, *task.axes)[1]


def _rows(flat, task):
    """Return a kernel as rows, the inputs of each output."""
    matrices = _matrices(flat, task).swapaxes(1, 2)
    return matrices.reshape(-1, matrices.shape[-1])


def _from_rows(rows, task):
    stacks, contraction, output = stack_shape(task.shape, *task.axes)
    matrices = rows.reshape(stacks, output, contraction).swapaxes(1, 2)
    return _from_matrices(list(matrices), task)
