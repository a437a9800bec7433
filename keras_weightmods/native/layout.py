"""Where the values, places and scales of a packed kernel lie in its arrays.

A kernel W of shape (K, N), K the contraction. Of every four consecutive
entries of a column at most two are nonzero; two are kept, and two bits each
say which. The arrays come in blocks of 16 columns and 32 rows:

- NB = ceil(N / 16) and KB = ceil(K / 32); what is beyond N and K holds zeros.
- `meta`, int32 (NB, KB, 16): bits 2s and 2s + 1 are the place in its group of
  slot s = 2g + t, kept value t of group g of the 8 in a block.
- `values`: float32 (NB, 16 KB, 16), a row for each slot; bfloat16
  (NB, 8 KB, 16, 2), the two of a group side by side; int8 (NB, KB, 4, 16, 4)
  with slot p + 4q at [:, :, p, :, q]; int4, as uint8 (NB, KB, 2, 16, 4), the
  words p and p + 2 of int8 in the low and the high half of each byte, in two's
  complement.
- `scale`, with int8 float32 (NB, 16), one for each column; with int4 bfloat16
  (NB, ceil(KB / 2), 16), one for each 64 rows of a column.

That is 0.53 of the bytes of a float32 kernel, 0.28 in bfloat16, 0.16 in int8,
0.10 in int4 (3.25 bits a weight).

A dense matrix in int8 or int4 has no `meta`, and all its rows: row 4g + q of a
block in int8 at [:, :, g, :, q] of (NB, KB, 8, 16, 4); in int4 as uint8
(NB, KB, 4, 16, 4), the words g and g + 4 in the two halves. Scales as above.
"""

from typing import Any

import numpy as np

from keras_weightmods.utils import checks

COLUMNS = 16
ROWS = 32
SLOTS = 16

GROUP = 64  # rows of a scale of int4 values

VALUE_TYPES = ("float32", "bfloat16", "int8", "int4")
INTEGERS = ("int8", "int4")
ACTIVATIONS = ("float32", "int8")


def packed_arrays(
    shape: tuple[int, int], dtype: str, is_dense: bool = False
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return the shapes and types of the arrays of a packed kernel.

    Args:
        shape: Pair of ints (K, N), the shape of the kernel.
        dtype: String, type of the kept values: `"float32"`, `"bfloat16"`,
            `"int8"` or `"int4"`.
        is_dense: Bool, True for a dense matrix without `"meta"`, in int8 or
            int4. Defaults to False.

    Returns:
        Dict of `(shape, dtype)` for `"values"`, `"meta"` and, with int8 and
        int4, `"scale"`.

    Raises:
        ValueError: If `shape` or `dtype` is none of these.

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
    checks.check_bool("is_dense", is_dense)
    checks.check_choice("dtype", dtype, INTEGERS if is_dense else VALUE_TYPES)
    rows, columns = -(-shape[0] // ROWS), -(-shape[1] // COLUMNS)
    slots = ROWS if is_dense else SLOTS
    values = {
        "float32": ((columns, rows * slots, COLUMNS), "float32"),
        "bfloat16": ((columns, rows * slots // 2, COLUMNS, 2), "bfloat16"),
        "int8": ((columns, rows, slots // 4, COLUMNS, 4), "int8"),
        "int4": ((columns, rows, slots // 8, COLUMNS, 4), "uint8"),
    }
    scales = {
        "int8": ((columns, COLUMNS), "float32"),
        "int4": ((columns, -(-rows // 2), COLUMNS), "bfloat16"),
    }
    arrays: dict[str, Any] = {"values": values[dtype]}
    if not is_dense:
        arrays["meta"] = (columns, rows, COLUMNS), "int32"
    if dtype in scales:
        arrays["scale"] = scales[dtype]
    return arrays


def words(xp: Any, values: Any, dtype: str) -> Any:
    """Return int8 values as they are, int4 ones as int32 laid out as int8."""
    if dtype == "int8":
        return values
    values = cast(xp, values, "int32")
    low = xp.bitwise_and(values, 15 * xp.ones((1,), dtype="int32"))
    high = xp.right_shift(values, 4 * xp.ones((1,), dtype="int32"))
    halves = xp.concatenate([low, high], axis=2)
    return halves - 16 * cast(xp, xp.greater(halves, 7), "int32")


def cast(xp: Any, array: Any, dtype: str) -> Any:
    """Cast an array by NumPy, or a tensor by `keras.ops`."""
    return array.astype(dtype) if xp is np else xp.cast(array, dtype)
