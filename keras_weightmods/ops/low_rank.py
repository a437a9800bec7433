"""The best low-rank approximation of a matrix, exact enough to rank entries.

Randomized decompositions with a few power iterations are not offered. The
spectra of language models are flat, and half of the entries that they rank
first are wrong.
"""

import math

import numpy as np
from keras import ops

METHODS = ("auto", "gram", "krylov", "exact")

# Below this size the eigendecomposition of the Gram matrix takes less time
# than the many small products of the Krylov method.
_LARGE = 1024
# The mask has settled once it agrees with the mask from a smaller Krylov space
# on the share `_SETTLED` of a sample. The smaller space lacks the last blocks,
# a share `_LEFT_OUT` and at least `_BLOCKS_LEFT_OUT`. The method converges
# faster than linearly, so later blocks would change less than these did.
_SETTLED = 0.985
_LEFT_OUT = 0.08
_BLOCKS_LEFT_OUT = 2
_SAMPLE = 2**17
# How much larger the next space is, for the share that is missing.
_GROWTH = 2.8
# Blocks in a space of the rank. More blocks are narrower, so products are
# slower, but need a smaller space.
_BLOCKS_PER_RANK = 4
# Products with a matrix are fastest if the other side is a multiple of this.
_LANES = 16


def low_rank_factors(matrix, rank, method, seed=0, share=0.05):
    """Return factors of the best approximation of a matrix of a given rank.

    Args:
        matrix: Tensor of shape `(m, n)`.
        rank: Int, at most `min(m, n)`.
        method: As in `principal_mask`, but for `"auto"`.
        seed: Int, of the random start. Defaults to 0.
        share: Float, the share of entries whose places must have settled, for
            `"krylov"`. Defaults to 0.05.

    Returns:
        Pair of tensors of shapes `(m, rank)` and `(rank, n)`, whose product is
        the approximation. The columns of the first are orthonormal where
        `m <= n`, the rows of the second elsewhere.

    Example:

    ```python
    import numpy as np
    from keras_weightmods.ops.low_rank import low_rank_factors

    x = np.random.default_rng(0).normal(size=(30, 20)).astype("float32")
    left, right = low_rank_factors(x, 20, "gram")
    assert np.allclose(np.array(left) @ np.array(right), x, atol=1e-4)
    ```
    """
    rows, columns = matrix.shape
    if method == "exact":
        u, s, vh = ops.linalg.svd(matrix, full_matrices=False)
        u, s, vh = u[:, :rank], s[:rank], vh[:rank]
        return (u, s[:, None] * vh) if rows <= columns else (u * s, vh)
    found = None
    if method == "krylov":
        found = _krylov_basis(matrix, rank, seed, share)
    basis, image = found or _gram_basis(matrix, rank)
    if rows <= columns:
        return ops.transpose(basis), image
    return ops.transpose(image), basis


def choose_method(method, rows, columns, rank):
    """Return the method that `"auto"` stands for, and any other unchanged."""
    if method != "auto":
        return method
    side = min(rows, columns)
    return "krylov" if side > _LARGE and 8 * rank <= side else "gram"


def _gram_basis(matrix, rank):
    """Return the leading directions of the smaller side, and their images.

    Both are rows. They come from the Gram matrix of that side.
    """
    rows, columns = matrix.shape
    wide = matrix if rows <= columns else ops.transpose(matrix)
    vectors = _eigenvectors(ops.matmul(wide, ops.transpose(wide)))
    basis = ops.transpose(vectors[:, -rank:])
    return basis, ops.matmul(basis, wide)


def _eigenvectors(gram):
    """Return the eigenvectors as columns, the largest eigenvalue last."""
    try:
        _, vectors = ops.linalg.eigh(gram)
    except RuntimeError:
        # In float32 torch's solver gives up on some matrices of low rank.
        found = ops.convert_to_numpy(gram).astype("float64")
        _, vectors = np.linalg.eigh(found)
        vectors = ops.cast(ops.convert_to_tensor(vectors), gram.dtype)
    return vectors


def _krylov_basis(matrix, rank, seed, share):
    """Do the same by block Lanczos; None if half the space was not enough.

    With the rows of Q an orthonormal basis of the Krylov space of `W W^T` and
    P = Q W, the best approximation within it comes from the eigenvectors of
    `P P^T`.
    """
    rows, columns = matrix.shape
    side = min(rows, columns)
    generator = np.random.default_rng(seed)
    places = _sample(generator, side), _sample(generator, max(rows, columns))
    width = max(2, -(-rank // _BLOCKS_PER_RANK))
    if width > _LANES:
        width = -(-width // _LANES) * _LANES
    noise = generator.normal(size=(width, side)).astype("float32")
    block = ops.convert_to_tensor(noise)

    check = max(2 * rank, (_BLOCKS_LEFT_OUT + 1) * width)
    if 2 * check > side:
        return None
    # Keep both orders: a product with few vectors takes half as long if the
    # matrix lies in memory as it is read. `transpose` on torch is a view, so
    # use `concatenate`.
    flipped = ops.concatenate([ops.transpose(matrix)], axis=0)
    both = flipped, matrix
    forth, back = both if rows <= columns else both[::-1]

    basis = ops.zeros((0, side), "float32")  # Q
    image = ops.zeros((0, max(rows, columns)), "float32")  # P
    gram = ops.zeros((0, 0), "float32")  # P P^T
    near: list = []
    while True:
        blocks: list = []
        images: list = []
        while basis.shape[0] + len(blocks) * width < check:
            block = _orthonormal(block, near, [basis, *blocks])
            blocks.append(block)
            images.append(ops.transpose(_inner(forth, block)))
            near = [*near[-1:], block]
            block = ops.transpose(_inner(back, images[-1]))
        basis = ops.concatenate([basis, *blocks], axis=0)
        new = ops.concatenate(images, axis=0)
        image = ops.concatenate([image, new], axis=0)
        border = _inner(image, new)
        upper = ops.concatenate([gram, border[: gram.shape[0]]], axis=1)
        gram = ops.concatenate([upper, ops.transpose(border)], axis=0)
        found = basis.shape[0]
        vectors = _eigenvectors(gram)
        vectors = ops.transpose(vectors[:, -rank:])
        left_out = round(_LEFT_OUT * found / width)
        left_out = width * max(_BLOCKS_LEFT_OUT, left_out)
        sides = ops.take(basis, places[0], 1), ops.take(image, places[1], 1)
        full, short = (
            _sample_mask(vectors, *sides, size, share)
            for size in (found, found - left_out)
        )
        agreement = np.count_nonzero(full & short) / np.count_nonzero(full)
        if agreement >= _SETTLED:
            return ops.matmul(vectors, basis), ops.matmul(vectors, image)
        if 2 * found > side:
            return None
        # Fitted to the way the missing share shrinks in trained and random
        # matrices. It seldom goes too far, and rarely takes more than four
        # checks.
        missing = round(_GROWTH * (_SETTLED - agreement) * found)
        check = min(found + max(left_out, missing), side // 2 + 1)


def _sample(generator, size):
    """Return some of the places from 0 to `size`, as a tensor."""
    count = min(size, math.isqrt(_SAMPLE))
    places = generator.choice(size, count, replace=False)
    return ops.convert_to_tensor(np.sort(places).astype("int32"))


def _inner(x, y):
    """Return the inner products of the rows of x with those of y."""
    return ops.tensordot(x, y, axes=[[1], [1]])


def _orthonormal(block, near, bases):
    """Return the block's part outside of the bases, with orthonormal rows.

    The first pass removes the part inside `near`, the last two blocks. In a
    Krylov space little but rounding is inside the others. Further passes remove
    the part inside all bases, until almost nothing is left there. It takes two
    if one direction outweighs all others.
    """
    outside = near
    for _ in range(5):
        for basis in outside:
            block = block - ops.matmul(_inner(block, basis), basis)
        # Small matrices are fastest on the host.
        gram = ops.convert_to_numpy(_inner(block, block))
        inverse, skew = _inverse_root(gram)
        block = ops.matmul(ops.convert_to_tensor(inverse), block)
        # The squared norms of the rows were ones or zeros.
        inside = (1 - np.diag(gram)[np.diag(gram) > 0]).max(initial=0)
        if outside is bases and inside < 1e-4 and skew < 0.01:
            break
        outside = bases
    return block


def _inverse_root(gram):
    """Return A with `A gram A^T = 1`, or nearly if `gram` is singular.

    Also return how far the rows, whose products `gram` holds, were from
    orthogonal. A row of zeros stays one.
    """
    scale = 1 / np.sqrt(np.maximum(np.diag(gram), 1e-30, dtype="float64"))
    cosines = gram * scale * scale[:, None]
    skew = np.abs(cosines - np.diag(np.diag(cosines))).max()
    # Exceeds what rounding may turn eigenvalues of zero into.
    rounding = 1e-6 * len(gram) * np.eye(len(gram))
    factor = np.linalg.cholesky(cosines + rounding)
    return (np.linalg.inv(factor) * scale).astype("float32"), skew


def _sample_mask(vectors, basis, image, size, share):
    """Return the mask in a sample, by the first vectors of the Krylov space."""
    left, right = (
        ops.matmul(vectors[:, :size], x[:size]) for x in (basis, image)
    )
    scores = ops.abs(ops.tensordot(left, right, axes=[[0], [0]]))
    scores = ops.convert_to_numpy(scores).reshape(-1)
    count = max(1, round(share * scores.size))
    return scores >= np.partition(scores, -count)[-count]
