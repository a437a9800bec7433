"""Principal weights: which entries of a matrix its leading directions hold.

A kernel is seen as one matrix of contraction x output, or as a stack of them.
W_r is its best approximation of rank r; the principal weights are the k entries
of W_r that are largest in magnitude (LIFT, arXiv 2506.00772).
"""

import dataclasses
import importlib
import math

import keras
import numpy as np
from keras import ops

from keras_weightmods.ops.nm import from_matrix, to_matrix

SELECTIONS = ("principal", "magnitude", "gradient", "random")
METHODS = ("auto", "gram", "krylov", "exact")

# Below this size the eigendecomposition of the Gram matrix takes less time
# than the many small products of the Krylov method.
_LARGE = 1024
# The mask has settled when it agrees, on this share of a sample, with the mask
# without the last blocks of the Krylov space, this share of it and at least so
# many. The method converges faster than linearly: the blocks to come would
# change less than those did. After a start from near directions there may be
# one block alone to leave out.
_SETTLED, _SETTLED_WARM = 0.985, 0.995
_LEFT_OUT = 0.08
_BLOCKS_LEFT_OUT, _BLOCKS_LEFT_OUT_WARM = 2, 1
_SAMPLE = 2**17
# How much larger a space to look at next, for the share that is missing.
_GROWTH = 2.8
# Blocks of a space of the rank. More are narrower, which makes slower
# products, and need a smaller space.
_BLOCKS_PER_RANK = 4
# Products with a matrix are fastest where the other side is a multiple.
_LANES = 16


@dataclasses.dataclass(frozen=True)
class Selection:
    """How to select entries of a kernel; see `principal_mask`.

    Attributes:
        rank, density, filter_rank, selection, method, block, seed: The
            arguments of `principal_mask`, checked when it is made.
    """

    rank: int | None = None
    density: float | None = None
    filter_rank: int | None = None
    selection: str = "principal"
    method: str = "auto"
    block: int = 1
    seed: int = 0

    def __post_init__(self):
        if (self.rank is None) == (self.density is None):
            raise ValueError(
                "Give one of `rank`, for as many entries as a LoRA of that "
                "rank has numbers, and `density`, for a share of the entries. "
                f"Received: rank={self.rank}, density={self.density}"
            )
        for name in ("rank", "filter_rank", "block"):
            value = getattr(self, name)
            if value is not None and not (_is_int(value) and value >= 1):
                raise ValueError(
                    f"`{name}` must be an int of at least 1. "
                    f"Received: {name}={value!r}"
                )
        if self.density is not None and not (
            isinstance(self.density, (int, float))
            and not isinstance(self.density, bool)
            and 0 < self.density <= 1
        ):
            raise ValueError(
                "`density` must be a share of the entries, in (0, 1]. "
                f"Received: density={self.density!r}"
            )
        for name, choices in (("selection", SELECTIONS), ("method", METHODS)):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"`{name}` must be one of {choices}. "
                    f"Received: {name}={getattr(self, name)!r}"
                )
        if not (_is_int(self.seed) and self.seed >= 0):
            raise ValueError(
                "`seed` must be an int of at least 0. "
                f"Received: seed={self.seed!r}"
            )

    def size(self, rows, columns):
        """Int, the entries to select of a matrix."""
        size = rows * columns
        if self.rank is not None:
            count = min((rows + columns) * self.rank, size)
        else:
            count = round(self.density * size)
        area = self.block**2
        if self.block > 1 and (rows % self.block or columns % self.block):
            raise ValueError(
                "The sizes of the matrix must be multiples of `block`. "
                f"Received: block={self.block}, for a matrix of {rows} x "
                f"{columns}. Leave this kernel out, or select single entries."
            )
        count = round(count / area) * area
        if count == 0:
            raise ValueError(
                "Not one entry is selected. Received: "
                f"rank={self.rank}, density={self.density}, "
                f"block={self.block}, for a matrix of {rows} x {columns}. "
                "Select more, or leave this kernel out."
            )
        return min(count, size)

    def rank_of_filter(self, rows, columns):
        """Int, the rank r of the approximation."""
        rank = self.filter_rank or self.rank
        if rank is None:
            # The rank of the LoRA with as many numbers.
            rank = round(self.density * rows * columns / (rows + columns))
        return min(max(rank, 1), rows, columns)


def principal_mask(
    kernel,
    rank=None,
    density=None,
    filter_rank=None,
    *,
    contraction_axes=0,
    stack_axes=(),
    selection="principal",
    method="auto",
    block=1,
    gradient=None,
    candidates=None,
    start=None,
    return_basis=False,
    seed=0,
):
    r"""Marks the principal weights of a kernel.

    For a matrix `W` of m x n, these are the k largest magnitudes of `W_r`, the
    truncated singular value decomposition of rank r (LIFT, arXiv 2506.00772,
    section 3):

        W_r = sum_{i <= r} s_i u_i v_i^T,   k = min((m + n) * rank, m * n)

    or `k = round(density * m * n)`. Exactly k are marked in each matrix; ties
    keep the earlier entry.

    The leading directions are found on the kernel's device by one of

    - `"gram"`: the eigendecomposition of the smaller one of `W W^T` and
      `W^T W`. `W_r = U U^T W` needs the vectors of one side alone;
    - `"krylov"`: block Lanczos with full reorthogonalization, extended until
      the mask, not the spectrum, has settled;
    - `"exact"`: the whole singular value decomposition, the rule itself;
    - `"auto"`: `"krylov"` for matrices of more than 1,024 on their smaller
      side, where the rank is at most an eighth of it, `"gram"` for others.

    Randomized decompositions with a few power iterations are not among them:
    spectra of language models are flat, and half of their entries are wrong.

    Args:
        kernel: Tensor or variable, finite.
        rank: Int, marks as many entries as a LoRA of this rank has numbers.
            Give this or `density`.
        density: Float in (0, 1], the share of the entries of each matrix.
        filter_rank: Int, r. Defaults to `rank`, or to the rank of a LoRA with
            about as many numbers as `density` marks. At most the smaller side
            is used.
        contraction_axes: Int or tuple of ints, the axes of the kernel that are
            the rows of the matrix. Defaults to 0.
        stack_axes: Tuple of ints, the axes that index whole matrices. Defaults
            to none.
        selection: `"principal"`, or for comparison `"magnitude"` for the
            largest `|W|`, `"gradient"` for the largest `|gradient|`, or
            `"random"`. Defaults to `"principal"`.
        method: See above. Defaults to `"auto"`.
        block: Int, 4 marks whole blocks of 4 x 4, by the sum of their
            magnitudes. The sizes of the matrix must be multiples. Defaults
            to 1.
        gradient: Tensor of the kernel's shape, for `selection="gradient"`.
        candidates: Boolean tensor of the kernel's shape: only these are
            marked. Defaults to all.
        start: What `return_basis` gave for a kernel that has changed little
            since. Defaults to a random start.
        return_basis: Bool, whether to return the basis too. Defaults to
            `False`.
        seed: Int, of the random start and of `selection="random"`. Defaults
            to 0.

    Returns:
        Boolean tensor of the shape of `kernel`; with `return_basis` a pair of
        it and a list with the leading directions of each matrix, on its
        smaller side, shape `(min(m, n), r)`; an empty list for the other
        selections.

    Raises:
        ValueError: If an argument is outside the ranges above, not one entry
            is to be marked, more than there are candidates, or the kernel is
            not finite.

    Example:

    ```python
    import numpy as np
    from keras_weightmods.ops import principal_mask

    kernel = np.random.default_rng(0).normal(size=(32, 48))
    mask = principal_mask(kernel, density=0.05)
    assert np.array(mask).sum() == 77
    ```
    """
    how = Selection(rank, density, filter_rank, selection, method, block, seed)
    kernel = _as_float(kernel)
    matrices = _matrices(kernel, contraction_axes, stack_axes)
    if selection == "gradient":
        if gradient is None or tuple(gradient.shape) != tuple(kernel.shape):
            raise ValueError(
                '`selection="gradient"` needs `gradient`, of the shape of the '
                f"kernel, {tuple(kernel.shape)}. Received: gradient of shape "
                f"{None if gradient is None else tuple(gradient.shape)}"
            )
        matrices = _matrices(_as_float(gradient), contraction_axes, stack_axes)
    allowed = [None] * len(matrices)
    if candidates is not None:
        candidates = ops.convert_to_tensor(candidates)
        allowed = _matrices(candidates, contraction_axes, stack_axes)
    masks, bases = [], []
    with full_precision():
        for place, matrix in enumerate(matrices):
            scores, basis = _scores(
                matrix, how, place, None if start is None else start[place]
            )
            masks.append(_mask_of(scores, how, allowed[place]))
            if basis is not None:
                bases.append(basis)
    mask = _kernel_of(masks, kernel.shape, contraction_axes, stack_axes)
    return (mask, bases) if return_basis else mask


def low_rank_factors(
    matrix, rank, method="auto", start=None, seed=0, share=0.05
):
    """Factors of the best approximation of a matrix of a given rank.

    Args:
        matrix: Tensor of shape `(m, n)`.
        rank: Int, at most `min(m, n)`.
        method: As in `principal_mask`. Defaults to `"auto"`.
        start: Tensor of shape `(min(m, n), any)`, directions near the leading
            ones, for `"krylov"`. Defaults to a random start.
        seed: Int, of the random start. Defaults to 0.
        share: Float, the share of entries whose places must have settled, for
            `"krylov"`. Defaults to 0.05.

    Returns:
        Pair of tensors of shapes `(m, rank)` and `(rank, n)`, whose product is
        the approximation. The columns of the first are orthonormal where
        `m <= n`, the rows of the second elsewhere.

    Raises:
        ValueError: If `rank` or `method` is none of these.

    Example:

    ```python
    import numpy as np
    from keras_weightmods.ops.principal_mask import low_rank_factors

    x = np.random.default_rng(0).normal(size=(30, 20)).astype("float32")
    left, right = low_rank_factors(x, 20)
    assert np.allclose(np.array(left) @ np.array(right), x, atol=1e-4)
    ```
    """
    rows, columns = matrix.shape
    if not (_is_int(rank) and 1 <= rank <= min(rows, columns)):
        raise ValueError(
            "`rank` must be an int from 1 to the smaller side of the matrix. "
            f"Received: rank={rank!r}, for a matrix of {rows} x {columns}"
        )
    if method not in METHODS:
        raise ValueError(
            f"`method` must be one of {METHODS}. Received: method={method!r}"
        )
    method = _method_for(method, rows, columns, rank)
    if method == "exact":
        u, s, vh = ops.linalg.svd(matrix, full_matrices=False)
        u, s, vh = u[:, :rank], s[:rank], vh[:rank]
        return (u, s[:, None] * vh) if rows <= columns else (u * s, vh)
    found = None
    if method == "krylov":
        found = _krylov_basis(matrix, rank, start, seed, share)
    if found is None:
        found = _gram_basis(matrix, rank)
    basis, image = found
    if rows <= columns:
        return ops.transpose(basis), image
    return ops.transpose(image), basis


def mask_indices(mask):
    """The places of a mask's entries in the flattened kernel, rising.

    Args:
        mask: Boolean tensor.

    Returns:
        int32 NumPy array.

    Raises:
        ValueError: If the kernel is too large for int32.

    Example:

    ```python
    import numpy as np
    from keras_weightmods.ops.principal_mask import mask_indices

    assert mask_indices(np.eye(3) > 0).tolist() == [0, 4, 8]
    ```
    """
    if math.prod(mask.shape) >= 2**31:
        raise ValueError(
            "A kernel may have at most 2**31 - 1 entries. Received: "
            f"mask.shape={tuple(mask.shape)}"
        )
    # On the host: on JAX, `nonzero` takes longer than the selection.
    return np.flatnonzero(ops.convert_to_numpy(mask)).astype("int32")


def full_precision():
    """A context in which products of float32 matrices are not rounded.

    On a GPU, JAX and TensorFlow take factors of 10 bits otherwise.
    """
    name = keras.backend.backend()
    return importlib.import_module(
        f"keras_weightmods.backend.{name}.precision"
    ).full_precision()


def _scores(matrix, how, place, start):
    """What to rank the entries by, and the basis it was computed from."""
    if how.selection in ("magnitude", "gradient"):
        return ops.abs(matrix), None
    if how.selection == "random":
        generator = np.random.default_rng([how.seed, place])
        return ops.convert_to_tensor(
            generator.random(tuple(matrix.shape), dtype="float32")
        ), None
    rows, columns = matrix.shape
    rank = how.rank_of_filter(rows, columns)
    share = how.size(rows, columns) / (rows * columns)
    method = _method_for(how.method, rows, columns, rank)
    if method == "gram" and keras.backend.backend() == "jax":
        from keras_weightmods.backend.jax.compiled_call import compiled

        # One program for a shape, where each op would be one and be kept.
        find = compiled(_low_rank_scores, static=(1, 2))
        return find(matrix, rank, method)
    return _low_rank_scores(
        matrix, rank, method, start, how.seed + place, share
    )


def _low_rank_scores(matrix, rank, method, start=None, seed=0, share=0.05):
    left, right = low_rank_factors(matrix, rank, method, start, seed, share)
    is_wide = matrix.shape[0] <= matrix.shape[1]
    basis = left if is_wide else ops.transpose(right)
    return ops.abs(ops.matmul(left, right)), basis


def _method_for(method, rows, columns, rank):
    side = min(rows, columns)
    if method == "auto":
        is_large = side > _LARGE and 8 * rank <= side
        method = "krylov" if is_large else "gram"
    return method


def _mask_of(scores, how, allowed):
    rows, columns = scores.shape
    count = how.size(rows, columns)
    if how.block > 1:
        count //= how.block**2
        scores = _block_sums(scores, how.block)
        if allowed is not None:
            allowed = _block_sums(ops.cast(allowed, "float32"), how.block) > 0
    if allowed is not None:
        there = _count(allowed)
        if there < count:
            raise ValueError(
                "There must be as many candidates as entries to select. "
                f"Received: {there} candidates for {count} entries of a "
                f"matrix of {rows} x {columns}. Select fewer."
            )
        scores = ops.where(allowed, scores, ops.cast(-1, scores.dtype))
    mask = _largest(scores, count)
    if how.block > 1:
        mask = ops.repeat(ops.repeat(mask, how.block, 0), how.block, 1)
    return mask


def _largest(scores, count):
    """Marks the `count` largest of a float32 matrix, ties in their order."""
    # Of JAX, TensorFlow and torch alike.
    if "cpu" in str(scores.device).lower():
        flat = ops.convert_to_numpy(scores).reshape(-1)
        mask = _largest_on_host(flat, count).reshape(scores.shape)
        return ops.convert_to_tensor(mask)
    mask = _largest_by_bisection(ops.reshape(scores, (-1,)), count)
    return ops.reshape(mask, scores.shape)


def _largest_on_host(flat, count):
    # Most entries are below what a sample says of their order.
    sample = flat[:: flat.size // 2**16 | 1]
    share = 1.2 * count / flat.size
    below = int(sample.size * (1 - share))
    some = flat
    if below > 0:
        some = flat[flat >= np.partition(sample, below)[below]]
    if some.size < count:
        some = flat
    first = some.size - count
    threshold = np.partition(some, first)[first]
    mask = flat >= threshold
    surplus = np.count_nonzero(mask) - count
    if surplus:
        mask[np.flatnonzero(flat == threshold)[-surplus:]] = False
    return mask


def _largest_by_bisection(flat, count):
    """The smallest value marked is found by bisection on its bits.

    That counts some thirty times and never sorts or copies.
    """
    # Negative entries are no candidates: their bits are not looked at.
    low, high = (
        0,
        int(np.float32(ops.convert_to_numpy(ops.max(flat))).view("int32")),
    )
    # More than `high` has fewer than `count`; from `low` on has enough.
    while low < high:
        middle = (low + high + 1) // 2
        found = _count(flat >= _float_of(middle))
        if found >= count:
            low = middle
        else:
            high = middle - 1
        if found == count:
            break
    threshold = _float_of(low)
    mask = flat >= threshold
    if _count(mask) == count:
        return mask
    above, ties = flat > threshold, ops.equal(flat, threshold)
    place = ops.cumsum(ops.cast(ties, "int32"))
    wanted = count - _count(above)
    return ops.logical_or(above, ops.logical_and(ties, place <= wanted))


def _float_of(bits):
    return np.int32(bits).view("float32")


def _count(mask):
    return int(ops.convert_to_numpy(ops.sum(ops.cast(mask, "int32"))))


def _block_sums(x, block):
    rows, columns = x.shape
    x = ops.reshape(x, (rows // block, block, columns // block, block))
    return ops.sum(x, axis=(1, 3))


def _gram_basis(matrix, rank):
    """The leading directions of the smaller side, and their images.

    Both as rows. From the Gram matrix of that side.
    """
    rows, columns = matrix.shape
    other = ops.transpose(matrix)
    gram = ops.matmul(
        *((matrix, other) if rows <= columns else (other, matrix))
    )
    _, vectors = ops.linalg.eigh(gram)
    basis = ops.transpose(vectors[:, -rank:])
    return basis, ops.matmul(basis, matrix if rows <= columns else other)


def _krylov_basis(matrix, rank, start, seed, share):
    """The same by block Lanczos; None if half the space was not enough.

    With the rows of Q an orthonormal basis of the Krylov space of `W W^T` and
    P = Q W, the best approximation within it comes from the eigenvectors of
    `P P^T`.
    """
    rows, columns = matrix.shape
    side = min(rows, columns)
    generator = np.random.default_rng(seed)
    places = _sample(generator, side), _sample(generator, max(rows, columns))
    if start is None:
        settled, fewest = _SETTLED, _BLOCKS_LEFT_OUT
        width = max(2, -(-rank // _BLOCKS_PER_RANK))
        if width > _LANES:
            width = -(-width // _LANES) * _LANES
        noise = generator.normal(size=(width, side)).astype("float32")
        block = ops.convert_to_tensor(noise)
    else:
        settled, fewest = _SETTLED_WARM, _BLOCKS_LEFT_OUT_WARM
        block = ops.transpose(ops.cast(start, matrix.dtype))
    width = block.shape[0]

    check = max(2 * rank, (fewest + 1) * width)
    if 2 * check > side:
        return None
    # In both orders, since of a matrix in memory as it is read a product with
    # few vectors takes half as long. `concatenate`, for torch's is a view.
    flipped = ops.concatenate([ops.transpose(matrix)], axis=0)
    forth, back = flipped, matrix
    if rows > columns:
        forth, back = back, forth

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
            images.append(_images(forth, block))
            near = [*near[-1:], block]
            block = _images(back, images[-1])
        basis = ops.concatenate([basis, *blocks], axis=0)
        new = ops.concatenate(images, axis=0)
        image = ops.concatenate([image, new], axis=0)
        gram = _bordered(gram, _inner(image, new))
        found = basis.shape[0]
        _, vectors = ops.linalg.eigh(gram)
        vectors = ops.transpose(vectors[:, -rank:])
        left_out = max(fewest, round(_LEFT_OUT * found / width)) * width
        sides = ops.take(basis, places[0], 1), ops.take(image, places[1], 1)
        full, short = (
            _sample_mask(vectors, *sides, size, share)
            for size in (found, found - left_out)
        )
        agreement = np.count_nonzero(full & short) / np.count_nonzero(full)
        if agreement >= settled:
            return ops.matmul(vectors, basis), ops.matmul(vectors, image)
        if 2 * found > side:
            return None
        # From how the share that is missing shrinks, in trained matrices and
        # in random ones: seldom too far, and rarely more than four checks.
        missing = round(_GROWTH * (settled - agreement) * found)
        check = min(found + max(left_out, missing), side // 2 + 1)


def _images(matrix, vectors):
    """The products of a matrix with vectors, both as rows."""
    return ops.transpose(_inner(matrix, vectors))


def _sample(generator, size):
    """Some of the places from 0 to `size`, as a tensor."""
    count = min(size, math.isqrt(_SAMPLE))
    places = generator.choice(size, count, replace=False)
    return ops.convert_to_tensor(np.sort(places).astype("int32"))


def _bordered(gram, new):
    """A symmetric matrix with more rows and columns, of which it has one."""
    upper = ops.concatenate([gram, new[: gram.shape[0]]], axis=1)
    return ops.concatenate([upper, ops.transpose(new)], axis=0)


def _inner(x, y):
    """The inner products of the rows of x with those of y."""
    return ops.tensordot(x, y, axes=[[1], [1]])


def _orthonormal(block, near, bases):
    """The block's part outside of the bases, with orthonormal rows.

    First its part outside of `near`, the last two blocks: in a Krylov space
    little but rounding is inside of the others. Then as often as it takes until
    next to nothing was inside: twice where one direction outweighs the others
    so much that they are next to nothing themselves.
    """
    outside = near
    for _ in range(5):
        for basis in outside:
            block = block - ops.matmul(_inner(block, basis), basis)
        # It is small: the host is the fastest.
        gram = ops.convert_to_numpy(_inner(block, block))
        inverse, skew = _inverse_root(gram)
        block = ops.matmul(ops.convert_to_tensor(inverse), block)
        # Of the squares of the rows, which were ones or zeros.
        inside = (1 - np.diag(gram)[np.diag(gram) > 0]).max(initial=0)
        if outside is bases and inside < 1e-4 and skew < 0.01:
            break
        outside = bases
    return block


def _inverse_root(gram):
    """A matrix A with `A gram A^T = 1`, or nearly where that is singular.

    And how far the rows of which it holds the products were from orthogonal. A
    row of zeros stays one.
    """
    scale = 1 / np.sqrt(np.maximum(np.diag(gram), 1e-30, dtype="float64"))
    cosines = gram * scale * scale[:, None]
    skew = np.abs(cosines - np.diag(np.diag(cosines))).max()
    # More than rounding may have made of eigenvalues of zero.
    rounding = 1e-6 * len(gram) * np.eye(len(gram))
    factor = np.linalg.cholesky(cosines + rounding)
    return (np.linalg.inv(factor) * scale).astype("float32"), skew


def _sample_mask(vectors, basis, image, size, share):
    """The mask in a sample, by the first vectors of the Krylov space."""
    left, right = (
        ops.matmul(vectors[:, :size], x[:size]) for x in (basis, image)
    )
    scores = ops.abs(ops.tensordot(left, right, axes=[[0], [0]]))
    scores = ops.convert_to_numpy(scores).reshape(-1)
    count = max(1, round(share * scores.size))
    return scores >= np.partition(scores, -count)[-count]


def _matrices(kernel, contraction_axes, stack_axes):
    """The matrices of a kernel, contraction x output, as a list."""
    stack_axes = tuple(stack_axes)
    if not stack_axes:
        return [to_matrix(kernel, contraction_axes)]
    rank = len(kernel.shape)
    stacks = [axis % rank for axis in stack_axes]
    contracted = (
        (contraction_axes,)
        if isinstance(contraction_axes, int)
        else contraction_axes
    )
    others = [axis for axis in range(rank) if axis not in stacks]
    kernel = ops.transpose(kernel, stacks + others)
    kernel = ops.reshape(kernel, (-1, *kernel.shape[len(stacks) :]))
    axes = tuple(others.index(axis % rank) for axis in contracted)
    return [to_matrix(kernel[i], axes) for i in range(kernel.shape[0])]


def _kernel_of(matrices, shape, contraction_axes, stack_axes):
    """Undoes `_matrices`."""
    stack_axes = tuple(stack_axes)
    shape = tuple(shape)
    if not stack_axes:
        return from_matrix(matrices[0], shape, contraction_axes)
    rank = len(shape)
    stacks = [axis % rank for axis in stack_axes]
    contracted = (
        (contraction_axes,)
        if isinstance(contraction_axes, int)
        else contraction_axes
    )
    others = [axis for axis in range(rank) if axis not in stacks]
    axes = tuple(others.index(axis % rank) for axis in contracted)
    inner = [shape[axis] for axis in others]
    kernel = ops.stack([from_matrix(m, inner, axes) for m in matrices])
    kernel = ops.reshape(kernel, [shape[axis] for axis in stacks] + inner)
    order = stacks + others
    return ops.transpose(kernel, [order.index(axis) for axis in range(rank)])


def _as_float(x):
    """In float32, also from more bits: where the bisection counts them."""
    x = ops.stop_gradient(ops.cast(ops.convert_to_tensor(x), "float32"))
    # A sum that is finite tells it in a sixth of the time.
    if not (_is_finite(ops.sum(x)) or _is_finite(x)):
        raise ValueError(
            "`kernel` and `gradient` must be finite. Received: NaN or "
            f"infinity in a tensor of shape {tuple(x.shape)}"
        )
    return x


def _is_finite(x):
    return bool(ops.convert_to_numpy(ops.all(ops.isfinite(x))))


def _is_int(value):
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
