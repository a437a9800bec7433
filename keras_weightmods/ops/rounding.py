"""Rounding the kept weights of a sparse matrix to few bits.

A matrix W is (K, R): K inputs, R units. What is zero in it is not kept, and
stays zero. Along K, every `group_size` weights of a unit share a scale s, and
each is rounded to a multiple q s of it, q being an integer of `bits` bits in
two's complement: -8 to 7 with four. A scale has the 8 significant bits of a
bfloat16, so that `pack_kernel(..., "int4")` finds it again: the largest |w| of
a group over the largest |q| is s, without rounding.

The inputs are known by their second moment `H = X^T X / rows`, of shape
(K, K). The error of a unit with the weights w and w' is `e = r^T H r`, with
`r = w - w'`; its slope is -2 c, with `c = H r`.
"""

import dataclasses
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_weightmods.ops.refine import compiled, damped
from keras_weightmods.ops.sparsegpt import inverse_factor
from keras_weightmods.utils import checks

# Inputs after which all others are updated, by one large product.
_BLOCK = 64

# Scales that are tried for a group, as shares of max |w| over the largest q.
_SHARES = np.linspace(0.5, 1.0, 16)

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
    """What weights are rounded to.

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
        """Round floats to the significant bits of a scale.

        Not within compiled functions: compilers contract, and drop casts.
        """
        # As Dekker (1971), for any number of bits.
        shifted = scales * float(2 ** (24 - self.precision) + 1)
        return shifted - (shifted - scales)

    def spread(self, scales: Any, size: int) -> Any:
        """Return the scale of each of `size` inputs, a tensor `(K, R)`."""
        group_size = min(self.group_size, size)
        return ops.repeat(scales, group_size, axis=0)[:size]

    def nearest(self, values: Any, scales: Any) -> Any:
        """Round to the nearest multiples of scales of the same shape."""
        integers = ops.clip(ops.round(values / scales), self.low, self.high)
        return integers * scales


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
    padding = [(0, groups * group_size - size), (0, 0)]

    def grouped(x: Any) -> Any:
        x = ops.pad(x, padding)
        return ops.reshape(x, (groups, group_size, units))

    largest = ops.max(grouped(ops.abs(matrix)), axis=1)
    empty = largest < _TINY
    best = ops.full_like(largest, float("inf"))
    scales = ops.ones_like(largest)
    for share in _SHARES:
        tried = grid.rounded_scales(largest * float(share / grid.high))
        tried = ops.where(empty, 1.0, tried)
        change = matrix - grid.nearest(matrix, grid.spread(tried, size))
        error = ops.sum(grouped(ops.square(change) * weights[:, None]), axis=1)
        scales = ops.where(error < best, tried, scales)
        best = ops.minimum(error, best)
    return scales


def gptq(matrix: Any, scales: Any, factor: Any, grid: Grid) -> Any:
    """Round one input after the other; let those kept later make up for it.

    GPTQ (arXiv 2210.17323, algorithm 1), for a sparse matrix: the error of
    each weight is spread over all later inputs by row j of the factor, and
    what falls onto weights that are not kept is lost. To fit those kept anew
    after each block of inputs would lose nothing, and ends no better once
    `descend` has been through the matrix.

    Args:
        matrix: float32 tensor of shape `(K, R)`.
        scales: float32 tensor of shape `(G, R)`.
        factor: Array of shape `(K, K)`, from `inverse_factor`.
        grid: `Grid`.

    Returns:
        float32 tensor of shape `(K, R)`.
    """
    size, _ = matrix.shape
    factor = np.asarray(factor, "float32")
    kept = ops.cast(ops.not_equal(matrix, 0), "float32")
    spread = grid.spread(scales, size)
    step = compiled(_gptq_block, 4)
    tail, done = matrix, []
    for start in range(0, size, _BLOCK):
        stop = min(start + _BLOCK, size)
        own = ops.convert_to_tensor(factor[start:stop, start:stop])
        block = tail[: stop - start]
        rows = spread[start:stop], kept[start:stop]
        rounded, errors = step(block, *rows, own, grid)
        done.append(rounded)
        if stop < size:
            across = ops.convert_to_tensor(factor[start:stop, stop:].T.copy())
            change = ops.matmul(across, errors) * kept[stop:]
            tail = tail[stop - start :] - change
    return ops.concatenate(done)


def descend(
    matrix: Any,
    rounded: Any,
    scales: Any,
    second_moment: Any,
    grid: Grid,
    sweeps: int = 8,
) -> tuple[Any, Any]:
    """Improve one scale, and one integer, after the other.

    A sweep sets the scale of each group, with its integers, to its best
    value, `s + q^T c / q^T H q`, rounded; and then each kept weight to the
    multiple of its scale that is next to `w'_j + c_j / H_jj`. Either is the
    minimum of a parabola on what is allowed, so no unit's error rises.

    Args:
        matrix: float32 tensor of shape `(K, R)`, the matrix W.
        rounded: float32 tensor of the same shape, W', on the grid.
        scales: float32 tensor of shape `(G, R)`.
        second_moment: float32 tensor of shape `(K, K)`, H, with a positive
            diagonal.
        grid: `Grid`.
        sweeps: Int, at most how often. It ends when a sweep changes nothing.
            Defaults to `8`.

    Returns:
        Pair of tensors, the new W' and the new scales.
    """
    size, _ = matrix.shape
    h = second_moment
    kept = ops.cast(ops.not_equal(matrix, 0), "float32")
    inverse = 1.0 / ops.diagonal(h)
    rescale, move = compiled(_best_scale), compiled(_best_integers, 6)
    c = ops.matmul(h, matrix - rounded)
    for _ in range(sweeps):
        before = rounded
        parts, new_scales = [], []
        for group, start in enumerate(range(0, size, grid.group_size)):
            part = slice(start, min(start + grid.group_size, size))
            scale, integers = rescale(
                rounded[part], scales[group], h[part, part], c[part]
            )
            scale = grid.rounded_scales(scale)
            values = integers * scale
            c = c - ops.matmul(h[:, part], values - rounded[part])
            parts.append(values)
            new_scales.append(scale)
        rounded, scales = ops.concatenate(parts), ops.stack(new_scales)
        spread = grid.spread(scales, size)
        parts = []
        for start in range(0, size, _BLOCK):
            part = slice(start, min(start + _BLOCK, size))
            rows = rounded[part], spread[part], kept[part], inverse[part]
            values = move(*rows, h[part, part], c[part], grid)
            parts.append(values)
            c = c - ops.matmul(h[:, part], values - rounded[part])
        rounded = ops.concatenate(parts)
        if not bool(ops.any(ops.not_equal(rounded, before))):
            break
    return rounded, scales


def round_kept(
    matrix: Any,
    second_moment: Any,
    grid: Grid | None = None,
    damping: float = 0.01,
) -> Rounded:
    """Round the nonzero weights of a matrix, by what its inputs are like.

    `search_scales`, then `gptq`, then `descend`, all for the damped moment.
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
    factor = inverse_factor(ops.convert_to_numpy(h), damping)
    h = damped(h, damping)
    scales = search_scales(w, ops.diagonal(h), grid)
    nearest = grid.nearest(w, grid.spread(scales, size))
    values = gptq(w, scales, factor, grid)
    # What GPTQ loses on weights that are not kept may make a unit worse.
    is_better = _errors(w, values, h) < _errors(w, nearest, h)
    values = ops.where(is_better, values, nearest)
    values, scales = descend(w, values, scales, h, grid)
    return Rounded(values, scales, nearest)


def _errors(w: Any, rounded: Any, h: Any) -> Any:
    rest = w - rounded
    return ops.sum(rest * ops.matmul(h, rest), axis=0)


def _gptq_block(block: Any, scales: Any, kept: Any, factor: Any, grid: Any):
    """Return rounded rows, and their errors over the factor's diagonal."""

    def step(block: Any, row: Any) -> Any:
        place, scale, is_kept, along = row
        value = block[place]
        rounded = grid.nearest(value, scale) * is_kept
        error = (value - rounded) / along[place]
        # The row of the factor is zero to the left of its place.
        return block - along[:, None] * error * kept, (rounded, error)

    places = ops.arange(block.shape[0])
    return _scan(step, block, (places, scales, kept, factor))


def _best_scale(values: Any, scale: Any, own: Any, c: Any) -> Any:
    """Return the best scale of a group for its integers, and these."""
    integers = ops.round(values / scale)
    curvature = ops.sum(integers * ops.matmul(own, integers), axis=0)
    slope = ops.sum(integers * c, axis=0)
    best = scale + slope / ops.maximum(curvature, _TINY)
    best = ops.where((curvature > _TINY) & (best > _TINY), best, scale)
    return best, integers


def _best_integers(
    values: Any, scales: Any, kept: Any, inverse: Any, own: Any, c: Any, grid
) -> Any:
    """Return the best values of a block of inputs, one after the other."""

    def step(c: Any, row: Any) -> Any:
        place, value, scale, is_kept, inverse, column = row
        best = grid.nearest(value + c[place] * inverse, scale) * is_kept
        return c - column[:, None] * (best - value), best

    places = ops.arange(values.shape[0])
    rows = places, values, scales, kept, inverse, own
    return _scan(step, c, rows)


def _scan(step: Any, carry: Any, rows: tuple[Any, ...]) -> Any:
    """Return the outputs of `step`, of one or several tensors each."""
    if keras.backend.backend() == "jax":
        return ops.scan(step, carry, rows)[1]
    # As ops.scan, which on TensorFlow takes no other structure than carry's.
    outputs = []
    for row in zip(*rows):
        carry, output = step(carry, row)
        outputs.append(output)
    return keras.tree.map_structure(lambda *x: ops.stack(x), *outputs)
