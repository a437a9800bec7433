"""Where the values, places and scales of a packed kernel lie in its arrays.

A kernel W has the shape (K, N), with the contraction K. At most two of every
four consecutive entries of a column are nonzero. Two are kept, with two bits
each for their places. The arrays have blocks of 16 columns and 32 rows:

- NB = ceil(N / 16) and KB = ceil(K / 32). Places beyond N and K hold zeros.
- `meta`: int32 (NB, KB, 16). Slot s = 2g + t holds kept value t of group g, of
  the 8 groups in a block. Bits 2s and 2s + 1 are its place in the group.
- `values` in float32: (NB, 16 KB, 16), a row for each slot. In bfloat16: (NB, 8
  KB, 16, 2), the two of a group side by side. In int8: (NB, KB, 4, 16, 4), with
  slot p + 4q at [:, :, p, :, q]. In int4: uint8 (NB, KB, 2, 16, 4), with the
  words p and p + 2 of int8 in the low and the high half of each byte, in two's
  complement.
- `scale` for int8: float32 (NB, 16), one for each column. For fewer bits:
  bfloat16 (NB, ceil(KB / 2), 16), one for each 64 rows of a column.

This takes 0.53 of the bytes of a float32 kernel, 0.28 in bfloat16, 0.16 in int8
and 0.10 in int4 (3.25 bits a weight).

A kernel of pattern 16:32 has at most 16 nonzeros in each 32 rows of a column,
as one of 8:16, 4:8 or fewer has. It takes as many bytes:

- `meta`: int32 (NB, KB, 8, 2), a mask of 512 bits a block. Word g, the low half
  first, has the rows 4g + q: bit 4j + q is for column j.
- `values`: the values of the set bits, in their order, then zeros. Floats are
  read as (NB, KB, 256), and so are the words of integers, (NB, KB, 4, 16, 4).
  In int4 the words p and p + 2 share a byte.

So the bits and the values are those of the dense int8 layout below.

A dense matrix in integers of b bits, 2 to 6 or 8, has no `meta`, and keeps all
rows. Its `values`, int8 or uint8 (NB, KB, b, 16, 4), are b lines for the eight
words of a block. Word g holds the rows 4g + q, and in int8 is line g. With
fewer bits, line p holds as many of the words p, p + b, ... as fit whole into
its bytes, from the lowest bits on. The remaining bits of all lines, one line
after the other, hold the other words. In int4 the words g and g + 4 are the
halves of a byte. In int3 line p has the words p and p + 3. Bits 6 and 7 of line
0 and bit 6 of line 1 are the three bits of word 6. With the scales this takes b
+ 1/4 bits a weight.
"""

from typing import Any

import numpy as np

from keras_weightmods.utils import checks

COLUMNS = 16
ROWS = 32
SLOTS = 16

GROUP = 64  # rows of a scale of integers of fewer than 8 bits

VALUE_TYPES = ("float32", "bfloat16", "int8", "int4")
# At most half of the rows are kept, with two bits for each place, or a mask.
PATTERNS = ("2:4", "16:32")
# The types of dense matrices.
INTEGERS = ("int2", "int3", "int4", "int5", "int6", "int8")
ACTIVATIONS = ("float32", "int8")


def packed_arrays(
    shape: tuple[int, int], dtype: str, pattern: str | None = "2:4"
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return the shapes and types of the arrays of a packed kernel.

    Args:
        shape: Pair of ints (K, N), the shape of the kernel.
        dtype: String, type of the kept values: `"float32"`, `"bfloat16"`,
            `"int8"` or `"int4"`. For a dense matrix `"int8"`, or `"int2"` to
            `"int6"`.
        pattern: String, `"2:4"` or `"16:32"`; None for a dense matrix without
            `"meta"`. Defaults to `"2:4"`.

    Returns:
        Dict of `(shape, dtype)` for `"values"`, `"meta"` and, with integers,
        `"scale"`.

    Raises:
        ValueError: If an argument is none of these.

    Example:

    ```python
    from keras_weightmods.ops import packed_arrays

    arrays = packed_arrays((576, 1536), "int8")
    assert arrays["values"] == ((96, 18, 4, 16, 4), "int8")
    assert arrays["meta"] == ((96, 18, 16), "int32")
    assert arrays["scale"] == ((96, 16), "float32")
    ```
    """
    if len(checks.check_shape("shape", shape)) != 2:
        expected = "a pair (K, N) of ints, the contraction and the outputs"
        raise checks.error("shape", expected, shape)
    checks.check_choice("pattern", pattern, (None, *PATTERNS))
    is_dense = pattern is None
    checks.check_choice("dtype", dtype, INTEGERS if is_dense else VALUE_TYPES)
    rows, columns = -(-shape[0] // ROWS), -(-shape[1] // COLUMNS)
    arrays: dict[str, Any] = {}
    if dtype in INTEGERS:
        lines = (ROWS if is_dense else SLOTS) * bits_of(dtype) // ROWS
        kind = "int8" if dtype == "int8" else "uint8"
        arrays["values"] = (columns, rows, lines, COLUMNS, 4), kind
    elif dtype == "bfloat16":
        arrays["values"] = (columns, rows * SLOTS // 2, COLUMNS, 2), dtype
    else:
        arrays["values"] = (columns, rows * SLOTS, COLUMNS), dtype
    if not is_dense:
        bits = (COLUMNS,) if pattern == "2:4" else (8, 2)
        arrays["meta"] = (columns, rows, *bits), "int32"
    if is_grouped(dtype):
        arrays["scale"] = (columns, -(-rows // 2), COLUMNS), "bfloat16"
    elif dtype == "int8":
        arrays["scale"] = (columns, COLUMNS), "float32"
    return arrays


def bits_of(dtype: str) -> int:
    """Return the bits of a type of integers."""
    return int(dtype.removeprefix("int"))


def is_grouped(dtype: str) -> bool:
    """Return whether each `GROUP` rows of a column have a scale."""
    return dtype in INTEGERS and dtype != "int8"


def pattern_of(meta: Any) -> str | None:
    """Return the pattern of a packed kernel, from its `meta`."""
    if meta is None:
        return None
    return "2:4" if len(meta.shape) == 3 else "16:32"


def dtype_of(values: Any, kind: str, pattern: str | None) -> str:
    """Return the type of packed values.

    Args:
        values: Their array.
        kind: String, the type of its entries.
        pattern: String, as of `packed_arrays`.
    """
    if pattern is None:
        return f"int{values.shape[2]}"
    return "int4" if kind == "uint8" else kind


def words(xp: Any, values: Any, dtype: str) -> Any:
    """Return int8 values as they are, others as int32 laid out as int8."""
    if dtype == "int8":
        return values
    bits, (*blocks, lines, columns, run) = bits_of(dtype), xp.shape(values)
    count, left = 8 // bits, 8 % bits
    values = cast(xp, values, "int32")[:, :, None]

    def fields(places: Any, size: int) -> Any:
        """Return `size` bits from each of these bits of the bytes on."""
        places = xp.reshape(places, (-1, 1, 1, 1))
        mask = (2**size - 1) * xp.ones((1,), dtype="int32")
        return xp.bitwise_and(xp.right_shift(values, places), mask)

    found = fields(xp.arange(0, count * bits, bits, dtype="int32"), bits)
    found = xp.reshape(found, (*blocks, count * lines, columns, run))
    if left:
        # The remaining bits of all lines, one after the other.
        stream = fields(xp.arange(count * bits, 8, dtype="int32"), 1)
        stream = xp.swapaxes(stream, 2, 3)
        stream = xp.reshape(stream, (*blocks, left, bits, columns, run))
        places = xp.reshape(xp.arange(bits, dtype="int32"), (-1, 1, 1))
        others = xp.sum(xp.left_shift(stream, places), axis=3)
        found = xp.concatenate([found, cast(xp, others, "int32")], axis=2)
    sign = 2 ** (bits - 1)
    return found - 2 * sign * cast(xp, xp.greater_equal(found, sign), "int32")


def cast(xp: Any, array: Any, dtype: str) -> Any:
    """Cast an array by NumPy, or a tensor by `keras.ops`."""
    return array.astype(dtype) if xp is np else xp.cast(array, dtype)
