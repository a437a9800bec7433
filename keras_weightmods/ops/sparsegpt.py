"""One-shot N:M pruning of a matrix, for the moments of its inputs.

A matrix is (K, R): K inputs, R units. Its inputs are known by their second
moment `H = X^T X / rows`, of shape (K, K).
"""

import numpy as np
from keras import ops

from keras_weightmods import backend, native
from keras_weightmods.ops.nm import check_groups, nm_mask, parse_pattern
from keras_weightmods.ops.refine import compiled, host_arrays

# After so many inputs, one large product updates all others.
_BLOCK = 128
# The rows of a matrix that change at a time.
_PANEL = 1024


def wanda(matrix, norms, pattern="2:4"):
    """Keeps the n largest `|W_ij| * ||x_j||` in every group of m inputs.

    Equation 1 of Wanda (arXiv 2306.11695), with the groups of its N:M form.

    Args:
        matrix: Float tensor of shape `(K, R)`.
        norms: Array of shape `(K,)`, the norm of each input over the
            calibration rows; only their ratios matter. If all are zero, every
            input counts alike.
        pattern: String `"n:m"`, n weights kept in every group of m inputs, or
            a pair of ints; m divides K. Defaults to `"2:4"`.

    Returns:
        Tensor of the shape and dtype of `matrix`; what is kept is unchanged.

    Raises:
        ValueError: As `keras_weightmods.ops.nm_mask`.

    Example:

    ```python
    import numpy as np
    from keras_weightmods.ops.sparsegpt import wanda

    matrix = np.array([[3.0], [2.0], [1.0], [1.0]], "float32")
    kept = wanda(matrix, np.array([1.0, 1.0, 1.0, 9.0]), "2:4")
    assert np.array(kept)[:, 0].tolist() == [3.0, 0.0, 0.0, 1.0]
    ```
    """
    matrix = ops.convert_to_tensor(matrix)
    norms = ops.cast(norms, matrix.dtype)
    norms = ops.where(ops.any(ops.not_equal(norms, 0)), norms, 1)
    scores = matrix * norms[:, None]
    mask = nm_mask(scores, pattern, axis=0)
    return ops.where(mask, matrix, ops.zeros_like(matrix))


def inverse_factor(second_moment, damping=0.01, order=None):
    """Factorizes the inverse of the damped second moment.

    `U` is upper triangular with `U^T U = (H + d I)^-1`, where d is `damping`
    times the mean of H's diagonal. `1 / U_jj**2` is the variance of input j
    that remains if the inputs after it are known. It is the cost of removing a
    weight of 1 there, if later weights make up for it (SparseGPT, arXiv
    2301.00774, section 3.2).

    An input that is always zero needs no special case. d makes it cheap to
    remove, and it is kept if its group has nothing better.

    Args:
        second_moment: Array of shape `(K, K)`, symmetric.
        damping: Float > 0. Defaults to `0.01`.
        order: Int array of shape `(K,)`, the order that the inputs are taken
            in. Defaults to `None`, for their own.

    Returns:
        Float64 NumPy array of shape `(K, K)`.

    Raises:
        ValueError: If `second_moment` is not finite.

    Example:

    ```python
    import numpy as np
    from keras_weightmods.ops.sparsegpt import inverse_factor

    h = np.array([[2.0, 1.0], [1.0, 2.0]])
    u = inverse_factor(h, damping=0.5)
    assert np.allclose(u.T @ u, np.linalg.inv(h + np.eye(2)))
    assert u[1, 0] == 0.0
    ```
    """
    # With wide kernels each copy of it takes hundreds of megabytes.
    if order is None:
        h = np.array(second_moment, "float64")
    else:
        h = np.empty(second_moment.shape, "float64")
        for row, place in zip(h, order):
            row[:] = second_moment[place, order]
    # A sum, because to look at each would take an eighth of the memory more.
    if not np.isfinite(h.sum()):
        raise ValueError(
            "The second moment of the inputs must be finite. Received: "
            f"{int((~np.isfinite(h)).sum())} entries of {h.size} that are NaN "
            "or infinite"
        )
    # If all inputs are zero, all weights are equally good.
    h[np.diag_indices_from(h)] += damping * h.diagonal().mean() or 1.0
    _factor_in_place(h)
    return h


def sparsegpt(matrix, factor, pattern="2:4"):
    """Prunes to N:M and lets the remaining weights make up for it.

    SparseGPT (arXiv 2301.00774, algorithm 1), in its N:M form, goes through the
    inputs in order. At the start of each group it keeps the n weights of each
    unit with the largest `w_j**2 / U_jj**2`. Row j of `U` spreads the error of
    each removed weight over all later inputs.

    Args:
        matrix: Float tensor of shape `(K, R)`.
        factor: Array of shape `(K, K)`, from `inverse_factor`.
        pattern: String `"n:m"`, n weights kept in every group of m inputs, or
            a pair of ints; m divides K. Defaults to `"2:4"`.

    Returns:
        Tensor of the shape and dtype of `matrix`.

    Raises:
        ValueError: If `pattern` is malformed, m does not divide K, or
            `factor` has another shape.

    Example:

    ```python
    import numpy as np
    from keras_weightmods.ops.sparsegpt import inverse_factor, sparsegpt

    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 8)) @ rng.normal(size=(8, 8))
    w = rng.normal(size=(8, 3)).astype("float32")
    pruned = np.array(sparsegpt(w, inverse_factor(x.T @ x), "2:4"))
    assert (np.count_nonzero(pruned.reshape(2, 4, 3), axis=1) == 2).all()
    # The weights that are left have changed.
    assert not np.isclose(pruned[pruned != 0], w[pruned != 0]).all()
    ```
    """
    n, m = parse_pattern(pattern)
    matrix = ops.convert_to_tensor(matrix)
    size, units = matrix.shape
    check_groups(size, m, matrix.shape)
    factor = np.asarray(factor, "float32")
    if factor.shape != (size, size):
        raise ValueError(
            f"`factor` must be of shape {(size, size)} for a `matrix` of shape "
            f"{tuple(matrix.shape)}. Received: shape {factor.shape}. Pass "
            "`inverse_factor` of the second moment of its inputs."
        )
    block = max(m, _BLOCK // m * m)
    tail = ops.cast(matrix, "float32")
    done = []
    for start in range(0, size, block):
        stop = min(start + block, size)
        head = ops.slice(tail, (0, 0), (stop - start, units))
        own = factor[start:stop, start:stop].copy()
        kept, errors = _pruned_block(head, own, n, m)
        done.append(kept)
        if stop < size:
            rest = ops.slice(tail, (stop - start, 0), (size - stop, units))
            spread = _transposed(factor[start:stop, stop:])
            tail = rest - ops.matmul(spread, errors)
    return ops.cast(ops.concatenate(done), matrix.dtype)


def output_energy(matrix, second_moment):
    """Return `|X W|^2`, over the rows of X.

    Args:
        matrix: float32 tensor of shape `(K, R)`, W. For what pruning changes,
            the difference of two matrices.
        second_moment: Tensor of shape `(K, K)`.

    Returns:
        Float.

    Example:

    ```python
    import numpy as np
    from keras_weightmods.ops.sparsegpt import output_energy

    w = np.ones((2, 1), "float32")
    assert output_energy(w, np.eye(2, dtype="float32")) == 2.0
    ```
    """
    matrix = ops.convert_to_tensor(matrix)
    product = ops.matmul(second_moment, matrix)
    return float(ops.convert_to_numpy(ops.sum(matrix * product)))


def _pruned_block(block, factor, n, m):
    """Return pruned rows, and their scaled errors.

    Args:
        block: float32 tensor of shape `(rows, R)`.
        factor: Contiguous float32 array of shape `(rows, rows)`.
        n, m: Ints; m divides the rows.
    """
    size, units = block.shape
    if arrays := host_arrays(block):
        pruned, scaled = np.empty((2, size, units), "float32")
        native.library().kwm_prune_in_order(
            *(x.ctypes.data for x in (*arrays, factor)),
            *(size, units, m, n, pruned.ctypes.data, scaled.ctypes.data),
        )
        return [backend.current().tensor_of(x) for x in (pruned, scaled)]
    step = compiled(_pruned_group, 2)
    kept, errors = [], []
    for start in range(0, size, m):
        rows = factor[start : start + m]
        own = ops.convert_to_tensor(rows[:, start : start + m].copy())
        group = ops.slice(block, (start, 0), (m, units))
        pruned, scaled = step(group, own, n)
        kept.append(pruned)
        errors.append(scaled)
        if start + m < size:
            # Zero to the left of the group: finished inputs do not change.
            block = block - ops.matmul(_transposed(rows), scaled)
    return ops.concatenate(kept), ops.concatenate(errors)


def _pruned_group(group, factor, n):
    """Return the pruned rows of a group, and their scaled errors."""
    m = group.shape[0]
    roots = ops.diagonal(factor)[:, None]
    mask = nm_mask(group / roots, (n, m), axis=0)
    removed = ops.cast(ops.logical_not(mask), "float32")
    # The changes of later rows for an error of 1 in a row.
    later = (factor / roots - ops.eye(m, dtype="float32"))[:, :, None]

    def spread(i, group):
        return group - later[i] * (group[i] * removed[i])

    group = ops.fori_loop(0, m, spread, group)
    return ops.where(mask, group, 0.0), group * removed / roots


def _transposed(rows):
    """Return the transpose as a contiguous tensor."""
    return ops.convert_to_tensor(np.ascontiguousarray(rows.T))


def _factor_in_place(h):
    """Replace H by the upper triangular U with `U^T U = H^-1`.

    H is [[A, B], [B^T, C]], and U^-1 = [[R, S], [0, T]] with C = T T^T,
    B = S T^T and A - S S^T = R R^T. By halves it takes hardly more than H.
    """
    size = len(h)
    if size <= 64:
        # Reversed, the Cholesky factor is upper.
        r = np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
        h[...] = np.triu(np.linalg.inv(r))
        return
    half = size // 2
    first, last, s = h[:half, :half], h[half:, half:], h[:half, half:]
    # B^T is not needed. It has the products meanwhile, transposed.
    free = h[half:, :half]
    _factor_in_place(last)
    np.matmul(last, s.T, out=free)
    for start in range(0, half, _PANEL):
        panel = slice(start, start + _PANEL)
        first[panel] -= free[:, panel].T @ free
    _factor_in_place(first)
    np.matmul(free.T, last, out=s)
    np.matmul(s.T, first.T, out=free)
    np.negative(free.T, out=s)
    free[...] = 0
