"""A 2:4 kernel as its kept values and their places; dense tables in integers.

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

int8 values are rounded to multiples of max |w| / 127 of the column. Those of
int4, -8 to 7, to multiples of one scale for each column and group of 64 rows:
with m the largest |w| of the group, the first of the candidates m / q, q as in
`_INT4_STEPS`, each divided in float32 and rounded to bfloat16, with the least
sum of squared errors. A kernel that lies on such a grid is kept as it is. To
have the same bits everywhere: values are divided by the scale in float32,
rounded to even, and clipped; the squares are summed in float64, one row after
the other. Candidates that are 0 or not finite are passed over; if none is left,
the scale is NaN where m is not finite, else 1, and the values are 0.

With int8 activations each row of x is rounded too, see `round_activations`.
"""

import dataclasses
import math
from typing import Any

import keras
import ml_dtypes
import numpy as np
from keras import ops

from keras_weightmods import native
from keras_weightmods.native.layout import ACTIVATIONS as ACTIVATIONS
from keras_weightmods.native.layout import COLUMNS, ROWS, SLOTS
from keras_weightmods.native.layout import GROUP as GROUP
from keras_weightmods.native.layout import INTEGERS as INTEGERS
from keras_weightmods.native.layout import VALUE_TYPES as VALUE_TYPES
from keras_weightmods.native.layout import (
    check_activations as check_activations,
)
from keras_weightmods.native.layout import packed_arrays as packed_arrays
from keras_weightmods.utils import checks

# Largest |w| over scale. With a negative scale the largest can be -8 times it.
_INT4_STEPS = (1, 2, 3, 4, 5, 6, 7, 7.5, 8, 8.5, 9, -7.5, -8, -8.5, -9)
_INT4_CHUNK = 1 << 16  # groups that are rounded at a time


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
    activations: str = "float32"

    def __post_init__(self) -> None:
        check_activations(self.activations, self.dtype)
        if self.is_dense and self.activations != "int8":
            raise ValueError(
                "`meta` can be None, for a dense matrix, with int8 activations "
                f"alone. Received: meta=None, type {self.dtype}, "
                f"activations={self.activations!r}"
            )
        for name, (shape, dtype) in packed_arrays(
            self.shape, self.dtype, self.is_dense
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
        if self.dtype not in INTEGERS and self.scale is not None:
            expected = "None without int8 or int4 values"
            raise checks.error("scale", expected, self.scale)

    @property
    def is_dense(self) -> bool:
        """Whether it is a dense matrix and not a 2:4 kernel."""
        return self.meta is None


def pack_kernel(
    kernel: Any, dtype: str | None = None, activations: str = "float32"
) -> Packed:
    """Pack a 2:4 kernel.

    float32 values are kept as they are. bfloat16 rounds them to the nearest;
    int8 to multiples of a scale, max |w| / 127 of the column; int4 to -8 to 7
    times a bfloat16 scale, the best of several for each column and 64 rows.
    A kernel that lies on such a grid already comes back as it was.

    Args:
        kernel: Array, tensor or variable of shape (K, N), exactly 2:4 along
            K, the contraction. A last group of fewer than four may hold two
            nonzeros as well.
        dtype: String, type of the kept values: `"float32"`, `"bfloat16"`,
            `"int8"` or `"int4"`. Defaults to bfloat16 for a bfloat16 kernel,
            and float32 for any other.
        activations: String, `"float32"` or `"int8"`, as in `Packed`. Defaults
            to `"float32"`.

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
    if not (ops.is_tensor(kernel) or isinstance(kernel, keras.Variable)):
        kernel = checks.check_array("kernel", kernel)
    shape = _matrix_shape(kernel)
    if dtype is None:
        given = keras.backend.standardize_dtype(kernel.dtype)
        dtype = "bfloat16" if given == "bfloat16" else "float32"
    check_activations(activations, dtype)
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
        **_fields(arrays), shape=shape, dtype=dtype, activations=activations
    )


def pack_dense(matrix: Any, dtype: str) -> Packed:
    """Round a dense matrix to int8 or int4, for int8 activations.

    Args:
        matrix: Array, tensor or variable of shape (K, N), K the contraction.
        dtype: String, `"int8"` or `"int4"`, rounded as in `pack_kernel`.

    Returns:
        `Packed` of NumPy arrays, without `meta`.

    Raises:
        ValueError: If it is no matrix, or `dtype` is none of these.

    Example:

    ```python
    import numpy as np
    from keras_weightmods.native.packed import pack_dense
    from keras_weightmods.ops import unpack_kernel

    matrix = np.arange(-8, 8, dtype="float32").reshape(4, 4)
    assert np.array_equal(unpack_kernel(pack_dense(matrix, "int4")), matrix)
    ```
    """
    _matrix_shape(matrix)
    steps, scale = round_matrix(_to_numpy(matrix, np.float32), dtype)
    return dense_of_steps(steps, scale, dtype)


def round_matrix(matrix: Any, dtype: str) -> Any:
    """Round a dense matrix to int8 or int4.

    Args:
        matrix: float32 NumPy array of shape (K, N), K the contraction.
        dtype: String, `"int8"` or `"int4"`.

    Returns:
        Pair of an int8 array (K, N), the values, and their scales: float32
        (1, N) with int8, bfloat16 (ceil(K / 64), N) with int4.
    """
    checks.check_choice("dtype", dtype, INTEGERS)
    if dtype == "int8":
        scale = _int8_scale(matrix)
        return _int8_steps(matrix, scale), scale[None]
    return _round_groups(matrix, GROUP)


def dense_of_steps(steps: Any, scale: Any, dtype: str) -> Packed:
    """Return the `Packed` of what `round_matrix` returns."""
    shape = steps.shape
    specs = packed_arrays(shape, dtype, is_dense=True)
    columns, rows = specs["values"][0][:2]
    padded = _padded(steps, np.int8, columns, rows)
    padded = padded.reshape(rows, 8, 4, columns, COLUMNS)
    arrays = {
        "values": _halves(padded.transpose(3, 0, 1, 4, 2), dtype),
        "scale": lay_out_scale(scale, specs["scale"]),
    }
    return Packed(
        **_fields(arrays), shape=shape, dtype=dtype, activations="int8"
    )


def steps_of_dense(packed: Packed) -> Any:
    """Return what `dense_of_steps` takes, from `Packed` of any arrays."""
    values, scale = (
        _to_numpy(getattr(packed, name), _numpy_type(dtype))
        for name, (_, dtype) in packed_arrays(
            packed.shape, packed.dtype, is_dense=True
        ).items()
    )
    (k, n), width = packed.shape, len(values) * COLUMNS
    steps = words(np, values, packed.dtype).transpose(1, 2, 4, 0, 3)
    steps = steps.reshape(-(-k // ROWS) * ROWS, width)[:k, :n]
    return steps.astype(np.int8), _rows_of_scale(scale, packed.dtype, k, n)


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
            packed.shape, packed.dtype, packed.is_dense
        ).items()
    }
    if packed.is_dense or not native.is_available():
        return _unpack(np, packed, **arrays)
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
    arrays = {
        name: ops.convert_to_tensor(array)
        for name in _NAMES
        if (array := getattr(packed, name)) is not None
    }
    return _unpack(ops, packed, **arrays)


def dense_matmul(x: Any, packed: Packed) -> Any:
    """Return `ops.sparse_matmul` by a kernel that is unpacked in this call."""
    rounded = ops.cast(x, "float32")
    if packed.activations == "int8":
        rounded = round_activations(rounded)
    return ops.cast(ops.matmul(rounded, unpack_tensor(packed)), x.dtype)


def round_activations(x: Any) -> Any:
    """Round each row in blocks of 32 entries, as int8 activations are.

    A block becomes multiples, -127 to 127, of s = max |x| / 127. One that holds
    NaN or infinity becomes NaN. Gradients pass as if nothing was rounded.

    Args:
        x: float32 tensor of shape (..., K).

    Returns:
        float32 tensor of the same shape.
    """
    size = x.shape[-1]
    missing = -size % ROWS
    blocks = ops.stop_gradient(x)
    if missing:
        pads = [(0, 0)] * (len(x.shape) - 1) + [(0, missing)]
        blocks = ops.pad(blocks, pads)
    leading = ops.shape(x)[:-1]
    count = (size + missing) // ROWS
    blocks = ops.reshape(blocks, (*leading, count, ROWS))
    scale = ops.max(ops.abs(blocks), axis=-1, keepdims=True) / 127
    scale = ops.where(ops.equal(scale, 0), ops.ones_like(scale), scale)
    rounded = ops.round(blocks / scale) * scale
    rounded = ops.reshape(rounded, (*leading, count * ROWS))[..., :size]
    return x + (rounded - ops.stop_gradient(x))


def _unpack(
    xp: Any, packed: Packed, values: Any, meta: Any = None, scale: Any = None
) -> Any:
    """By the functions of `xp`, which is NumPy or `keras.ops`.

    Neither `repeat` nor `full` are used: on torch they read a number from the
    GPU, which a CUDA graph forbids.
    """
    blocks, slots = values.shape[0], ROWS if packed.is_dense else SLOTS
    rows = -(-packed.shape[0] // ROWS)
    if packed.dtype in INTEGERS:
        # (column block, row block, slot, column)
        values = words(xp, values, packed.dtype)
        # Slot p + 4q is at [:, :, p, :, q], row 4g + q at [:, :, g, :, q].
        order = (0, 1, 2, 4, 3) if packed.is_dense else (0, 1, 4, 2, 3)
        values = xp.transpose(values, order)
        values = xp.reshape(values, (blocks, rows, slots, COLUMNS))
        scale = cast(xp, scale, "float32")
        count = 1 if packed.dtype == "int8" else -(-rows // 2)
        scale = xp.reshape(scale, (blocks, count, 1, COLUMNS))
        if packed.dtype == "int4":
            scale = xp.stack([scale, scale], axis=2)
            scale = xp.reshape(scale, (blocks, 2 * count, 1, COLUMNS))
            scale = scale[:, :rows]
        values = cast(xp, values, "float32") * scale
    elif packed.dtype == "bfloat16":
        values = xp.transpose(values, (0, 1, 3, 2))
    values = cast(xp, values, "float32")
    if packed.is_dense:
        kernel = xp.transpose(values, (1, 2, 0, 3))
    else:
        shifts = xp.arange(0, 2 * SLOTS, 2, dtype="int32")
        shifts = xp.reshape(shifts, (SLOTS, 1))
        places = xp.bitwise_and(
            xp.right_shift(xp.expand_dims(meta, 2), shifts),
            3 * xp.ones((1,), dtype="int32"),
        )
        # (column block, row block, group, kept value, place in it, column)
        shape = (blocks, rows, SLOTS // 2, 2, 1, COLUMNS)
        places, values = xp.reshape(places, shape), xp.reshape(values, shape)
        here = xp.reshape(xp.arange(4, dtype="int32"), (4, 1))
        # Selected, not multiplied: a NaN stays in its place.
        kernel = xp.where(xp.equal(places, here), values, xp.zeros_like(values))
        kernel = xp.transpose(xp.sum(kernel, axis=3), (1, 2, 3, 0, 4))
    kernel = xp.reshape(kernel, (rows * ROWS, blocks * COLUMNS))
    return kernel[: packed.shape[0], : packed.shape[1]]


def words(xp: Any, values: Any, dtype: str) -> Any:
    """int8 values as they are, int4 ones as int32 in the layout of int8."""
    if dtype == "int8":
        return values
    values = cast(xp, values, "int32")
    low = xp.bitwise_and(values, 15 * xp.ones((1,), dtype="int32"))
    high = xp.right_shift(values, 4 * xp.ones((1,), dtype="int32"))
    halves = xp.concatenate([low, high], axis=2)
    return halves - 16 * cast(xp, xp.greater(halves, 7), "int32")


def cast(xp: Any, array: Any, dtype: str) -> Any:
    """Cast an array by NumPy, or a tensor by `keras.ops`."""
    return array.astype(dtype) if xp is np else ops.cast(array, dtype)


def _halves(words: Any, dtype: str) -> Any:
    """What `words` undoes, by NumPy, of int8 words."""
    words = np.ascontiguousarray(words, np.int8)
    if dtype == "int8":
        return words
    low, high = np.split(words.view(np.uint8), 2, axis=2)
    return (low & 15) | (high << 4)


def values_of_slots(slots: Any, dtype: str) -> Any:
    """Return the array `values` of kept values, a NumPy array (16 KB, 16 NB).

    Slot s of block b is row 16 b + s.
    """
    rows, columns = slots.shape[0] // SLOTS, slots.shape[1] // COLUMNS
    if dtype in INTEGERS:
        slots = slots.reshape(rows, 4, 4, columns, COLUMNS)
        return _halves(slots.transpose(3, 0, 2, 4, 1), dtype)
    if dtype == "bfloat16":
        slots = slots.reshape(rows * SLOTS // 2, 2, columns, COLUMNS)
        slots = slots.transpose(2, 0, 3, 1)
    else:
        slots = slots.reshape(rows * SLOTS, columns, COLUMNS)
        slots = slots.transpose(1, 0, 2)
    return np.ascontiguousarray(slots, _numpy_type(dtype))


def values_at(kernel: Any, meta: Any, dtype: str, scale: Any) -> Any:
    """Return the array `values` of a kernel that was unpacked.

    Args:
        kernel: NumPy array of shape (K, N), what `unpack_kernel` returned, in
            half precision maybe.
        meta: int32 NumPy array, its places; None of a dense matrix.
        dtype: String, `"int8"` or `"int4"`.
        scale: NumPy array, its scales.
    """
    k, n = kernel.shape
    rows = _rows_of_scale(scale.astype(np.float32), dtype, k, n)
    spread = np.repeat(rows, GROUP, axis=0)[:k] if dtype == "int4" else rows
    steps = np.nan_to_num(np.rint(kernel.astype(np.float32) / spread))
    if meta is None:
        return dense_of_steps(steps.astype(np.int8), rows, dtype).values
    groups = _padded(steps, np.int8, len(meta), meta.shape[1])
    groups = groups.reshape(-1, 4, groups.shape[1])
    shifts = np.arange(0, 2 * SLOTS, 2, dtype=np.int32)[:, None]
    places = (meta[:, :, None] >> shifts) & 3
    places = places.transpose(1, 2, 0, 3).reshape(len(groups), 2, -1)
    slots = np.take_along_axis(groups, places, axis=1)
    return values_of_slots(slots.reshape(-1, groups.shape[2]), dtype)


def _matrix_shape(matrix: Any) -> tuple[int, int]:
    rank = len(getattr(matrix, "shape", ()))
    if rank != 2:
        raise ValueError(
            "`kernel` must be a matrix (K, N), the contraction axis first. "
            f"Received: {type(matrix).__name__} with {rank} axes"
        )
    return int(matrix.shape[0]), int(matrix.shape[1])


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


_NAMES = ("values", "meta", "scale")


def _pointers(arrays: Any) -> Any:
    return [arrays[n].ctypes.data if n in arrays else None for n in _NAMES]


def _fields(arrays: Any) -> Any:
    return {name: arrays.get(name) for name in _NAMES}


def _pack_numpy(kernel: Any, dtype: str, specs: Any) -> Any:
    columns, rows, _ = specs["meta"][0]
    padded = _padded(kernel, np.float32, columns, rows)
    groups = padded.reshape(rows * ROWS // 4, 4, columns * COLUMNS)
    nonzero = groups != 0
    bad = int(np.sum(nonzero.sum(axis=1) > 2))
    # The nonzeros, filled up by the first free places.
    places = np.argsort(~nonzero, axis=1, kind="stable")[:, :2]
    places = np.sort(places, axis=1)
    slots = np.take_along_axis(groups, places, axis=1)
    slots = slots.reshape(rows * SLOTS, columns * COLUMNS)

    shifts = 2 * np.arange(SLOTS, dtype=np.uint32)[:, None]
    bits = places.astype(np.uint32).reshape(rows, SLOTS, columns * COLUMNS)
    words = np.bitwise_or.reduce(bits << shifts, axis=1)
    words = words.reshape(rows, columns, COLUMNS).transpose(1, 0, 2)
    arrays = {"meta": np.ascontiguousarray(words).view(np.int32)}

    if dtype == "int8":
        scale = _int8_scale(padded)
        arrays["scale"] = scale.reshape(columns, COLUMNS)
        slots = _int8_steps(slots, scale)
    elif dtype == "int4":
        # Half as many kept values as rows in a group.
        steps, scale = _round_groups(slots, GROUP // 2)
        arrays["scale"] = lay_out_scale(scale, specs["scale"])
        slots = steps
    arrays["values"] = values_of_slots(slots, dtype)
    return arrays, bad


def _padded(matrix: Any, dtype: Any, columns: int, rows: int) -> Any:
    padded = np.zeros((rows * ROWS, columns * COLUMNS), dtype)
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    return padded


def _int8_scale(matrix: Any) -> Any:
    """The scale of each column, in float32."""
    largest = np.abs(matrix).max(axis=0, initial=0)
    scale = np.where(np.isfinite(largest), largest / np.float32(127), np.nan)
    scale[scale == 0] = 1
    return scale.astype(np.float32)


def _int8_steps(matrix: Any, scale: Any) -> Any:
    steps = np.nan_to_num(np.rint(matrix / scale))
    return np.clip(steps, -127, 127).astype(np.int8)


def _round_groups(matrix: Any, size: int) -> Any:
    """int4 steps of a matrix, and the scales of each `size` rows of it."""
    steps = np.empty(matrix.shape, np.int8)
    count = -(-len(matrix) // size)
    scale = np.empty((count, matrix.shape[1]), ml_dtypes.bfloat16)
    for group in range(count):
        rows = slice(group * size, (group + 1) * size)
        for start in range(0, matrix.shape[1], _INT4_CHUNK):
            columns = slice(start, start + _INT4_CHUNK)
            chosen = _round_int4(np.ascontiguousarray(matrix[rows, columns]))
            steps[rows, columns], scale[group, columns] = chosen
    return steps, scale


def _round_int4(group: Any) -> Any:
    """int4 steps of rows with one scale for each column, and the scales."""
    largest = np.abs(group).max(axis=0, initial=0)
    best = np.full(largest.shape, np.inf)
    chosen = np.where(np.isfinite(largest), 1, np.nan).astype(np.float32)
    with np.errstate(all="ignore"):
        for step in _INT4_STEPS:
            scale = (largest / np.float32(step)).astype(ml_dtypes.bfloat16)
            scale = scale.astype(np.float32)
            error = np.zeros(largest.shape)
            for row in group:
                left = row - _int4_steps(row, scale) * scale.astype(np.float64)
                error += left * left
            usable = np.isfinite(scale) & (scale != 0) & (error < best)
            best = np.where(usable, error, best)
            chosen = np.where(usable, scale, chosen)
        steps = np.where(np.isfinite(best), _int4_steps(group, chosen), 0)
    return steps.astype(np.int8), chosen.astype(ml_dtypes.bfloat16)


def _int4_steps(values: Any, scale: Any) -> Any:
    return np.clip(np.rint(values / scale), -8, 7)


def lay_out_scale(scale: Any, spec: Any) -> Any:
    """Scales (groups or 1, columns) in the layout of `spec`, padded by ones."""
    shape, dtype = spec
    blocks, groups = shape[0], math.prod(shape[1:-1])
    padded = np.ones((groups, blocks * COLUMNS), _numpy_type(dtype))
    padded[: len(scale), : scale.shape[1]] = scale
    padded = padded.reshape(groups, blocks, COLUMNS).transpose(1, 0, 2)
    return np.ascontiguousarray(padded).reshape(shape)


def _rows_of_scale(scale: Any, dtype: str, k: int, n: int) -> Any:
    """Undo `lay_out_scale`: (1 or groups, N)."""
    count = 1 if dtype == "int8" else -(-k // GROUP)
    scale = scale.reshape(len(scale), count, COLUMNS).transpose(1, 0, 2)
    return scale.reshape(count, scale.shape[1] * COLUMNS)[:, :n]


def _to_numpy(array: Any, dtype: Any) -> np.ndarray[Any, Any]:
    # On torch a bfloat16 tensor becomes a float32 array.
    if not isinstance(array, np.ndarray):
        array = ops.convert_to_numpy(array)
    return np.ascontiguousarray(array, dtype)


def _numpy_type(dtype: str) -> Any:
    return ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
