"""The arithmetic of merging: one array of several models, on NumPy.

Each method is a generator of slices of the flattened array and of the merged
values there. Most go through the array in pieces, on all cores, so that neither
the models nor whole arrays of them are in memory at once.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from keras_weightmods.ops.matrix import stack_shape
from keras_weightmods.utils.parallel import map_ahead

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
            Several threads call it.
        weights: Tuple of floats, one for each model.
        density: Float, the share of entries that a method keeps.
        options: `Options`.
        seed: Tuple of ints, of random entries.
        axes: Pair of tuples, the contraction and the stack axes of a kernel;
            `None` for any other weight.
    """

    shape: tuple[int, ...]
    read: Callable[[int, slice], np.ndarray]
    weights: tuple[float, ...]
    density: float
    options: "Options"
    seed: tuple[int, ...]
    axes: Any = None

    @property
    def size(self) -> int:
        """Int, the number of entries."""
        return math.prod(self.shape)

    def pieces(self, size: int | None = None) -> list[slice]:
        """Return slices that cover the array."""
        size = size or PIECE
        starts = range(0, self.size, size)
        return [slice(x, min(x + size, self.size)) for x in starts]

    def mapped(
        self, function: Callable[[slice], Any], size: int | None = None
    ) -> Iterator[tuple[slice, Any]]:
        """Yield slices that cover the array, and what a function makes of them.

        The function is called on all cores.
        """
        pieces = self.pieces(size)
        return zip(pieces, map_ahead(function, pieces))

    def models(self, part: slice) -> list[np.ndarray]:
        """Return the values of each model."""
        return [self.read(i, part) for i in range(len(self.weights))]

    def changes(self, part: slice) -> tuple[np.ndarray, list[np.ndarray]]:
        """Return the base's values, and what each model has changed."""
        base = self.read(-1, part)
        return base, [values - base for values in self.models(part)]

    def generator(self, model: int, draws: int) -> Any:
        """Return the generator of a model as it is after draws of 64 bits."""
        bits = np.random.PCG64([*self.seed, model])
        return np.random.Generator(bits.advance(draws))

    def kth_largest(self, *counts: int) -> list[list[Any]]:
        """Return of each model the `count`-th largest of its changes."""
        return kth_largest(
            lambda part: self.changes(part)[1], self.pieces(), *counts
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
    shares = [weight / total for weight in task.weights]
    return _summed(task, shares)


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

    def merged(part):
        arrays = [*task.models(part), task.read(-1, part)]
        return _weighted_sum(arrays, [*shares, 1 - step])

    return task.mapped(merged)


def _task_arithmetic(task):
    return _changed(task, _weighted_sum)


def _ties(task):
    count = max(1, math.ceil(task.density * task.size))
    (least,) = task.kth_largest(count)

    def trimmed(changes, part):
        return [x * (_rank(x) >= bound) for x, bound in zip(changes, least)]

    return _changed(task, elected_mean, trimmed)


def _dare(task, fuse=None):
    def kept(changes, part):
        return [
            # A draw of 64 bits for each entry.
            dropped(x, 1 - task.density, task.generator(model, part.start))
            for model, x in enumerate(changes)
        ]

    return _changed(task, fuse or _weighted_sum, kept)


def _dare_ties(task):
    return _dare(task, elected_mean)


def _breadcrumbs(task):
    removed = math.floor(task.options.gamma * task.size)
    kept = max(1, min(math.ceil(task.density * task.size), task.size - removed))
    # Without any removed, the largest is a bound that does not count.
    least, most = task.kth_largest(removed + kept, max(1, removed))
    if not removed:
        most = [np.inf] * len(task.weights)

    def inside(changes, part):
        return [
            x * ((_rank(x) >= lower) & (_rank(x) < upper))
            for x, lower, upper in zip(changes, least, most)
        ]

    return _changed(task, _weighted_sum, inside)


def _della(task):
    count = max(1, _row_size(task))
    # An even number of rows: two draws of 32 bits are one of the generator's.
    size = 2 * max(1, PIECE // (2 * count)) * count

    def drawn(changes, part):
        return [
            drawn_by_size(
                x.reshape(-1, count),
                task.density,
                task.options.epsilon,
                task.generator(model, part.start // 2),
            ).reshape(-1)
            for model, x in enumerate(changes)
        ]

    if task.axes is None:
        # Rows one after the other, as they are stored.
        yield from _changed(task, elected_mean, drawn, size)
        return
    whole = slice(0, task.size)
    base, *models = (
        _rows(x, task) for x in (task.read(-1, whole), *task.models(whole))
    )
    in_rows = dataclasses.replace(
        task, read=lambda number, part: (*models, base)[number][part]
    )
    # Not into the memory of the base: it may be the model's own.
    rows = np.empty_like(base)
    for part, values in _changed(in_rows, elected_mean, drawn, size):
        rows[part] = values
    yield whole, _from_rows(rows, task)


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
        return base + ratio * _weighted_sum(changes, [1 / count] * count)

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


def _summed(task, shares):
    """Merge as the sum of the models times their shares."""
    return task.mapped(lambda part: _weighted_sum(task.models(part), shares))


def _changed(task, fuse, keep=None, size=None):
    """Merge as the base, and `scale` times the changes made one.

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
        return base + task.options.scale * fuse(changes, task.weights)

    return task.mapped(merged, size)


def _products(task, arrays):
    """Return the inner products of a task's arrays, in the upper triangle."""
    count = len(task.weights)
    pairs = list(itertools.combinations_with_replacement(range(count), 2))

    def of_piece(part):
        values, found = arrays(part), np.zeros((count, count))
        for i, j in pairs:
            found[i, j] = np.dot(values[i], values[j])
        return found

    return sum(map_ahead(of_piece, task.pieces()))


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
        # Ten times as fast as `np.where`, and NaN stays NaN.
        share = ((x > 0) & rises | (x < 0) & falls).astype(x.dtype)
        share *= x.dtype.type(weight)
        divisor += share
        share *= x
        total += share
    # Where none agree, the total is 0 too.
    divisor += divisor == 0
    total /= divisor
    return total


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
    # Five times as fast as `np.where`.
    return x * keep / x.dtype.type(1 - drop_rate)


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
    order |= np.arange(rows.size, dtype="uint64").reshape(rows.shape)
    order.sort(axis=-1)
    order = (order & np.uint64(0xFFFFFFFF)).astype("intp")
    steps = np.linspace(-epsilon, epsilon, count) if count > 1 else np.zeros(1)
    keep = np.empty(rows.size, "float32")
    keep[order] = density + steps
    return keep.reshape(rows.shape)


def drawn_by_size(rows, density, epsilon, generator):
    """Return rows of which entries are drawn as DELLA does, and scaled."""
    keep = keep_probabilities(rows, density, epsilon)
    uniform = generator.random(rows.shape, dtype="float32")
    return rows / keep * (uniform < keep)


def isotropic(matrix: np.ndarray) -> np.ndarray:
    """Return a matrix with all singular values at their mean.

    Iso-C (arXiv 2502.04959), equation 6.
    """
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    return values.mean() * (left @ right)


def kth_largest(
    rows_of: Callable[[Any], list[np.ndarray]], pieces: list[Any], *counts: int
) -> list[list[Any]]:
    """Return the `count`-th largest size of each of several rows of numbers.

    In two passes over them. The bits of floats that are not negative are in
    the order of the numbers: the upper half of those sought is found in the
    first pass, the lower half in the second.

    Args:
        rows_of: Callable from a piece to what the rows have there, a list of an
            array for each. They go by their sizes in float32. Several threads
            call it.
        pieces: List of what it takes.
        *counts: Ints, from 1 to how many there are in a row.

    Returns:
        List with an entry for each count, the list of the sizes for each row.
    """

    def counted(halves):
        """Return how often each half of 16 bits is in each of the rows."""

        def of_piece(piece):
            rows = [_rank(x).view("uint32") for x in rows_of(piece)]
            return [
                [np.bincount(x, minlength=1 << 16) for x in halves(row, bits)]
                for row, bits in enumerate(rows)
            ]

        return sum(map(np.array, map_ahead(of_piece, pieces)))

    uppers = counted(lambda row, bits: [bits >> 16])[:, 0]
    found = [[_place(row, count) for count in counts] for row in uppers]

    def lower(row, bits):
        return [bits[bits >> 16 == upper] & 0xFFFF for upper, _ in found[row]]

    lowers = counted(lower)
    bits = [
        [
            upper << 16 | _place(lowers[row, i], rest)[0]
            for row, (upper, rest) in enumerate(column)
        ]
        for i, column in enumerate(zip(*found))
    ]
    return [list(row) for row in np.array(bits, "uint32").view("float32")]


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
    """Return a kernel flattened, its inputs of each output side by side."""
    return _matrices(flat, task).swapaxes(1, 2).reshape(-1)


def _from_rows(rows, task):
    stacks, contraction, output = stack_shape(task.shape, *task.axes)
    matrices = rows.reshape(stacks, output, contraction).swapaxes(1, 2)
    return _from_matrices(list(matrices), task)
