"""Better masks and weights for a matrix that is already pruned.

A matrix W is (K, R): K inputs, R units, pruned to W' by any method. The inputs
are known by their second moment `H = X^T X / rows`, of shape (K, K). The error
of a unit with the weights w and w' is `e = r^T H r`, with `r = w - w'`; its
slope is -2 c, with `c = H r`.
"""

import functools
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_weightmods import backend, native
from keras_weightmods.ops.nm import (
    Pattern,
    nm_violations,
    parse_pattern,
)

# After so many inputs, one large product updates `c` for all others.
_BLOCK = 128

# The most pairs of weights that are compared at a time. They stay in a cache.
_PAIRS = 2**19

# A change that float32 does not resolve is no improvement.
_ROUNDING = 1e-6

_SWEEPS, _ITERATIONS = 2, 10


def refined(
    dense: Any,
    pruned: Any,
    second_moment: Any,
    pattern: Pattern = "2:4",
    damping: float = 0.01,
) -> Any:
    """Swap weights of a pruned matrix, then fit those that are left.

    By `swap_mask`, then by `refit`, both for the damped second moment.

    Args:
        dense: Float tensor of shape `(K, R)`, the matrix W.
        pruned: Float tensor of the same shape, W'; exactly n:m.
        second_moment: Tensor of shape `(K, K)`, H.
        pattern: String `"n:m"`, n weights kept in every group of m inputs, or
            a pair of ints; m divides K. Defaults to `"2:4"`.
        damping: Float > 0, the share of the mean of H's diagonal that is
            added to it. Defaults to `0.01`.

    Returns:
        Tensor of the shape and dtype of `pruned`; exactly n:m, with no unit's
        damped error increased, but for rounding.

    Raises:
        ValueError: If `pruned` is not n:m, or has another shape than `dense`.

    Example:

    ```python
    import numpy as np
    from keras_weightmods.ops import nm_project
    from keras_weightmods.ops.refine import refined
    from keras_weightmods.ops.sparsegpt import output_energy

    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 8)) @ rng.normal(size=(8, 8))
    h = (x.T @ x / 64).astype("float32")
    w = rng.normal(size=(8, 3)).astype("float32")
    pruned = nm_project(w, "2:4")
    change = w - np.array(refined(w, pruned, h, "2:4"))
    assert output_energy(change, h) < output_energy(w - np.array(pruned), h)
    ```
    """
    tensors = map(ops.convert_to_tensor, (dense, pruned, second_moment))
    w, weights, h = [ops.cast(x, "float32") for x in tensors]
    if w.shape != weights.shape:
        raise ValueError(
            "`dense` must be of the shape of `pruned`, "
            f"{tuple(weights.shape)}. Received: shape {tuple(w.shape)}"
        )
    n, m = parse_pattern(pattern)
    if violations := int(nm_violations(weights, (n, m))):
        raise ValueError(
            f"`pruned` must be {n}:{m} along its first axis. Received: "
            f"{violations} groups with more than {n} nonzeros"
        )
    h = damped(h, damping)
    weights = swap_mask(w, weights, h, n, m, _SWEEPS)
    weights = refit(w, weights, h, _ITERATIONS)
    dtype = ops.convert_to_tensor(pruned).dtype
    return ops.cast(weights, keras.backend.standardize_dtype(dtype))


def swap_mask(w: Any, weights: Any, h: Any, n: int, m: int, sweeps: int) -> Any:
    """Swap kept weights for removed ones of the same group.

    Removing the weight p and setting the removed weight q to its best value,
    `v = (c_q + w'_p H_pq) / H_qq`, changes the error of a unit by

        2 w'_p c_p + w'_p**2 H_pp - (c_q + w'_p H_pq)**2 / H_qq

    A sweep goes through the groups in order; in each, every unit makes the
    swap that lowers its error most, if one does, and `c` is updated. After
    SparseSwaps (arXiv 2512.10922), but cyclic over the groups and with q set
    to its best value.

    A kept weight of 0 is swapped for any other of its group, or itself. An
    input whose variance float32 does not resolve never improves a unit; a
    weight of such an input comes back as it was.

    Args:
        w, weights: float32 tensors of shape `(K, R)`, W and W', which is n:m.
        h: float32 tensor of shape `(K, K)`, H.
        n, m: Ints; m divides K.
        sweeps: Int, at most how often to go through the groups. It ends when
            a sweep changes nothing.

    Returns:
        float32 tensor of shape `(K, R)`, n:m.
    """
    size, units = w.shape
    if units > (most := max(1, _PAIRS // m**2)):
        swapped = []
        for start in range(0, units, most):
            part = w[:, start : start + most], weights[:, start : start + most]
            swapped.append(swap_mask(*part, h, n, m, sweeps))
        return ops.concatenate(swapped, axis=1)
    diagonal = ops.diagonal(h)
    # If it is zero, no swap to this weight is an improvement.
    inverse = ops.where(
        diagonal > _ROUNDING * ops.mean(diagonal),
        1.0 / ops.maximum(diagonal, 1e-30),
        0.0,
    )[:, None]
    length = max(m, _BLOCK // m * m)
    c = ops.matmul(h, w - weights)
    for _ in range(sweeps):
        before = weights
        swept = []
        for start in range(0, size, length):
            block = slice(start, min(start + length, size))
            given = weights[block], w[block], h[block, block], inverse[block]
            swept.append(_swap_block(*given, c[block], n, m))
            change = swept[-1] - weights[block]
            c = c - ops.matmul(h[:, block], change)
        weights = ops.concatenate(swept)
        if not bool(ops.any(ops.not_equal(weights, before))):
            break
    return weights


def _swap_block(
    weights: Any, dense: Any, own: Any, inverse: Any, c: Any, n: int, m: int
) -> Any:
    """Make the best swaps in one group after the other."""
    size, units = weights.shape
    if arrays := host_arrays(weights, dense, own, inverse, c):
        slope, new = arrays.pop().copy(), np.empty((size, units), "float32")
        native.library().kwm_swap_in_order(
            *(x.ctypes.data for x in arrays),
            *(size, units, m, n, slope.ctypes.data, new.ctypes.data),
        )
        return backend.current().tensor_of(new)
    step = compiled(_swap, 6)
    swapped = []
    for start in range(0, size, m):
        group = slice(start, start + m)
        parts = weights[group], dense[group], inverse[group], own[:, group]
        new, c = step(*parts, c, start, n)
        swapped.append(new)
    return ops.concatenate(swapped)


def host_arrays(*tensors: Any) -> list[Any]:
    """Return tensors as float32 arrays, for a compiled function.

    The list is empty where there is none for them: without the library, on
    another device than the CPU, and for more than `_BLOCK` rows.
    """
    if native.library() is None or tensors[0].shape[0] > _BLOCK:
        return []
    views = [backend.current().view_of(each) for each in tensors]
    if any(view is None for view in views):
        return []
    return [np.ascontiguousarray(view, "float32") for view in views]


def _swap(
    weights: Any, dense: Any, inverse: Any, columns: Any, c: Any, start: Any, n
) -> tuple[Any, Any]:
    """Make the best swap of each unit in one group.

    Args:
        weights, dense: Tensors of shape `(m, R)`.
        inverse: Tensor of shape `(m, 1)`, one over the diagonal of H.
        columns: Tensor of shape `(block, m)`, of H.
        c: Tensor of shape `(block, R)`.
        start: Int, the first row of the group in the block.
        n: Int, weights kept.

    Returns:
        Pair of tensors, the new weights and the new `c`.
    """
    m, units = weights.shape
    own = ops.slice(columns, (start, 0), (m, m))
    slope = ops.slice(c, (start, 0), (m, units))
    # In a group with too many zeros, the first of these are kept.
    zero = ops.equal(weights, 0)
    count = ops.cumsum(ops.cast(zero, "int32"), axis=0)
    free = ops.logical_and(zero, count <= count[-1] + n - m)
    kept = ops.logical_or(ops.logical_not(zero), free)
    # What a new weight q gains if p is removed is a square, with axes p, q,
    # units. Few passes over these are most of the time.
    root = ops.sqrt(inverse)
    scaled = slope * root
    roots = scaled + weights[:, None] * (own * root[:, 0])[:, :, None]
    roots = roots * ops.cast(ops.logical_not(kept), "float32")
    gains = ops.max(ops.square(roots), axis=1)
    gains = ops.where(free, ops.maximum(gains, ops.square(scaled)), gains)
    price = weights * (2.0 * slope + weights * ops.diagonal(own)[:, None])
    change = ops.where(kept, price - (1.0 - _ROUNDING) * gains, 0.0)
    best, places = ops.argmin(change, axis=0), ops.arange(m)[:, None]
    improves = ops.min(change, axis=0) < 0
    removed = ops.equal(places, ops.cast(best, places.dtype))
    weight = ops.take_along_axis(weights, best[None], axis=0)
    slopes = slope + weight * ops.transpose(ops.take(own, best, axis=0))
    values = slopes * inverse
    allowed = ops.where(removed, free, ops.logical_not(kept))
    gains = ops.where(allowed, slopes * values, -1.0)
    added = ops.equal(places, ops.cast(ops.argmax(gains, axis=0), places.dtype))
    # Where a group keeps all, a weight may go and none can come.
    added = ops.logical_and(added, allowed)
    values = ops.where(inverse > 0, values, dense)
    new = ops.where(removed, 0.0, weights)
    new = ops.where(added, values, new)
    new = ops.where(improves, new, weights)
    return new, c - ops.matmul(columns, new - weights)


def refit(w: Any, weights: Any, h: Any, iterations: int) -> Any:
    """Fit the weights that are left to the outputs of the dense matrix.

    Minimizes `tr((W - W')^T H (W - W'))` over the nonzero weights of W' by
    conjugate gradients on all units at once, with the diagonal as
    preconditioner: the update of the weights in ALPS (arXiv 2406.07831).

    Args:
        w, weights: float32 tensors of shape `(K, R)`, W and W', where it
            starts.
        h: float32 tensor of shape `(K, K)`, H, with a positive diagonal.
        iterations: Int, products of H with a matrix of shape `(K, R)`.

    Returns:
        float32 tensor of shape `(K, R)`. Zeros stay zero, and no unit's error
        increases, but for rounding.
    """
    left = ops.cast(ops.not_equal(weights, 0), "float32")
    preconditioner = 1.0 / ops.diagonal(h)[:, None]
    rest = ops.matmul(h, w - weights) * left
    direction = scaled = rest * preconditioner
    size = ops.sum(rest * scaled, axis=0)
    for _ in range(iterations):
        product = ops.matmul(h, direction) * left
        step = _ratio(size, ops.sum(direction * product, axis=0))
        weights = weights + step * direction
        rest = rest - step * product
        scaled = rest * preconditioner
        last, size = size, ops.sum(rest * scaled, axis=0)
        direction = scaled + _ratio(size, last) * direction
    return weights


def _ratio(a: Any, b: Any) -> Any:
    """Return a / b, 0 if a unit is already fitted."""
    tiny = 1e-30
    return ops.where(b > tiny, a / ops.maximum(b, tiny), 0.0)


def damped(h: Any, damping: float) -> Any:
    """Damp a second moment as `inverse_factor` does."""
    mean = ops.mean(ops.diagonal(h))
    d = ops.where(mean > 0, damping * mean, ops.ones_like(mean))
    return h + d * ops.eye(h.shape[0], dtype="float32")


@functools.cache
def compiled(function: Any, *static: int) -> Any:
    """Return a function that is one program for each shape, but on torch."""
    return backend.current().compiled(function, static)
