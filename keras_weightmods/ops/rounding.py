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

Arrays are NumPy's, so that each backend gives the same integers. All of it runs
on the CPU, wherever the model is.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
from keras import ops

from keras_weightmods import backend, native
from keras_weightmods.ops.sparsegpt import inverse_factor
from keras_weightmods.utils import checks

# After so many rounded rows, one product updates all others.
_BLOCK = 64

# The inputs that are updated at a time.
_PANEL = 1024

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
    """

    values: Any
    scales: Any


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
        """Return the scale of each of `size` inputs, an array `(K, R)`."""
        return np.repeat(scales, min(self.group_size, size), axis=0)[:size]

    def nearest(self, values: Any, scales: Any) -> Any:
        """Round arrays to the nearest multiples of scales."""
        return np.clip(np.rint(values / scales), self.low, self.high) * scales


def search_scales(matrix: Any, weights: Any, grid: Grid) -> Any:
    """Find the scale of each group with the least weighted squared error.

    Args:
        matrix: float32 array of shape `(K, R)`.
        weights: float32 array of shape `(K,)`: what an error at each input
            counts, the diagonal of H.
        grid: `Grid`.

    Returns:
        float32 array of shape `(G, R)`.
    """
    size, units = matrix.shape
    groups = -(-size // grid.group_size)
    scales = np.ones((groups, units), "float32")
    # The largest weight lies on the side of the lowest integer, which is one
    # further from 0 than the highest. It goes from twice that integer, where it
    # is clipped, to as far from 0 as the highest.
    integers = grid.low / np.linspace(0.5, grid.low / -grid.high, _SCALES)
    factors = (1 / integers).astype("float32")
    if library := native.library():
        sizes = size, grid.group_size, units
        library.kwm_search_scales(
            *(matrix.ctypes.data, weights.ctypes.data, *sizes),
            *(factors.ctypes.data, _SCALES, grid.low, grid.high),
            *(2 ** (24 - grid.precision), scales.ctypes.data),
        )
        return scales
    for group, chosen in enumerate(scales):
        start = group * grid.group_size
        part = slice(start, start + grid.group_size)
        own, most, least = (
            matrix[part],
            matrix[part].max(0),
            matrix[part].min(0),
        )
        largest = np.where(most > -least, most, least)
        best = np.full(units, np.inf, "float32")
        for factor in factors:
            tried = grid.rounded_scales(largest * factor)
            tried[np.abs(largest) < _TINY] = 1
            error = weights[part] @ np.square(own - grid.nearest(own, tried))
            chosen[...] = np.where(error < best, tried, chosen)
            best = np.minimum(error, best)
    return scales


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
        matrix: float32 array of shape `(K, R)`.
        scales: float32 array of shape `(G, R)`.
        second_moment: Array of shape `(K, K)`, H.
        grid: `Grid`.
        damping: As of `round_kept`.

    Returns:
        float32 array of shape `(K, R)`.

    Raises:
        ValueError: If H is not finite.
    """
    order = np.argsort(-second_moment.diagonal(), kind="stable")
    factor = inverse_factor(second_moment, damping, order)
    # The changes of later inputs for an error of 1 at an input.
    factor /= factor.diagonal()[:, None].copy()
    factor = _to_float32(factor)
    rows = matrix[order]
    kept = rows != 0
    for start in range(0, len(matrix), _BLOCK):
        part = slice(start, start + _BLOCK)
        changes = factor[part].T
        rows[part], moved = _in_order(
            *(rows[part], -changes[part], kept[part].astype("float32")),
            *(scales[order[part] // grid.group_size], None, grid),
        )
        for place in range(start + _BLOCK, len(matrix), _PANEL):
            later = slice(place, place + _PANEL)
            change = changes[later] @ moved
            change *= kept[later]
            rows[later] += change
    del factor
    rounded = np.empty_like(rows)
    rounded[order] = rows
    return rounded


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
        matrix: float32 array of shape `(K, R)`, the matrix W.
        rounded: float32 array of the same shape, W', on the grid.
        scales: float32 array of shape `(G, R)`.
        second_moment: float32 array of shape `(K, K)`, H, with a positive
            diagonal.
        grid: `Grid`.
        sweeps: Int, at most how often. It ends when a sweep changes nothing.
            Defaults to `3`.

    Returns:
        Pair of arrays, the new W' and the new scales.
    """
    h = second_moment
    rounded, scales = rounded.copy(), scales.copy()
    inverse = 1 / h.diagonal()[:, None]
    c = h @ (matrix - rounded)
    for _ in range(sweeps):
        has_changed = False
        for group, start in enumerate(range(0, len(matrix), grid.group_size)):
            part = slice(start, start + grid.group_size)
            own, values = h[part, part], rounded[part]
            integers = np.rint(values / scales[group])
            curvature = np.sum(integers * (own @ integers), axis=0)
            slope = np.sum(integers * c[part], axis=0)
            best = scales[group] + slope / np.maximum(curvature, _TINY)
            usable = (curvature > _TINY) & (np.abs(best) > _TINY)
            best = grid.rounded_scales(np.where(usable, best, scales[group]))
            rescaled = integers * best
            slopes = c[part] - own @ (rescaled - values)
            new, _ = _in_order(
                rescaled + slopes * inverse[part],
                own * inverse[part],
                (matrix[part] != 0).astype("float32"),
                np.broadcast_to(best, values.shape),
                rescaled,
                grid,
            )
            change = new - values
            if change.any():
                has_changed = True
                c -= h[:, part] @ change
            rounded[part], scales[group] = new, best
        if not has_changed:
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
    w = _array(matrix)
    if second_moment is None:
        scales = search_scales(w, np.ones(len(w), "float32"), grid)
        values = grid.nearest(w, grid.spread(scales, len(w)))
    else:
        h = _array(second_moment)
        # Only ratios of H matter. With large inputs sums would overflow, and
        # with small ones they would count as zero.
        _, exponent = np.frexp(h.diagonal().max())
        diagonal = np.ldexp(h.diagonal(), -exponent)
        diagonal += damping * diagonal.mean() or 1.0
        scales = search_scales(w, diagonal, grid)
        values = gptq(w, scales, h, grid, damping)
        nearest = grid.nearest(w, grid.spread(scales, len(w)))
        h = np.ldexp(h, -exponent)
        h[np.diag_indices_from(h)] = diagonal
        # The loss of GPTQ on weights that are not kept may make a unit worse.
        is_better = _errors(w, values, h) < _errors(w, nearest, h)
        values = np.where(is_better, values, nearest)
        del nearest
        values, scales = descend(w, values, scales, h, grid)
    return Rounded(*map(backend.current().tensor_of, (values, scales)))


def _array(tensor: Any) -> Any:
    tensor = ops.convert_to_tensor(tensor)
    array = backend.current().array_of(tensor)
    return np.ascontiguousarray(array, "float32")


def _to_float32(square: Any) -> Any:
    """Return a float64 array of `(K, K)` in float32, in half of its memory.

    With a wide kernel a copy beside it would take hundreds of megabytes.
    """
    size = len(square)
    flat = square.view("float32").reshape(-1)
    for i in range(size):
        flat[i * size : (i + 1) * size] = square[i]
    del flat
    square.resize(size * size // 2 + 1, refcheck=False)
    return square.view("float32")[: size * size].reshape(size, size)


def _errors(w: Any, rounded: Any, h: Any) -> Any:
    rest = w - rounded
    return np.sum(rest * (h @ rest), axis=0)


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
        targets, kept, scales: float32 arrays of shape `(rows, R)`.
        coupling: float32 array of shape `(rows, rows)`.
        before: What the result moves from, or None: from what is rounded.
        grid: `Grid`.

    Returns:
        Pair of arrays, the multiples and `moved`.
    """
    rounded, moved = np.empty_like(targets), np.empty_like(targets)
    if library := native.library():
        given = targets, coupling, kept, scales, before
        arrays = [x if x is None else np.ascontiguousarray(x) for x in given]
        library.kwm_round_in_order(
            *(x if x is None else x.ctypes.data for x in arrays),
            *(*targets.shape, grid.low, grid.high),
            *(rounded.ctypes.data, moved.ctypes.data),
        )
        return rounded, moved
    for i, target in enumerate(targets):
        target = (target - coupling[i, :i] @ moved[:i]) * kept[i]
        rounded[i] = grid.nearest(target, scales[i])
        moved[i] = rounded[i] - (target if before is None else before[i])
    return rounded, moved
