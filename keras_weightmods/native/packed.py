"""A 2:4 kernel as its kept values and their places.

A kernel W of shape (K, N), K the contraction. Of every four consecutive
entries of a column at most two are nonzero; two are kept, and two bits each
say which. The arrays come in blocks of 16 columns and 32 rows:

- NB = ceil(N / 16) and KB = ceil(K / 32); what is beyond N and K holds zeros.
- `meta`, int32 (NB, KB, 16): bits 2s and 2s + 1 are the place in its group of
  slot s = 2g + t, kept value t of group g of the 8 in a block.
- `values`: float32 (NB, 16 KB, 16), a row for each slot; bfloat16
  (NB, 8 KB, 16, 2), the two of a group side by side; int8 (NB, KB, 4, 16, 4)
  with slot p + 4q at [:, :, p, :, q].
- `scale`, float32 (NB, 16), with int8 only: one for each column.

That is 0.53 of the bytes of a float32 kernel, 0.28 in bfloat16, 0.16 in int8.
"""

import dataclasses
from typing import Any

import keras
import ml_dtypes
import numpy as np
from keras import ops

from keras_weightmods import native
from keras_weightmods.utils import checks

_COLUMNS = 16
_ROWS = 32
_SLOTS = 16

VALUE_TYPES = ("float32", "bfloat16", "int8")


@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
    """A packed 2:4 kernel: what `pack_kernel` returns.

    The arrays may be NumPy arrays, tensors of the backend or Keras variables;
    `packed_arrays` gives their shapes, and the module the layout.

    Args:
        values: Array of the kept values.
        meta: int32 array of their places, two bits each.
        scale: float32 array of a scale for each column with int8 values,
            else None.
        shape: Pair of ints (K, N), the shape of the kernel.
        dtype: String, type of the values: `"float32"`, `"bfloat16"` or
            `"int8"`.

    Raises:
        ValueError: If an array has not the shape and type that it must have.

    Example:

    ```python
    import numpy as np
    from keras_weightmods.ops import pack_kernel

    packed = pack_kernel(np.array([[3.0], [0.0], [0.0], [-2.0]]))
    assert packed.shape == (4, 1) and packed.dtype == "float32"
    assert packed.values.shape == (1, 16, 16)
    ```
    """

    values: Any
    meta: Any
    scale: Any
    shape: tuple[int, int]
    dtype: str

    def __post_init__(self) -> None:
        for name, (shape, dtype) in packed_arrays(
            self.shape, self.dtype
        ).items():
            array = getattr(self, name)
            received: Any = None
            if array is not None:
                kind = keras.backend.standardize_dtype(array.dtype)
                received = tuple(array.shape), kind
            if received != (shape, dtype):
                raise ValueError(
                    f"`{name}` of a packed kernel of shape {self.shape} and "
                    f"type {self.dtype} must be an array of shape {shape} and "
                    f"type {dtype}. Received: {received}"
                )
        if self.dtype != "int8" and self.scale is not None:
            raise checks.error("scale", "None without int8 values", self.scale)


def packed_arrays(
    shape: tuple[int, int], dtype: str
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return the shapes and types of the arrays of a packed kernel.

    Args:
        shape: Pair of ints (K, N), the shape of the kernel.
        dtype: String, type of the kept values: `"float32"`, `"bfloat16"` or
            `"int8"`.

    Returns:
        Dict of `(shape, dtype)` for `"values"`, `"meta"` and, with int8,
        `"scale"`.

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
    checks.check_choice("dtype", dtype, VALUE_TYPES)
    rows, columns = -(-shape[0] // _ROWS), -(-shape[1] // _COLUMNS)
    values = {
        "float32": (columns, rows * _SLOTS, _COLUMNS),
        "bfloat16": (columns, rows * _SLOTS // 2, _COLUMNS, 2),
        "int8": (columns, rows, _SLOTS // 4, _COLUMNS, 4),
    }
    arrays = {
        "values": (values[dtype], dtype),
        "meta": ((columns, rows, _COLUMNS), "int32"),
    }
    if dtype == "int8":
        arrays["scale"] = ((columns, _COLUMNS), "float32")
    return arrays


def pack_kernel(kernel: Any, dtype: str | None = None) -> Packed:
    """Pack a 2:4 kernel.

    float32 values are kept as they are. bfloat16 rounds them to the nearest;
    int8 rounds to multiples of a scale, max |w| / 127 of the column.

    Args:
        kernel: Array, tensor or variable of shape (K, N), exactly 2:4 along
            K, the contraction. A last group of fewer than four may hold two
            nonzeros as well.
        dtype: String, type of the kept values: `"float32"`, `"bfloat16"` or
            `"int8"`. Defaults to bfloat16 for a bfloat16 kernel, and float32
            for any other.

    Returns:
        `Packed` of NumPy arrays.

    Raises:
        ValueError: If the kernel is no matrix, or not 2:4.

    Example:

    ```python
    import numpy as np
    from keras_weightmods.ops import nm_project, pack_kernel, unpack_kernel

    kernel = np.random.default_rng(0).normal(size=(64, 32))
    kernel = np.array(nm_project(kernel.astype("float32"), "2:4"))
    packed = pack_kernel(kernel)
    assert np.array_equal(unpack_kernel(packed), kernel)
    ```
    """
    rank = len(getattr(kernel, "shape", ()))
    if rank != 2:
        raise ValueError(
            "`kernel` must be a matrix (K, N), the contraction axis first. "
            f"Received: {type(kernel).__name__} with {rank} axes"
        )
    if dtype is None:
        given = keras.backend.standardize_dtype(kernel.dtype)
        dtype = "bfloat16" if given == "bfloat16" else "float32"
    shape = (int(kernel.shape[0]), int(kernel.shape[1]))
    specs = packed_arrays(shape, dtype)
    kernel = _to_numpy(kernel, np.float32)
    pack = _pack_native if native.is_available() else _pack_numpy
    arrays, bad = pack(kernel, dtype, specs)
    if bad:
        raise ValueError(
            "`kernel` must be 2:4 along its first axis: at most two nonzeros "
            "in every four consecutive entries of a column. Received: a "
            f"kernel of shape {shape} with {bad} of "
            f"{-(-shape[0] // 4) * shape[1]} groups holding more. Make it 2:4 "
            "first, for example by `keras_weightmods.ops.nm_project`."
        )
    return Packed(
        arrays["values"], arrays["meta"], arrays.get("scale"), shape, dtype
    )


def unpack_kernel(packed: Packed) -> Any:
    """Undo `pack_kernel`.

    Args:
        packed: `Packed`, of NumPy arrays, tensors or variables.

    Returns:
        float32 NumPy array of shape (K, N): the kernel that was packed, where
        the values are float32 (a negative zero comes back as zero), or what
        rounding made of it.

    Raises:
        ValueError: If `packed` is not `Packed`.

    Example:

    ```python
    import numpy as np
    from keras_weightmods.ops import pack_kernel, unpack_kernel

    packed = pack_kernel(np.array([[3.0], [0.0], [0.0], [-2.0]]), "bfloat16")
    assert unpack_kernel(packed).ravel().tolist() == [3.0, 0.0, 0.0, -2.0]
    ```
    """
    check_packed(packed)
    arrays = {
        name: _to_numpy(getattr(packed, name), _numpy_type(dtype))
        for name, (_, dtype) in packed_arrays(
            packed.shape, packed.dtype
        ).items()
    }
    if not native.is_available():
        values = arrays["values"].astype(np.float32)
        return _unpack(np, packed, values, arrays["meta"], arrays.get("scale"))
    kernel = np.empty(packed.shape, np.float32)
    kind = *packed.shape, native.type_code(packed.dtype)
    native.library().kwm_unpack(*_pointers(arrays), *kind, kernel.ctypes.data)
    return kernel


def check_packed(packed: Any) -> None:
    """Raise ValueError unless this is `Packed`."""
    if not isinstance(packed, Packed):
        raise checks.error("packed", "what `pack_kernel` returns", packed)


def unpack_tensor(packed: Packed) -> Any:
    """Return `unpack_kernel` by `keras.ops`, as a tensor, traced or not."""
    values, meta, scale = (
        None if array is None else ops.convert_to_tensor(array)
        for array in (packed.values, packed.meta, packed.scale)
    )
    return _unpack(ops, packed, ops.cast(values, "float32"), meta, scale)


def dense_matmul(x: Any, packed: Packed) -> Any:
    """Return `ops.sparse_matmul` by a kernel that is unpacked in this call."""
    y = ops.matmul(ops.cast(x, "float32"), unpack_tensor(packed))
    return ops.cast(y, x.dtype)


def _unpack(xp: Any, packed: Packed, values: Any, meta: Any, scale: Any) -> Any:
    """By the functions of `xp`, which is NumPy or `keras.ops`."""
    blocks, rows, _ = meta.shape
    shifts = xp.arange(0, 2 * _SLOTS, 2, dtype="int32")
    shifts = xp.reshape(shifts, (_SLOTS, 1))
    places = xp.bitwise_and(
        xp.right_shift(xp.expand_dims(meta, 2), shifts),
        xp.full((1,), 3, dtype="int32"),
    )
    if packed.dtype == "int8":
        # Slot p + 4q is at [:, :, p, :, q].
        values = xp.transpose(values, (0, 1, 4, 2, 3))
        values = values * xp.reshape(scale, (blocks, 1, 1, 1, _COLUMNS))
    elif packed.dtype == "bfloat16":
        values = xp.transpose(values, (0, 1, 3, 2))

    # (column block, row block, group, kept value, place in the group, column)
    shape = (blocks, rows, _SLOTS // 2, 2, 1, _COLUMNS)
    places, values = xp.reshape(places, shape), xp.reshape(values, shape)
    here = xp.reshape(xp.arange(4, dtype="int32"), (4, 1))
    # Selected, not multiplied: a NaN stays in its place.
    kernel = xp.where(xp.equal(places, here), values, xp.zeros_like(values))
    kernel = xp.transpose(xp.sum(kernel, axis=3), (1, 2, 3, 0, 4))
    kernel = xp.reshape(kernel, (rows * _ROWS, blocks * _COLUMNS))
    return kernel[: packed.shape[0], : packed.shape[1]]


def _pack_native(kernel: Any, dtype: str, specs: Any) -> Any:
    arrays = {
        name: np.empty(shape, _numpy_type(array_dtype))
        for name, (shape, array_dtype) in specs.items()
    }
    kind = *kernel.shape, native.type_code(dtype)
    bad = native.library().kwm_pack(
        kernel.ctypes.data, *kind, *_pointers(arrays)
    )
    return arrays, bad


def _pointers(arrays: Any) -> Any:
    names = ("values", "meta", "scale")
    return [arrays[n].ctypes.data if n in arrays else None for n in names]


def _pack_numpy(kernel: Any, dtype: str, specs: Any) -> Any:
    columns, rows, _ = specs["meta"][0]
    padded = np.zeros((rows * _ROWS, columns * _COLUMNS), np.float32)
    padded[: kernel.shape[0], : kernel.shape[1]] = kernel
    groups = padded.reshape(rows * _ROWS // 4, 4, columns * _COLUMNS)
    nonzero = groups != 0
    bad = int(np.sum(nonzero.sum(axis=1) > 2))
    # The nonzeros, filled up by the first free places.
    places = np.argsort(~nonzero, axis=1, kind="stable")[:, :2]
    places = np.sort(places, axis=1)
    slots = np.take_along_axis(groups, places, axis=1)

    shifts = 2 * np.arange(_SLOTS, dtype=np.uint32)[:, None]
    bits = places.astype(np.uint32).reshape(rows, _SLOTS, columns * _COLUMNS)
    words = np.bitwise_or.reduce(bits << shifts, axis=1)
    words = words.reshape(rows, columns, _COLUMNS).transpose(1, 0, 2)
    arrays = {"meta": np.ascontiguousarray(words).view(np.int32)}

    if dtype == "int8":
        largest = np.abs(padded).max(axis=0, initial=0)
        scale = np.where(
            np.isfinite(largest), largest / np.float32(127), np.nan
        )
        scale[scale == 0] = 1
        slots = np.clip(np.nan_to_num(np.rint(slots / scale)), -127, 127)
        arrays["scale"] = scale.reshape(columns, _COLUMNS)
        slots = slots.reshape(rows, 4, 4, columns, _COLUMNS)
        values = slots.transpose(3, 0, 2, 4, 1)
    elif dtype == "bfloat16":
        slots = slots.reshape(rows * _SLOTS // 2, 2, columns, _COLUMNS)
        values = slots.transpose(2, 0, 3, 1)
    else:
        slots = slots.reshape(rows * _SLOTS, columns, _COLUMNS)
        values = slots.transpose(1, 0, 2)
    arrays["values"] = np.ascontiguousarray(values, _numpy_type(dtype))
    return arrays, bad


def _to_numpy(array: Any, dtype: Any) -> np.ndarray[Any, Any]:
    # On torch a bfloat16 tensor becomes a float32 array.
    if not isinstance(array, np.ndarray):
        array = ops.convert_to_numpy(array)
    return np.ascontiguousarray(array, dtype)


def _numpy_type(dtype: str) -> Any:
    return ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
