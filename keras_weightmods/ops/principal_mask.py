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
# The mask has settled when two checks agree on this share of a sample. The
# method converges faster than linearly: the second check is better than that.
_SETTLED = 0.995
_SAMPLE = 2**17
# Blocks added to the Krylov space between two checks. Fewer are wider, which
# makes faster products, and need a larger space.
_BLOCKS_PER_CHECK = 3


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
    side = min(rows, columns)
    if method == "auto":
        is_large = side > _LARGE and 8 * rank <= side
        method = "krylov" if is_large else "gram"
    if method == "exact":
        u, s, vh = ops.linalg.svd(matrix, full_matrices=False)
        u, s, vh = u[:, :rank], s[:rank], vh[:rank]
        return (u, s[:, None] * vh) if rows <= columns else (u * s, vh)
    basis = None
    if method == "krylov":
        basis = _krylov_basis(matrix, rank, start, seed, share)
    if basis is None:
        basis = _gram_basis(matrix, rank)
    if rows <= columns:
        return basis, ops.matmul(ops.transpose(basis), matrix)
    return ops.matmul(matrix, basis), ops.transpose(basis)


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
    left, right = low_rank_factors(
        matrix, rank, how.method, start, how.seed + place, share
    )
    basis = left if rows <= columns else ops.transpose(right)
    return ops.abs(ops.matmul(left, right)), basis


def _mask_of(scores, how, allowed):
    rows, columns = scores.shape
    count = how.size(rows, columns)
    if how.block > 1:
        count //= how.block**2
        scores = _block_sums(scores, how.block)
        if allowed is not None:
            allowed = _block_sums(ops.cast(allowed, "float32"), how.block) > 0
    flat = ops.reshape(scores, (-1,))
    if allowed is not None:
        allowed = ops.reshape(allowed, (-1,))
        there = _count(allowed)
        if there < count:
            raise ValueError(
                "There must be as many candidates as entries to select. "
                f"Received: {there} candidates for {count} entries of a "
                f"matrix of {rows} x {columns}. Select fewer."
            )
        flat = ops.where(allowed, flat, ops.cast(-1, flat.dtype))
    mask = ops.reshape(_largest(flat, count), scores.shape)
    if how.block > 1:
        mask = ops.repeat(ops.repeat(mask, how.block, 0), how.block, 1)
    return mask


def _largest(flat, count):
    """Marks the `count` largest of a float32 vector, ties in their order."""
    # Of JAX, TensorFlow and torch alike.
    if "cpu" in str(flat.device).lower():
        mask = _largest_on_host(ops.convert_to_numpy(flat), count)
        return ops.convert_to_tensor(mask)
    return _largest_by_bisection(flat, count)


def _largest_on_host(flat, count):
    first = flat.size - count
    threshold = np.partition(flat, first)[first]
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
    """The leading directions of the smaller side, from its Gram matrix."""
    rows, columns = matrix.shape
    other = ops.transpose(matrix)
    gram = ops.matmul(
        *((matrix, other) if rows <= columns else (other, matrix))
    )
    _, vectors = ops.linalg.eigh(gram)
    return vectors[:, -rank:]


def _krylov_basis(matrix, rank, start, seed, share):
    """The same by block Lanczos; None if half the space was not enough.

    With Q an orthonormal basis of the Krylov space of `W W^T` and P = W^T Q,
    the best approximation within it comes from the eigenvectors of P^T P.
    """
    rows, columns = matrix.shape
    side = min(rows, columns)

    def forth(q):
        if rows > columns:
            return ops.matmul(matrix, q)
        return ops.transpose(ops.matmul(ops.transpose(q), matrix))

    def back(p):
        if rows <= columns:
            return ops.matmul(matrix, p)
        return ops.transpose(ops.matmul(ops.transpose(p), matrix))

    generator = np.random.default_rng(seed)
    width = max(2, -(-rank // _BLOCKS_PER_CHECK))
    if start is None:
        noise = generator.normal(size=(side, width)).astype("float32")
        block = ops.convert_to_tensor(noise)
    else:
        block = ops.cast(start, matrix.dtype)
    places = _sample(generator, side), _sample(generator, max(rows, columns))
    blocks_per_check = _BLOCKS_PER_CHECK if start is None else 1
    first_check = 2 * rank if start is None else rank

    slabs: list = []  # Q, as slabs of several blocks: larger products
    images: list = []  # P, likewise
    gram = None  # P^T P
    before = None
    found = 0
    while 2 * found <= side:
        recent: list = []
        for _ in range(blocks_per_check):
            block = _orthonormal(block, slabs + [q for q, _ in recent])
            recent.append((block, forth(block)))
            block = back(recent[-1][1])
        for parts, blocks in zip((slabs, images), zip(*recent)):
            parts.append(ops.concatenate(blocks, axis=1))
        gram = _extended(gram, images)
        found = gram.shape[0]
        if found < first_check:
            continue
        _, vectors = ops.linalg.eigh(gram)
        vectors = vectors[:, -rank:]
        basis, image = (
            ops.matmul(_rows(parts, at), vectors)
            for parts, at in zip((slabs, images), places)
        )
        after = _sample_mask(basis, image, share)
        if before is not None:
            both = np.count_nonzero(before & after)
            if both >= _SETTLED * np.count_nonzero(after):
                return ops.matmul(ops.concatenate(slabs, axis=1), vectors)
        before = after
    return None


def _sample(generator, size):
    """Some of the places from 0 to `size`, as a tensor."""
    count = min(size, math.isqrt(_SAMPLE))
    places = generator.choice(size, count, replace=False)
    return ops.convert_to_tensor(np.sort(places).astype("int32"))


def _rows(parts, places):
    """Rows of a matrix that is in parts of some columns each."""
    return ops.concatenate(
        [ops.take(part, places, axis=0) for part in parts], axis=1
    )


def _extended(gram, parts):
    """`P^T P`, from that of all parts of P but the last."""
    last = parts[-1]
    across = [ops.matmul(ops.transpose(part), last) for part in parts]
    new = ops.concatenate(across, axis=0)
    if gram is None:
        return new
    upper = ops.concatenate([gram, new[: gram.shape[0]]], axis=1)
    return ops.concatenate([upper, ops.transpose(new)], axis=0)


def _orthonormal(block, bases):
    """The block's part outside of the bases, with orthonormal columns.

    By Cholesky decompositions: on JAX, Householder's takes ten times as long.
    Once more, since a part that is small is not orthogonal after one. A column
    of zeros stays one, and does no harm.
    """
    for _ in range(3):
        for basis in bases:
            inside = ops.matmul(ops.transpose(basis), block)
            block = block - ops.matmul(basis, inside)
        norm = ops.sqrt(ops.sum(ops.square(block), axis=0))
        block = block / ops.maximum(norm, 1e-30)
        gram = ops.matmul(ops.transpose(block), block)
        factor = ops.linalg.cholesky(
            gram + 1e-5 * ops.eye(gram.shape[0], dtype=gram.dtype)
        )
        block = ops.transpose(
            ops.linalg.solve_triangular(
                factor, ops.transpose(block), lower=True
            )
        )
    return block


def _sample_mask(basis, image, share):
    scores = np.abs(
        ops.convert_to_numpy(ops.matmul(basis, ops.transpose(image)))
    ).reshape(-1)
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
    if not bool(ops.convert_to_numpy(ops.all(ops.isfinite(x)))):
        raise ValueError(
            "`kernel` and `gradient` must be finite. Received: NaN or "
            f"infinity in a tensor of shape {tuple(x.shape)}"
        )
    return x


def _is_int(value):
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
