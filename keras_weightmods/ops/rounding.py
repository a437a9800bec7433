"""Rounding the kept weights of a sparse matrix to few bits.

A matrix W is (K, R): K inputs, R units. Zeros are not kept, and stay zero.
Along K, every `group_size` weights of a unit share a scale s. Each is rounded
to a multiple q s, with an integer q of `bits` bits in two's complement: -8 to 7
for four. A negative scale has room for a large positive weight. A scale has the
8 significant bits of a bfloat16. So `pack_kernel(..., "int4")` finds it again:
the largest |w| of a group over the largest |q| is |s|, without rounding.

The inputs are known by their second moment `H = X^T X / rows`, of shape
(K, K). The error of a unit with the weights w and w' is `e = r^T H r`, with
`r = w - w'`; its slope is -2 c, with `c = H r`.
"""

import dataclasses
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_weightmods import backend
from keras_weightmods.ops.refine import compiled, damped
from keras_weightmods.ops.sparsegpt import inverse_factor
from keras_weightmods.utils import checks

# After so many rounded rows, one product updates the others of their block, and
# after a block all others.
_ROWS, _BLOCK = 16, 64

# How many scales are tried for a group.
_SCALES = 16

# A group with smaller weights than this is rounded to zero.
_TINY = 1e-30


class Rounded(NamedTuple):
    """A rounded matrix.

    Attributes:
        values: float32 tensor of shape `(K, R)`.
        scales: float32 tensor of shape `(G, R)`, G being K over the size of a
            group, rounded up.
        nearest: float32 tensor of shape `(K, R)`: what rounding to nearest
            gives.
    """

    values: Any
    scales: Any
    nearest: Any


@dataclasses.dataclass(frozen=True)
class Grid:
    """The grid that weights are rounded to.

    Args:
        bits: Int, 2 to 8. Defaults to `4`.
        group_size: Int, the inputs that share a scale. Defaults to `64`.
        precision: Int, 1 to 8, the significant bits of a scale. Defaults to
            `8`.
    """

    bits: int = 4
    group_size: int = 64
    precision: int = 8

    def __post_init__(self) -> None:
        checks.check_int("group_size", self.group_size, 1)

    @property
    def low(self) -> int:
        """The smallest integer."""
        return -(2 ** (self.bits - 1))

    @property
    def high(self) -> int:
        """The largest integer."""
        return 2 ** (self.bits - 1) - 1

    def rounded_scales(self, scales: Any) -> Any:
        """Round floats to the significant bits of a scale."""
        # Splitting by Dekker (1971), for any number of bits. The product is
        # exact, so a compiler may contract it with the sum.
        shifted = scales * float(2 ** (24 - self.precision)) + scales
        return shifted - (shifted - scales)

    def spread(self, scales: Any, size: int) -> Any:
        """Return the scale of each of `size` inputs, a tensor `(K, R)`."""
        group_size = min(self.group_size, size)
        return ops.repeat(scales, group_size, axis=0)[:size]

    def nearest(self, values: Any, scales: Any) -> Any:
        """Round to the nearest multiples of scales of the same shape."""
        integers = ops.round(values / scales)
        # On torch `ops.clip` takes more than twice as long.
        integers = ops.maximum(integers, float(self.low))
        return ops.minimum(integers, float(self.high)) * scales


def search_scales(matrix: Any, weights: Any, grid: Grid) -> Any:
    """Find the scale of each group with the least weighted squared error.

    Args:
        matrix: float32 tensor of shape `(K, R)`.
        weights: float32 tensor of shape `(K,)`: what an error at each input
            counts, the diagonal of H.
        grid: `Grid`.

    Returns:
        float32 tensor of shape `(G, R)`.
    """
    size, units = matrix.shape
    group_size = min(grid.group_size, size)
    groups = -(-size // group_size)
    if filling := groups * group_size - size:
        matrix = ops.pad(matrix, [(0, filling), (0, 0)])
        weights = ops.pad(weights, [(0, filling)])
    matrix = ops.reshape(matrix, (groups, group_size, units))
    weights = ops.reshape(weights, (groups, 1, group_size))
    most = ops.max(matrix, axis=1, keepdims=True)
    least = ops.min(matrix, axis=1, keepdims=True)
    largest = ops.where(most > -least, most, least)
    empty = ops.abs(largest) < _TINY
    best = ops.full_like(largest, float("inf"))
    scales = ops.ones_like(largest)
    # The largest weight lies on the side of the lowest integer, which is one
    # further from 0 than the highest. It goes from twice that integer, where it
    # is clipped, to as far from 0 as the highest.
    for integer in grid.low / np.linspace(0.5, grid.low / -grid.high, _SCALES):
        tried = grid.rounded_scales(largest * float(1 / integer))
        tried = ops.where(empty, 1.0, tried)
        change = matrix - grid.nearest(matrix, tried)
        error = ops.matmul(weights, ops.square(change))
        scales = ops.where(error < best, tried, scales)
        best = ops.minimum(error, best)
    return scales[:, 0]


def gptq(
    matrix: Any,
    scales: Any,
    second_moment: Any,
    grid: Grid,
    damping: float = 0.01,
) -> Any:
    """Round one input after the other; later kept ones make up for it.

    This is GPTQ (arXiv 2210.17323, algorithm 1) for a sparse matrix. The inputs
    with the largest second moment come first. Row j of the factor of the
    inverse spreads the error of each weight over all later inputs. The part
    that falls on weights that are not kept is lost. Refitting the kept weights
    after each block of inputs would lose nothing, but is no better after
    `descend`.

    Args:
        matrix: float32 tensor of shape `(K, R)`.
        scales: float32 tensor of shape `(G, R)`.
        second_moment: Tensor of shape `(K, K)`, H.
        grid: `Grid`.
        damping: As of `round_kept`.

    Returns:
        float32 tensor of shape `(K, R)`.

    Raises:
        ValueError: If H is not finite.
    """
    size, _ = matrix.shape
    h = ops.convert_to_numpy(second_moment)
    order = np.argsort(-h.diagonal(), kind="stable")
    factor = inverse_factor(h[np.ix_(order, order)], damping)
    # The changes of later inputs for an error of 1 at an input.
    factor /= factor.diagonal()[:, None].copy()
    factor = factor.astype("float32")
    tail = ops.take(matrix, order, axis=0)
    scales = ops.take(grid.spread(scales, size), order, axis=0)
    kept = ops.cast(ops.not_equal(tail, 0), "float32")
    step, done = compiled(_in_order, 5), []
    for start in range(0, size, _BLOCK):
        part = slice(start, min(start + _BLOCK, size))
        count = part.stop - start
        own = ops.convert_to_tensor(-factor[part, part].T.copy())
        rounded, moved = step(
            tail[:count], own, kept[part], scales[part], None, grid
        )
        done.append(rounded)
        if part.stop < size:
            across = ops.convert_to_tensor(factor[part, part.stop :].T.copy())
            change = ops.matmul(across, moved) * kept[part.stop :]
            tail = tail[count:] + change
    return ops.take(ops.concatenate(done), np.argsort(order), axis=0)


def descend(
    matrix: Any,
    rounded: Any,
    scales: Any,
    second_moment: Any,
    grid: Grid,
    sweeps: int = 3,
) -> tuple[Any, Any]:
    """Improve one scale, and one integer, after the other.

    A sweep goes from group to group. For the integers of a group, it sets the
    scale to its best value, `s + q^T c / q^T H q`, rounded. Then it sets each
    kept weight to the multiple of that scale next to `w'_j + c_j / H_jj`. Each
    step minimizes a parabola over the allowed values, so no unit's error rises.

    Args:
        matrix: float32 tensor of shape `(K, R)`, the matrix W.
        rounded: float32 tensor of the same shape, W', on the grid.
        scales: float32 tensor of shape `(G, R)`.
        second_moment: float32 tensor of shape `(K, K)`, H, with a positive
            diagonal.
        grid: `Grid`.
        sweeps: Int, at most how often. It ends when a sweep changes nothing.
            Defaults to `3`.

    Returns:
        Pair of tensors, the new W' and the new scales.
    """
    size, _ = matrix.shape
    h = second_moment
    kept = ops.cast(ops.not_equal(matrix, 0), "float32")
    inverse = 1.0 / ops.diagonal(h)[:, None]
    rescale, move = compiled(_best_scale), compiled(_best_integers, 7)
    c = ops.matmul(h, matrix - rounded)
    for _ in range(sweeps):
        before = rounded
        parts, new_scales = [], []
        for group, start in enumerate(range(0, size, grid.group_size)):
            part = slice(start, min(start + grid.group_size, size))
            values, own = rounded[part], h[part, part]
            scale, integers = rescale(values, scales[group], own, c[part])
            scale = grid.rounded_scales(scale)
            rows = kept[part], inverse[part], own, c[part]
            new = move(values, integers, scale, *rows, grid)
            c = c - ops.matmul(h[:, part], new - values)
            parts.append(new)
            new_scales.append(scale)
        rounded, scales = ops.concatenate(parts), ops.stack(new_scales)
        if not bool(ops.any(ops.not_equal(rounded, before))):
            break
    return rounded, scales


def round_kept(
    matrix: Any,
    second_moment: Any,
    grid: Grid | None = None,
    damping: float = 0.01,
) -> Rounded:
    """Round the nonzero weights of a matrix for the moments of its inputs.

    This calls `search_scales`, `gptq` and `descend` for the damped moment.
    Without a second moment each weight is rounded to nearest.

    Args:
        matrix: Float tensor of shape `(K, R)`.
        second_moment: Tensor of shape `(K, K)`, or None.
        grid: `Grid`; the last group may be smaller. Defaults to `Grid()`.
        damping: Float > 0, the share of the mean of H's diagonal that is
            added to it. Defaults to `0.01`.

    Returns:
        `Rounded`. No unit's damped error is above that of rounding to
        nearest, but for rounding of the sums.

    Example:

    ```python
    import numpy as np
    from keras_weightmods.ops import nm_project
    from keras_weightmods.ops.rounding import round_kept

    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 8)) @ rng.normal(size=(8, 8))
    h = (x.T @ x / 64).astype("float32")
    w = nm_project(rng.normal(size=(8, 3)).astype("float32"), "2:4")
    rounded = round_kept(w, h)
    integers = np.array(rounded.values) / np.array(rounded.scales)
    assert np.array_equal(integers, np.rint(integers))
    ```
    """
    grid = grid or Grid()
    w = ops.cast(ops.convert_to_tensor(matrix), "float32")
    size = w.shape[0]
    if second_moment is None:
        scales = search_scales(w, ops.ones((size,), "float32"), grid)
        values = grid.nearest(w, grid.spread(scales, size))
        return Rounded(values, scales, values)
    h = ops.cast(ops.convert_to_tensor(second_moment), "float32")
    moment, h = h, damped(h, damping)
    scales = search_scales(w, ops.diagonal(h), grid)
    nearest = grid.nearest(w, grid.spread(scales, size))
    values = gptq(w, scales, moment, grid, damping)
    # The loss of GPTQ on weights that are not kept may make a unit worse.
    is_better = _errors(w, values, h) < _errors(w, nearest, h)
    values = ops.where(is_better, values, nearest)
    values, scales = descend(w, values, scales, h, grid)
    return Rounded(values, scales, nearest)


def _errors(w: Any, rounded: Any, h: Any) -> Any:
    rest = w - rounded
    return ops.sum(rest * ops.matmul(h, rest), axis=0)


def _best_scale(values: Any, scale: Any, own: Any, c: Any) -> Any:
    """Return the best scale of a group for its integers, and these."""
    integers = ops.round(values / scale)
    curvature = ops.sum(integers * ops.matmul(own, integers), axis=0)
    slope = ops.sum(integers * c, axis=0)
    best = scale + slope / ops.maximum(curvature, _TINY)
    best = ops.where((curvature > _TINY) & (abs(best) > _TINY), best, scale)
    return best, integers


def _best_integers(
    values: Any,
    integers: Any,
    scale: Any,
    kept: Any,
    inverse: Any,
    own: Any,
    c: Any,
    grid: Grid,
) -> Any:
    """Return the best values of a group with a new scale."""
    rescaled = integers * scale
    c = c - ops.matmul(own, rescaled - values)
    targets = rescaled + c * inverse
    scales = ops.broadcast_to(scale, targets.shape)
    return _in_order(targets, own * inverse, kept, scales, rescaled, grid)[0]


def _in_order(
    targets: Any,
    coupling: Any,
    kept: Any,
    scales: Any,
    before: Any,
    grid: Grid,
) -> tuple[Any, Any]:
    """Round rows to multiples of scales, given the changes of the rows above.

    The value rounded in row i is `targets[i] - coupling[i, :i] @ moved[:i]`.

    Args:
        targets, kept, scales: Tensors of shape `(rows, R)`.
        coupling: Tensor of shape `(rows, rows)`.
        before: What the result moves from, or None: from what is rounded.
        grid: `Grid`.

    Returns:
        Pair of tensors, the multiples and `moved`.
    """
    size = targets.shape[0]
    in_place = backend.current().in_place()
    if in_place:
        limits = grid.low, grid.high
        return in_place.round_in_order(
            targets, coupling, kept, scales, before, *limits
        )
    if size > _ROWS:
        half = size // 2
        a, b = slice(half), slice(half, size)

        def part(targets: Any, at: slice) -> Any:
            was = None if before is None else before[at]
            own = coupling[at, at], kept[at], scales[at], was
            return _in_order(targets, *own, grid)

        first = part(targets[a], a)
        rest = targets[b] - ops.matmul(coupling[b, a], first[1])
        rounded, moved = map(ops.concatenate, zip(first, part(rest, b)))
        return rounded, moved

    def step(targets: Any, row: Any) -> Any:
        place, along, is_kept, scale, *was = row
        target = targets[place] * is_kept
        rounded = grid.nearest(target, scale)
        moved = rounded - (was[0] if was else target)
        return targets - along[:, None] * moved, (rounded, moved)

    rows: Any = ops.arange(size), ops.transpose(coupling), kept, scales
    rows = rows if before is None else (*rows, before)
    if keras.backend.backend() == "jax":
        return ops.scan(step, targets, rows)[1]
    # A loop like ops.scan, which on TensorFlow takes only carry's structure.
    outputs = []
    for place in range(size):
        targets, output = step(targets, [each[place] for each in rows])
        outputs.append(output)
    rounded, moved = map(ops.stack, zip(*outputs))
    return rounded, moved
