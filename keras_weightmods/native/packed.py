"""Sparse kernels as kept values and their places, and dense integer kernels."""

import dataclasses
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_weightmods.native import quantize
from keras_weightmods.native.layout import (
    ACTIVATIONS,
    COLUMNS,
    GROUP,
    INTEGERS,
    PATTERNS,
    ROWS,
    SLOTS,
    bits_of,
    cast,
    is_grouped,
    packed_arrays,
    pattern_of,
    words,
)
from keras_weightmods.utils import checks
from keras_weightmods.utils.dtypes import numpy_dtype

_NAMES = ("values", "meta", "scale")


@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
    """A packed kernel, as `pack_kernel` returns it.

    The arrays may be NumPy arrays, tensors of the backend or Keras variables.
    `packed_arrays` gives their shapes, and `native/layout.py` their layout.

    Args:
        values: Array of the kept values.
        meta: int32 array of their places: two bits each, or a mask.
        scale: Array of the scales of integers, else None.
        shape: Pair of ints (K, N), the shape of the kernel.
        dtype: String, type of the values, as of `packed_arrays`.

    Raises:
        ValueError: If an array has another shape or type than expected.

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
        checks.check_choice("activations", self.activations, ACTIVATIONS)
        if self.activations == "int8" and self.dtype not in INTEGERS:
            raise ValueError(
                "int8 activations need values in integers. Received: "
                f"activations='int8' with values of type {self.dtype}"
            )
        if self.pattern is None and self.activations != "int8":
            raise ValueError(
                "`meta` can be None, for a dense matrix, with int8 activations "
                f"alone. Received: meta=None, type {self.dtype}, "
                f"activations={self.activations!r}"
            )
        specs = packed_arrays(self.shape, self.dtype, self.pattern)
        for name in _NAMES:
            array, received = getattr(self, name), None
            if array is not None:
                kind = keras.backend.standardize_dtype(array.dtype)
                received = tuple(array.shape), kind
            if received != specs.get(name):
                raise ValueError(
                    f"`{name}` of a packed kernel of shape {self.shape} and "
                    f"type {self.dtype} must be of shape and type "
                    f"{specs.get(name)}. Received: {received}"
                )

    @property
    def pattern(self) -> str | None:
        """`"2:4"` or `"16:32"`; None for a dense matrix."""
        return pattern_of(self.meta)


def pack_kernel(
    kernel: Any,
    dtype: str | None = None,
    activations: str = "float32",
    scale: Any = None,
    pattern: str = "2:4",
) -> Packed:
    """Pack a 2:4 kernel, or one with half of each 32 rows.

    Values stay exact in float32. In bfloat16 they are rounded to nearest, and
    in int8 to multiples of a scale, max |w| / 127 of the column. In int4 they
    are -8 to 7 times a bfloat16 scale, the best of several for each column and
    64 rows. A kernel that already lies on such a grid comes back as it was.

    Args:
        kernel: Array, tensor or variable of shape (K, N), exactly of the
            pattern along K, the contraction axis. A last group of fewer than
            four rows may also hold two nonzeros, and a last group of fewer than
            32 rows 16.
        dtype: String, type of the kept values: `"float32"`, `"bfloat16"`,
            `"int8"` or `"int4"`. Defaults to bfloat16 for a bfloat16 kernel,
            and float32 for any other.
        activations: String, `"float32"` or `"int8"`, as in `Packed`. Defaults
            to `"float32"`.
        scale: Array of the scales of `kernel`, which then holds integers that
            are not rounded: (1, N) with int8, (ceil(K / 64), N) with int4.
            Defaults to `None`.
        pattern: String, `"2:4"`, or `"16:32"`, which holds all patterns of at
            most a half whose groups divide 32, such as 8:16 and 4:8. Compiled
            kernels multiply by `"16:32"` with int8 activations alone. Defaults
            to `"2:4"`.

    Returns:
        `Packed` of NumPy arrays.

    Raises:
        ValueError: If the kernel is not a matrix, or not of the pattern, or
            `scale` has another shape.

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
    if scale is not None:
        scale = checks.check_array("scale", scale)
        expected = 1 if dtype == "int8" else -(-shape[0] // GROUP), shape[1]
        if scale.shape != expected:
            raise checks.error("scale", f"of shape {expected}", scale.shape)
    if dtype is None:
        given = keras.backend.standardize_dtype(kernel.dtype)
        dtype = "bfloat16" if given == "bfloat16" else "float32"
    checks.check_choice("pattern", pattern, PATTERNS)
    specs = packed_arrays(shape, dtype, pattern)
    columns, rows = specs["meta"][0][:2]
    matrix = _to_numpy(kernel, np.float32)
    if pattern != "2:4":
        mask = matrix != 0
        if dtype in INTEGERS and scale is None:
            matrix, scale = quantize.round_matrix(matrix, dtype)
        meta, values = _masked(mask, matrix, columns, rows)
        if dtype in INTEGERS:
            scale = _lay_out_scale(scale, specs["scale"])
            values = values.reshape(columns, rows, 4, COLUMNS, 4)
            values = _lines(values, dtype)
        else:
            values = values.astype(numpy_dtype(dtype))
            values = values.reshape(specs["values"][0])
        return Packed(values, meta, scale, shape, dtype, activations)
    padded = _pad(matrix, columns, rows)
    groups = padded.reshape(rows * ROWS // 4, 4, columns * COLUMNS)
    flags = (groups != 0).view(np.uint8) << np.arange(4, dtype=np.uint8)[
        :, None
    ]
    nonzeros = np.bitwise_or.reduce(flags, axis=1)
    if bad := int(np.count_nonzero(np.take(_IS_BAD, nonzeros))):
        raise ValueError(
            "`kernel` must be 2:4 along its first axis: at most two nonzeros "
            "in every four consecutive entries of a column. Received: a "
            f"kernel of shape {shape} with {bad} of "
            f"{-(-shape[0] // 4) * shape[1]} groups holding more. Make it 2:4 "
            "first, for example by `keras_weightmods.ops.nm_project`."
        )
    places = np.take(_PLACES, nonzeros, axis=0).swapaxes(1, 2)
    slots = np.take_along_axis(groups, places, axis=1)
    slots = slots.reshape(rows * SLOTS, columns * COLUMNS)
    shifts = 2 * np.arange(SLOTS, dtype=np.uint32)[:, None]
    bits = places.astype(np.uint32).reshape(rows, SLOTS, columns * COLUMNS)
    meta = np.bitwise_or.reduce(bits << shifts, axis=1)
    meta = meta.reshape(rows, columns, COLUMNS).transpose(1, 0, 2)
    meta = np.ascontiguousarray(meta).view(np.int32)
    if dtype in INTEGERS:
        if scale is None:
            # Half as many kept values as rows share a scale.
            slots, scale = quantize.round_matrix(slots, dtype, GROUP // 2)
        scale = _lay_out_scale(scale, specs["scale"])
    values = _values_of_slots(slots, dtype)
    return Packed(values, meta, scale, shape, dtype, activations)


def _masked(mask: Any, matrix: Any, columns: int, rows: int) -> Any:
    """Return the bits of a mask of pattern 16:32, and 256 values a block."""

    def blocks(matrix: Any) -> Any:
        """Return (column block, row block, place in the dense layout)."""
        padded = _pad(matrix, columns, rows)
        padded = padded.reshape(rows, 8, 4, columns, COLUMNS)
        return padded.transpose(3, 0, 1, 4, 2).reshape(
            columns, rows, ROWS * COLUMNS
        )

    mask = blocks(mask)
    counts = mask.reshape(columns, rows, 8, COLUMNS, 4).sum(axis=(2, 4))
    if bad := int(np.count_nonzero(counts > SLOTS)):
        raise ValueError(
            "`kernel` must be 16:32 along its first axis: at most 16 nonzeros "
            "in every 32 consecutive entries of a column. Received: a kernel "
            f"of shape {matrix.shape} with {bad} of "
            f"{rows * matrix.shape[1]} groups holding more. Make it 16:32 "
            "first, for example by `keras_weightmods.ops.nm_project`."
        )
    # Kept ones first, each in order.
    order = np.argsort(~mask, axis=2, kind="stable")[..., : SLOTS * COLUMNS]
    values = np.take_along_axis(np.where(mask, blocks(matrix), 0), order, 2)
    bits = np.packbits(mask, axis=2, bitorder="little")
    meta = bits.view("<i4").astype(np.int32)
    return meta.reshape(columns, rows, 8, 2), values


# For each set of nonzeros in a group, a bit each: the two places that are kept.
# These are the nonzeros, and the first free places if there are fewer.
_PLACES = np.array(
    [
        sorted(sorted(range(4), key=lambda i: not code >> i & 1)[:2])
        for code in range(16)
    ]
)
_IS_BAD = np.array([code.bit_count() > 2 for code in range(16)])


def pack_dense(matrix: Any, dtype: str, scale: Any = None) -> Packed:
    """Round a dense matrix to integers, for int8 activations.

    Args:
        matrix: Array, tensor or variable of shape (K, N), K the contraction.
        dtype: String, `"int8"`, or `"int2"` to `"int6"`, which are rounded as
            int4 in `pack_kernel`.
        scale: As in `pack_kernel`. Defaults to `None`.

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
    shape = _matrix_shape(matrix)
    steps = _to_numpy(matrix, np.float32)
    if scale is None:
        steps, scale = quantize.round_matrix(steps, dtype)
    specs = packed_arrays(shape, dtype, None)
    columns, rows = specs["values"][0][:2]
    padded = _pad(steps, columns, rows)
    padded = padded.reshape(rows, 8, 4, columns, COLUMNS)
    values = _lines(padded.transpose(3, 0, 1, 4, 2), dtype)
    scale = _lay_out_scale(scale, specs["scale"])
    return Packed(values, None, scale, shape, dtype, "int8")


def unpack_kernel(packed: Packed) -> Any:
    """Undo `pack_kernel`.

    Args:
        packed: `Packed`, of NumPy arrays, tensors or variables.

    Returns:
        float32 NumPy array of shape (K, N). It equals the packed kernel if the
        values are float32 (a negative zero comes back as zero), and its rounded
        values otherwise.

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
        name: _to_numpy(getattr(packed, name), numpy_dtype(dtype))
        for name, (_, dtype) in packed_arrays(
            packed.shape, packed.dtype, packed.pattern
        ).items()
    }
    return _unpack(np, packed, **arrays)


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
        rounded = quantize.round_activations(rounded)
    return ops.cast(ops.matmul(rounded, unpack_tensor(packed)), x.dtype)


def _unpack(
    xp: Any, packed: Packed, values: Any, meta: Any = None, scale: Any = None
) -> Any:
    """Unpack by the functions of `xp`, which is NumPy or `keras.ops`.

    `repeat` and `full` are not used: on torch they read a number from the GPU,
    which a CUDA graph forbids.
    """
    blocks = values.shape[0]
    is_sparse = packed.pattern == "2:4"
    slots = SLOTS if is_sparse else ROWS
    rows = -(-packed.shape[0] // ROWS)
    if packed.dtype in INTEGERS:
        # (column block, row block, slot, column)
        values = words(xp, values, packed.dtype)
        if packed.pattern == "16:32":
            values = _spread(xp, values, meta)
        # Slot p + 4q is at [:, :, p, :, q], row 4g + q at [:, :, g, :, q].
        order = (0, 1, 4, 2, 3) if is_sparse else (0, 1, 2, 4, 3)
        values = xp.transpose(values, order)
        values = xp.reshape(values, (blocks, rows, slots, COLUMNS))
        scale = cast(xp, scale, "float32")
        count = -(-rows // 2) if is_grouped(packed.dtype) else 1
        scale = xp.reshape(scale, (blocks, count, 1, COLUMNS))
        if is_grouped(packed.dtype):
            scale = xp.stack([scale, scale], axis=2)
            scale = xp.reshape(scale, (blocks, 2 * count, 1, COLUMNS))
            scale = scale[:, :rows]
        values = cast(xp, values, "float32") * scale
    elif packed.pattern == "16:32":
        values = _spread(xp, cast(xp, values, "float32"), meta)
        values = xp.transpose(values, (0, 1, 2, 4, 3))
        values = xp.reshape(values, (blocks, rows, slots, COLUMNS))
    elif packed.dtype == "bfloat16":
        values = xp.transpose(values, (0, 1, 3, 2))
    values = cast(xp, values, "float32")
    if not is_sparse:
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
        # Select, do not multiply: a NaN must stay in its place.
        kernel = xp.where(xp.equal(places, here), values, xp.zeros_like(values))
        kernel = xp.transpose(xp.sum(kernel, axis=3), (1, 2, 3, 0, 4))
    kernel = xp.reshape(kernel, (rows * ROWS, blocks * COLUMNS))
    return kernel[: packed.shape[0], : packed.shape[1]]


def _spread(xp: Any, values: Any, meta: Any) -> Any:
    """Return the words of the dense layout from those kept by a mask."""
    blocks, rows = meta.shape[:2]
    places = xp.reshape(xp.arange(32, dtype="int32"), (1, 32))
    meta = xp.right_shift(xp.reshape(meta, (blocks, rows, 16, 1)), places)
    one = xp.ones((1,), dtype="int32")
    kept = xp.reshape(xp.bitwise_and(meta, one), (blocks, rows, 512))
    count = SLOTS * COLUMNS
    number = xp.cumsum(kept, axis=2) - one
    # Bits beyond the values, which `pack_kernel` never sets, are zero.
    is_kept = xp.logical_and(xp.equal(kept, one), xp.less(number, count))
    number = xp.clip(number, 0, count - 1)
    values = xp.reshape(values, (blocks, rows, count))
    values = xp.take_along_axis(values, number, 2)
    values = xp.where(is_kept, values, xp.zeros_like(values))
    return xp.reshape(values, (blocks, rows, 8, COLUMNS, 4))


def _lines(words: Any, dtype: str) -> Any:
    """Undo `words`: return the stored lines of int8 words."""
    words = np.ascontiguousarray(words, np.int8)
    if dtype == "int8":
        return words
    bits = bits_of(dtype)
    words = words.view(np.uint8) & (2**bits - 1)
    lines = words.shape[2] * bits // 8
    ends = 8 // bits * lines
    found = np.zeros((*words.shape[:2], lines, *words.shape[3:]), np.uint8)
    for i in range(8 // bits):
        found |= words[:, :, i * lines : (i + 1) * lines] << bits * i
    # The remaining bits, one after the other.
    left = 8 % bits
    for i in range(left * lines):
        (word, bit), (line, place) = divmod(i, bits), divmod(i, left)
        one = words[:, :, ends + word] >> bit & 1
        found[:, :, line] |= one << (8 - left + place)
    return found


def _values_of_slots(slots: Any, dtype: str) -> Any:
    """Return the array `values` of kept values, a NumPy array (16 KB, 16 NB).

    Slot s of block b is row 16 b + s.
    """
    rows, columns = slots.shape[0] // SLOTS, slots.shape[1] // COLUMNS
    if dtype in INTEGERS:
        slots = slots.reshape(rows, 4, 4, columns, COLUMNS)
        return _lines(slots.transpose(3, 0, 2, 4, 1), dtype)
    if dtype == "bfloat16":
        slots = slots.reshape(rows * SLOTS // 2, 2, columns, COLUMNS)
        slots = slots.transpose(2, 0, 3, 1)
    else:
        slots = slots.reshape(rows * SLOTS, columns, COLUMNS)
        slots = slots.transpose(1, 0, 2)
    return np.ascontiguousarray(slots, numpy_dtype(dtype))


def _pad(matrix: Any, columns: int, rows: int) -> Any:
    """Return a matrix padded with zeros to a number of blocks."""
    k, n = matrix.shape
    return np.pad(matrix, ((0, rows * ROWS - k), (0, columns * COLUMNS - n)))


def _lay_out_scale(scale: Any, spec: Any) -> Any:
    """Return scales (groups or 1, columns) in a shape, padded with ones."""
    shape, dtype = spec
    missing = shape[0] * COLUMNS - scale.shape[1]
    padded = np.pad(scale, ((0, 0), (0, missing)), constant_values=1)
    blocks = padded.reshape(len(scale), shape[0], COLUMNS).swapaxes(0, 1)
    return np.ascontiguousarray(blocks, numpy_dtype(dtype)).reshape(shape)


def _matrix_shape(matrix: Any) -> tuple[int, int]:
    rank = len(getattr(matrix, "shape", ()))
    if rank != 2:
        raise ValueError(
            "`kernel` must be a matrix (K, N), the contraction axis first. "
            f"Received: {type(matrix).__name__} with {rank} axes"
        )
    return int(matrix.shape[0]), int(matrix.shape[1])


def _to_numpy(array: Any, dtype: Any) -> np.ndarray[Any, Any]:
    # On torch a bfloat16 tensor becomes a float32 array.
    if not isinstance(array, np.ndarray):
        array = ops.convert_to_numpy(array)
    return np.ascontiguousarray(array, dtype)
