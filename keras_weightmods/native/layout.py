"""Sizes and types of packed arrays; `packed.py` says what is in them."""

from typing import Any

from keras_weightmods.utils import checks

COLUMNS = 16
ROWS = 32
SLOTS = 16

GROUP = 64  # rows of a scale of int4 values

VALUE_TYPES = ("float32", "bfloat16", "int8", "int4")
INTEGERS = ("int8", "int4")
ACTIVATIONS = ("float32", "int8")


def check_activations(activations: Any, dtype: str) -> None:
    """Raise ValueError unless values of this type take such activations."""
    checks.check_choice("dtype", dtype, VALUE_TYPES)
    checks.check_choice("activations", activations, ACTIVATIONS)
    if activations == "int8" and dtype not in INTEGERS:
        raise ValueError(
            "int8 activations need int8 or int4 values. Received: "
            f"activations='int8' with values of type {dtype}"
        )


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
    if not (
        isinstance(shape, tuple)
        and len(shape) == 2
        and all(isinstance(size, int) and size >= 0 for size in shape)
    ):
        raise ValueError(
            "`shape` must be a pair (K, N) of ints, the contraction and the "
            f"outputs. Received: shape={shape!r}"
        )
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
