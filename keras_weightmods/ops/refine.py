"""What to do with a matrix that is pruned already: better masks and weights.

A matrix W is (K, R): K inputs, R units, pruned to W' by any method. The inputs
are known by their second moment `H = X^T X / rows`, of shape (K, K). The error
of a unit with the weights w and w' is `e = r^T H r`, with `r = w - w'`; its
slope is -2 c, with `c = H r`.
"""

import functools
from typing import Any

import keras
from keras import ops

from keras_weightmods import backend
from keras_weightmods.ops.nm import (
    Pattern,
    nm_mask,
    nm_violations,
    parse_pattern,
)
from keras_weightmods.utils import checks

# Inputs after which `c` is updated for all others, by one large product.
_BLOCK = 128

# What float32 does not resolve is no improvement.
_ROUNDING = 1e-6


def swap_mask(
    dense: Any,
    pruned: Any,
    second_moment: Any,
    pattern: Pattern = "2:4",
    sweeps: int = 4,
) -> Any:
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
        dense: Float tensor of shape `(K, R)`, the matrix W.
        pruned: Float tensor of the same shape, W'; exactly n:m.
        second_moment: Tensor of shape `(K, K)`, H.
        pattern: String `"n:m"`, n weights kept in every group of m inputs, or
            a pair of ints; m divides K. Defaults to `"2:4"`.
        sweeps: Int, at most how often to go through the groups. It ends when
            a sweep changes nothing. Defaults to `4`.

    Returns:
        Tensor of the shape and dtype of `pruned`; exactly n:m, with no unit's
        error increased, but for rounding.

    Raises:
        ValueError: If an argument is outside the ranges above, the shapes do
            not fit, or `pruned` is not n:m.

    Example:

    ```python
    import numpy as np
    from keras_weightmods.ops.refine import swap_mask

    w = np.array([[3.0], [2.0]], "float32")
    pruned = np.array([[3.0], [0.0]], "float32")
    h = np.array([[1.0, 0.5], [0.5, 9.0]])
    swapped = np.array(swap_mask(w, pruned, h, "1:2"))
    # 2 is kept, and makes up for the 3 that is removed.
    assert np.allclose(swapped, [[0.0], [2.0 + 3.0 * 0.5 / 9.0]])
    ```
    """
    checks.check_int("sweeps", sweeps, 1)
    w, weights, h = _float32(dense, pruned, second_moment)
    n, m = _checked_pattern(weights, pattern)
    return ops.cast(_swept(w, weights, h, n, m, sweeps), _dtype(pruned))


def refit(
    dense: Any,
    pruned: Any,
    second_moment: Any,
    damping: float = 0.01,
    iterations: int = 10,
) -> Any:
    """Fit the weights that are left to the outputs of the dense matrix.

    Minimizes `tr((W - W')^T (H + d I) (W - W'))` over the nonzero weights of
    W', d being `damping` times the mean of H's diagonal, by conjugate
    gradients on all units at once, with the diagonal as preconditioner: the
    update of the weights in ALPS (arXiv 2406.07831). Where H
    does not matter, weights go to their dense values.

    Args:
        dense: Float tensor of shape `(K, R)`, the matrix W.
        pruned: Float tensor of the same shape, W', where it starts.
        second_moment: Tensor of shape `(K, K)`, H.
        damping: Float > 0. Defaults to `0.01`.
        iterations: Int, products of H with a matrix of shape `(K, R)`.
            Defaults to `10`.

    Returns:
        Tensor of the shape and dtype of `pruned`. Zeros stay zero, and no
        unit's damped error increases, but for rounding.

    Raises:
        ValueError: If an argument is outside the ranges above, or the shapes
            do not fit.

    Example:

    ```python
    import numpy as np
    from keras_weightmods.ops.refine import refit

    w = np.array([[3.0], [2.0]], "float32")
    pruned = np.array([[3.0], [0.0]], "float32")
    h = np.array([[1.0, 0.5], [0.5, 1.0]])
    fitted = np.array(refit(w, pruned, h, damping=1e-6))
    assert np.allclose(fitted, [[3.0 + 2.0 * 0.5], [0.0]], atol=1e-4)
    ```
    """
    damping = checks.check_float("damping", damping, above=0)
    checks.check_int("iterations", iterations, 1)
    w, weights, h = _float32(dense, pruned, second_moment)
    fitted = _fitted(w, weights, damped(h, damping), iterations)
    return ops.cast(fitted, _dtype(pruned))


def refined(
    dense: Any,
    pruned: Any,
    second_moment: Any,
    pattern: Pattern = "2:4",
    damping: float = 0.01,
    rounds: int = 1,
    sweeps: int = 2,
    iterations: int = 10,
) -> Any:
    """Alternate `swap_mask` and `refit`, both for the damped second moment.

    Args:
        dense, pruned, second_moment, pattern: As in `swap_mask`.
        damping: As in `refit`.
        rounds: Int, how often to do both. Defaults to `1`.
        sweeps: Int, those of `swap_mask` in each round. Defaults to `2`.
        iterations: Int, those of `refit` in each round. Defaults to `10`.

    Returns:
        Tensor of the shape and dtype of `pruned`; exactly n:m.

    Raises:
        ValueError: As `swap_mask` and `refit`.

    Example:

    ```python
    import numpy as np
    from keras_weightmods.ops import nm_project
    from keras_weightmods.ops.refine import refined
    from keras_weightmods.ops.sparsegpt import reconstruction_error

    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 8)) @ rng.normal(size=(8, 8))
    h = (x.T @ x / 64).astype("float32")
    w = rng.normal(size=(8, 3)).astype("float32")
    pruned = nm_project(w, "2:4")
    before, _ = reconstruction_error(w, pruned, h)
    after, _ = reconstruction_error(w, refined(w, pruned, h, "2:4"), h)
    assert after < before
    ```
    """
    damping = checks.check_float("damping", damping, above=0)
    checks.check_int("rounds", rounds, 1)
    checks.check_int("sweeps", sweeps, 1)
    checks.check_int("iterations", iterations, 1)
    w, weights, h = _float32(dense, pruned, second_moment)
    n, m = _checked_pattern(weights, pattern)
    h = damped(h, damping)
    for _ in range(rounds):
        weights = _swept(w, weights, h, n, m, sweeps)
        weights = _fitted(w, weights, h, iterations)
    return ops.cast(weights, _dtype(pruned))


def _swept(w: Any, weights: Any, h: Any, n: int, m: int, sweeps: int) -> Any:
    size = len(w)
    step = _compiled_swap()
    diagonal = ops.diagonal(h)
    # Where it is zero no swap to this weight is an improvement.
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
            stop = min(start + length, size)
            own = h[start:stop, start:stop]
            block_c, block = c[start:stop], []
            for row in range(start, stop, m):
                group = slice(row, row + m)
                new, block_c = step(
                    weights[group],
                    w[group],
                    inverse[group],
                    own[:, row - start : row - start + m],
                    block_c,
                    row - start,
                    n,
                )
                block.append(new)
            swept.append(ops.concatenate(block))
            change = swept[-1] - weights[start:stop]
            c = c - ops.matmul(h[:, start:stop], change)
        weights = ops.concatenate(swept)
        if not bool(ops.any(ops.not_equal(weights, before))):
            break
    return weights


def _swap(
    weights: Any,
    dense: Any,
    inverse: Any,
    columns: Any,
    c: Any,
    start: Any,
    n: int,
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
    # By magnitude: the zeros of a group that has too many are kept ones.
    kept = nm_mask(weights, (n, m), axis=0)
    free = ops.logical_and(kept, ops.equal(weights, 0))
    itself = ops.cast(ops.eye(m), "bool")[:, :, None]
    allowed = ops.logical_or(
        ops.logical_and(kept[:, None], ops.logical_not(kept)[None]),
        ops.logical_and(free[:, None], itself),
    )
    diagonal = ops.diagonal(own)[:, None]
    price = weights * (2.0 * slope + weights * diagonal)
    # Of q, when p is removed: axes p, q, units.
    slopes = slope[None] + weights[:, None] * own[:, :, None]
    values = slopes * inverse
    change = price[:, None] - (1.0 - _ROUNDING) * slopes * values
    change = ops.reshape(ops.where(allowed, change, 0.0), (m * m, units))
    best = ops.argmin(change, axis=0)[None]
    improves = ops.min(change, axis=0) < 0
    values = ops.where(inverse > 0, values, dense[None])
    values = ops.reshape(values, (m * m, units))
    value = ops.take_along_axis(values, best, axis=0)
    rows = ops.cast(ops.arange(m), best.dtype)[:, None]
    new = ops.where(ops.equal(rows, best // m), 0.0, weights)
    new = ops.where(ops.equal(rows, best % m), value, new)
    new = ops.where(improves, new, weights)
    return new, c - ops.matmul(columns, new - weights)


@functools.cache
def _compiled_swap() -> Any:
    """One program for a shape, where each op of `_swap` would be one."""
    return backend.current().compiled(_swap, static=(6,))


def _fitted(w: Any, weights: Any, h: Any, iterations: int) -> Any:
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
    """0 where a unit is fitted already."""
    tiny = 1e-30
    return ops.where(b > tiny, a / ops.maximum(b, tiny), 0.0)


def damped(h: Any, damping: float) -> Any:
    """As in `inverse_factor`."""
    mean = ops.mean(ops.diagonal(h))
    d = ops.where(mean > 0, damping * mean, ops.ones_like(mean))
    return h + d * ops.eye(h.shape[0], dtype="float32")


def _float32(dense: Any, pruned: Any, second_moment: Any) -> list[Any]:
    tensors = map(ops.convert_to_tensor, (dense, pruned, second_moment))
    w, weights, h = [ops.cast(x, "float32") for x in tensors]
    fits = w.shape == weights.shape and len(w.shape) == 2
    if not fits or tuple(h.shape) != (w.shape[0], w.shape[0]):
        raise ValueError(
            "`dense` and `pruned` must be matrices of one shape, and "
            "`second_moment` must have a row and a column for each of their "
            f"inputs. Received: dense.shape={tuple(w.shape)}, "
            f"pruned.shape={tuple(weights.shape)}, "
            f"second_moment.shape={tuple(h.shape)}"
        )
    return [w, weights, h]


def _checked_pattern(weights: Any, pattern: Pattern) -> tuple[int, int]:
    n, m = parse_pattern(pattern)
    if violations := int(nm_violations(weights, (n, m))):
        raise ValueError(
            f"`pruned` must be {n}:{m} along its first axis. Received: "
            f"{violations} groups with more than {n} nonzeros"
        )
    return n, m


def _dtype(pruned: Any) -> str:
    return keras.backend.standardize_dtype(ops.convert_to_tensor(pruned).dtype)
