"""N:M patterns: masks, projections and counts, as pure tensor functions.

A kernel is a matrix (K, R) here: its contraction axes are flattened to K, all
others to R. A group is m consecutive entries of one column, of which n are
kept.
"""

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_weightmods.native.layout import ROWS
from keras_weightmods.utils import checks
from keras_weightmods.utils.matrix import Axes, from_matrix, to_matrix

# Up to this group size each pair of entries is compared once. Up to the other,
# each entry is compared with its group; beyond that a sort costs less.
_MAX_PAIRS, _MAX_COMPARED = 8, 64


Pattern = str | tuple[int, int]


def parse_pattern(pattern: Pattern) -> tuple[int, int]:
    """Reads an N:M pattern, n weights kept of every m.

    Args:
        pattern: A string such as `"2:4"`, or a pair of ints `(n, m)`.

    Returns:
        The pair of ints `(n, m)`.

    Raises:
        ValueError: If `pattern` is malformed or not `1 <= n <= m`.

    Example:

    ```python
    from keras_weightmods.ops import parse_pattern

    assert parse_pattern("2:4") == (2, 4)
    ```
    """
    try:
        if isinstance(pattern, str):
            n, m = map(int, pattern.split(":"))
        else:
            n, m = pattern
        return checks.check_int("n", n, 1, m), checks.check_int("m", m, 1)
    except (NotImplementedError, TypeError, ValueError):
        raise checks.error(
            "pattern",
            "'n:m' with 1 <= n <= m, where n is the number of weights KEPT in "
            "every group of m, for example '2:4'",
            pattern,
        ) from None


def nm_mask(x: Any, pattern: Pattern = "2:4", axis: Axes = 0) -> Any:
    """Marks the n largest magnitudes in every group of m.

    This is equation 6 of CAST (arXiv 2509.25996). Ties keep the earlier entry,
    so exactly n are marked. A NaN counts as infinity, so that `nm_project` does
    not hide it.

    Args:
        x: Tensor or variable, of any shape.
        pattern: String `"n:m"`, n entries kept in every group of m; or a pair
            of ints `(n, m)`. Defaults to `"2:4"`.
        axis: Int or tuple of ints, the contraction axes. Groups run along
            these axes, flattened in the order given.

    Returns:
        Boolean tensor of the shape of `x`, True where kept.

    Raises:
        ValueError: If `pattern` is malformed, or the size of `axis` is not a
            multiple of m.

    Example:

    ```python
    import numpy as np
    from keras_weightmods.ops import nm_mask

    mask = nm_mask(np.array([[3.0], [-1.0], [0.5], [-2.0]]), "2:4", axis=0)
    assert np.array(mask)[:, 0].tolist() == [True, False, False, True]
    ```
    """
    n, m = parse_pattern(pattern)
    x = checks.check_tensor("x", x)
    groups = _to_groups(x, m, axis)
    scores = ops.abs(groups)
    if keras.backend.is_float_dtype(scores.dtype):
        infinity = ops.full_like(scores, float("inf"))
        scores = ops.where(ops.isnan(scores), infinity, scores)
    shape = groups.shape[0] * m, groups.shape[-1]
    kept = ops.reshape(_ranks(scores, m) < n, shape)
    return from_matrix(kept, tuple(x.shape), axis)


def nm_project(x: Any, pattern: Pattern = "2:4", axis: Axes = 0) -> Any:
    """Sets all but the n largest magnitudes of every group of m to zero.

    The nearest N:M tensor in the Euclidean norm. See `nm_mask` for the
    arguments and errors.

    Returns:
        Tensor of the shape and dtype of `x`.

    Example:

    ```python
    import numpy as np
    from keras_weightmods.ops import nm_project

    x = nm_project(np.array([[3.0], [-1.0], [0.5], [-2.0]]), "2:4", axis=0)
    assert np.array(x)[:, 0].tolist() == [3.0, 0.0, 0.0, -2.0]
    ```
    """
    x = checks.check_tensor("x", x)
    return ops.where(nm_mask(x, pattern, axis), x, ops.zeros_like(x))


def nm_violations(x: Any, pattern: Pattern = "2:4", axis: Axes = 0) -> Any:
    """Counts the groups of m that hold more than n nonzeros.

    See `nm_mask` for the arguments and errors.

    Returns:
        Scalar int32 tensor; 0 if and only if `x` is exactly N:M.

    Example:

    ```python
    import numpy as np
    from keras_weightmods.ops import nm_violations

    assert int(nm_violations(np.ones((8, 3)), "2:4", axis=0)) == 6
    ```
    """
    n, m = parse_pattern(pattern)
    groups = _to_groups(checks.check_tensor("x", x), m, axis)
    nonzero = ops.not_equal(groups, 0)
    counts = ops.sum(ops.cast(nonzero, "int32"), axis=1)
    return ops.sum(ops.cast(ops.greater(counts, n), "int32"))


def packed_pattern(x: Any, axis: Axes = 0) -> str | None:
    """Return the pattern in which `pack` stores a kernel.

    Args:
        x: Tensor or variable, of any shape.
        axis: Int or tuple of ints, the contraction axes.

    Returns:
        `"2:4"`; `"16:32"`, which holds all patterns of at most a half whose
        groups divide 32; or None, if the kernel has neither.
    """
    kept = ops.cast(ops.not_equal(to_matrix(x, axis), 0), "int32")
    size, columns = kept.shape
    if not size % 4 and not nm_violations(kept, "2:4"):
        return "2:4"
    blocks = -(-size // ROWS)
    kept = ops.pad(kept, ((0, blocks * ROWS - size), (0, 0)))
    counts = ops.sum(ops.reshape(kept, (blocks, ROWS, columns)), axis=1)
    # In a last block of fewer rows, half of them.
    rows = np.minimum(ROWS, size - ROWS * np.arange(blocks)).astype("int32")
    is_half = ops.all(ops.less_equal(counts, rows[:, None] // 2))
    return "16:32" if is_half else None


def pack_bits(mask: Any) -> Any:
    """Packs a boolean tensor to one bit an entry.

    Args:
        mask: Boolean tensor of any shape.

    Returns:
        uint8 tensor of shape `(ceil(mask.size / 8),)`. Bit b of byte i holds
        entry `b * ceil(mask.size / 8) + i` of the flattened mask; bits past
        the end are 0.

    Example:

    ```python
    import numpy as np
    from keras_weightmods.ops import pack_bits, unpack_bits

    mask = np.arange(10).reshape(2, 5) % 3 == 0
    packed = pack_bits(mask)
    assert packed.shape == (2,)
    assert np.array_equal(np.array(unpack_bits(packed, (2, 5))), mask)
    ```
    """
    mask = checks.check_tensor("mask", mask)
    size = math.prod(mask.shape)
    flat = ops.reshape(ops.cast(mask, "uint8"), (size,))
    flat = ops.pad(flat, (0, -size % 8)) if size % 8 else flat
    planes = ops.reshape(flat, (8, packed_size(size)))
    packed = planes[0]
    for bit in range(1, 8):
        plane = ops.left_shift(planes[bit], ops.cast(bit, "uint8"))
        packed = ops.bitwise_or(packed, plane)
    return packed


def unpack_bits(packed: Any, shape: Any) -> Any:
    """Undoes `pack_bits` for a mask of `shape`; returns a boolean tensor."""
    packed = checks.check_tensor("packed", packed)
    shape = checks.check_shape("shape", shape)
    expected = (packed_size(math.prod(shape)),), "uint8"
    dtype = keras.backend.standardize_dtype(packed.dtype)
    if (tuple(packed.shape), dtype) != expected:
        raise ValueError(
            f"`packed` must be what `pack_bits` makes of a mask of {shape}, of "
            f"shape {expected[0]} and dtype uint8. Received: "
            f"packed.shape={tuple(packed.shape)}, dtype={dtype}"
        )
    # If the leading axes can be split in 8, the planes split only these. XLA
    # then finds the bit of an entry without a division.
    packed = ops.reshape(packed, (1, -1, _trailing_size(shape)))
    bits = ops.cast([1, 2, 4, 8, 16, 32, 64, 128], "uint8")
    planes = ops.bitwise_and(packed, ops.reshape(bits, (8, 1, 1)))
    mask = ops.not_equal(planes, 0)
    if (size := math.prod(shape)) % 8:
        mask = ops.reshape(mask, (-1,))[:size]
    return ops.reshape(mask, shape)


def packed_size(size: Any) -> Any:
    """Return the bytes that `pack_bits` needs for `size` entries."""
    return -(-size // 8)


def check_groups(size: int, m: int, shape: Any, axis: Any = 0) -> None:
    """Raise ValueError unless axes of `size` entries divide into groups."""
    if size % m:
        raise ValueError(
            "The size of the contraction axes must be a multiple of the group "
            f"size m={m}. Received: shape={tuple(shape)}, axis={axis}, "
            f"which is {size} entries. Choose another m or leave this tensor "
            "out; it is never padded."
        )


def _to_groups(x: Any, m: Any, axis: Any) -> Any:
    matrix = to_matrix(x, axis)
    size, columns = matrix.shape
    check_groups(size, m, x.shape, axis)
    return ops.reshape(matrix, (size // m, m, columns))


def _ranks(scores: Any, m: Any) -> Any:
    """Return the ranks of scores in their groups (axis 1), 0 the largest."""
    if m > _MAX_COMPARED:
        order = ops.argsort(ops.negative(scores), axis=1)
        return ops.argsort(order, axis=1)
    if m > _MAX_PAIRS:
        ranks = ops.zeros_like(scores, dtype="uint8")
        for i in range(m):
            own = scores[:, i : i + 1]
            earlier = ops.greater(own, scores[:, : i + 1])
            later = ops.greater_equal(own, scores[:, i + 1 :])
            loses = ops.concatenate([earlier, later], axis=1)
            ranks = ranks + ops.cast(loses, "uint8")
        return ranks
    columns = [scores[:, i] for i in range(m)]
    ranks = [ops.zeros_like(columns[0], dtype="uint8")] * m
    for i in range(m):
        for j in range(i + 1, m):
            later_wins = ops.cast(ops.greater(columns[j], columns[i]), "uint8")
            ranks[i] = ranks[i] + later_wins
            ranks[j] = ranks[j] + (1 - later_wins)
    return ops.stack(ranks, axis=1)


def _trailing_size(shape: Any) -> Any:
    """Return the size of the axes behind the fewest with a multiple of 8."""
    for i in range(1, len(shape) + 1):
        if math.prod(shape[:i]) % 8 == 0:
            return math.prod(shape[i:])
    return 1
