"""The storage formats of packed weights.

An entry of `FORMATS` is a type of values with a pattern. It says how a matrix
(K, N), with the contraction K, is stored and multiplied. Kernels, stacks of
kernels, and tables that are looked up and multiplied as a head are all stored
as one such matrix.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from keras import ops

from keras_weightmods.native import layout
from keras_weightmods.native import packed as native_format
from keras_weightmods.ops.sparse_matmul import sparse_matmul
from keras_weightmods.utils import checks
from keras_weightmods.utils.dtypes import numpy_dtype

# Columns that are packed or unpacked at a time, whole blocks of them.
_COLUMNS = 2**12

Specs = dict[str, tuple[tuple[int, ...], str]]


class Format:
    """A storage format of a matrix.

    An instance of a subclass with `arrays`, `pack` and `unpack`, given to
    `register_format`, is all that a new format needs.

    Attributes:
        dtype: String, for `pack(dtype=...)`.
        pattern: String, `"2:4"` or `"16:32"` if it holds such matrices alone;
            else None.
        name: String, in files; made of these two.
        activations: Tuple of strings, what it can be multiplied by.
        trainable: Bool, whether its `"values"` can be trained.
        needs_finite: Bool, whether it holds no NaN or infinity.
        columns: Int: kernels that are stored side by side begin at multiples
            of so many columns.
    """

    dtype: str
    pattern: str | None = None
    activations: tuple[str, ...] = ("float32",)
    trainable = False
    needs_finite = True
    columns = 1

    @property
    def name(self) -> str:
        return f"{self.dtype} {self.pattern or 'dense'}"

    def arrays(self, shape: tuple[int, int]) -> Specs:
        """Return {name: (shape, dtype)} of the arrays of a matrix."""
        raise NotImplementedError

    def pack(self, matrix: Any) -> Mapping[str, Any]:
        """Return the arrays of a NumPy matrix in float32, by their names."""
        raise NotImplementedError

    def pack_integers(self, codes: Any, scale: Any) -> Any:
        """Pack integers times their scales, and keep the integers.

        Args:
            codes, scale: Float32 NumPy arrays (K, N).

        Returns:
            As `pack`, with the scales rounded to their type; None if the format
            does not hold such integers, or scales of such groups.
        """
        return None

    def unpack_integers(self, arrays: Any, shape: tuple[int, int]) -> Any:
        """Undo `pack_integers`.

        Args:
            arrays, shape: As in `unpack`, of NumPy arrays.

        Returns:
            Pair of float32 NumPy arrays (K, N), the integers and their scales;
            None if the format holds no integers.
        """
        return None

    def unpack(
        self, arrays: Mapping[str, Any], shape: tuple[int, int], xp: Any
    ) -> Any:
        """Undo `pack`, except for rounding.

        Args:
            arrays: Dict of NumPy arrays or tensors.
            shape: Pair of ints (K, N).
            xp: NumPy, or `keras.ops` for tensors.

        Returns:
            New float32 array or tensor (K, N).
        """
        raise NotImplementedError

    def multiply(self, item: Any, x: Any, columns: slice | None = None) -> Any:
        """Return `x`, of shape (..., K), times a matrix, or columns of it.

        Args:
            item: `PackedParameters` that holds the matrix.
        """
        matrix = item.tensor()
        matrix = matrix if columns is None else matrix[:, columns]
        return ops.matmul(x, ops.cast(matrix, x.dtype))

    def look_up(self, item: Any, indices: Any) -> Any:
        """Return columns of a matrix as rows, float32 of shape (..., K)."""
        return ops.take(ops.transpose(item.tensor()), indices, axis=0)


class NativeFormat(Format):
    """A format of `native/layout.py`, which the compiled kernels read."""

    columns = layout.COLUMNS

    def __init__(self, dtype: str, pattern: str | None) -> None:
        self.dtype, self.pattern = dtype, pattern
        is_integer = dtype in layout.INTEGERS
        self.activations = layout.ACTIVATIONS if is_integer else ("float32",)
        self.trainable = dtype == "float32" and pattern == "2:4"
        self.needs_finite = is_integer

    def arrays(self, shape):
        return layout.packed_arrays(shape, self.dtype, self.pattern)

    def pack(self, matrix, scale=None):
        arrays = {
            name: np.empty(shape, numpy_dtype(dtype))
            for name, (shape, dtype) in self.arrays(matrix.shape).items()
        }
        for columns, blocks in self._parts(matrix.shape[1]):
            own = None if scale is None else scale[:, columns]
            if self.pattern is None:
                packed = native_format.pack_dense(
                    matrix[:, columns], self.dtype, own
                )
            else:
                packed = native_format.pack_kernel(
                    matrix[:, columns],
                    self.dtype,
                    scale=own,
                    pattern=self.pattern,
                )
            for name, array in arrays.items():
                array[blocks] = getattr(packed, name)
        return arrays

    def pack_integers(self, codes, scale):
        if self.dtype not in layout.INTEGERS:
            return None
        rows, most = len(codes), 2 ** (layout.bits_of(self.dtype) - 1) - 1
        # The int8 products do not know -128.
        is_int8 = self.dtype == "int8"
        least, group = (-most, rows) if is_int8 else (-most - 1, layout.GROUP)
        own = scale[::group]
        if (
            codes.min(initial=0) < least
            or codes.max(initial=0) > most
            or not np.array_equal(np.repeat(own, group, axis=0)[:rows], scale)
        ):
            return None
        return self.pack(codes, own)

    def unpack_integers(self, arrays, shape):
        if self.dtype not in layout.INTEGERS:
            return None
        rows, columns = shape
        ones = np.ones_like(arrays["scale"])
        codes = self.unpack({**arrays, "scale": ones}, shape, np)
        # Blocks of columns, each with one scale or one for each group of rows.
        scale = arrays["scale"].astype("float32")
        scale = scale.reshape(len(scale), -1, self.columns).swapaxes(0, 1)
        scale = scale.reshape(len(scale), -1)[:, :columns]
        group = layout.GROUP if layout.is_grouped(self.dtype) else rows
        return codes, scale.repeat(group, axis=0)[:rows]

    def unpack(self, arrays, shape, xp):
        if xp is not np:
            return native_format.unpack_tensor(self.packed(arrays, shape))
        matrix = np.empty(shape, np.float32)
        for columns, blocks in self._parts(shape[1]):
            part = matrix[:, columns]
            own = {name: array[blocks] for name, array in arrays.items()}
            part[:] = native_format.unpack_kernel(self.packed(own, part.shape))
        return matrix

    def _parts(self, count):
        """Yield slices of columns, and of their blocks, that fit in memory.

        Each step on the whole of a table would take as much as the table does.
        """
        for start in range(0, count, _COLUMNS):
            stop = min(start + _COLUMNS, count)
            blocks = slice(start // self.columns, -(-stop // self.columns))
            yield slice(start, stop), blocks

    def packed(self, arrays, shape, activations="float32"):
        """Return the `Packed` of arrays, which `ops.sparse_matmul` takes."""
        # Compiled kernels multiply dense integers only by int8 activations.
        return native_format.Packed(
            arrays["values"],
            arrays.get("meta"),
            arrays.get("scale"),
            shape,
            self.dtype,
            activations if self.pattern else "int8",
        )

    def multiply(self, item, x, columns=None):
        packed = item.packed
        if columns is not None:
            # Each kernel of a stack has its own blocks.
            blocks = slice(
                columns.start // self.columns,
                -(-columns.stop // self.columns),
            )
            packed = dataclasses.replace(
                packed,
                shape=(item.shape[0], columns.stop - columns.start),
                **{name: getattr(packed, name)[blocks] for name in item.arrays},
            )
        return sparse_matmul(x, packed)

    def look_up(self, item, indices):
        if self.pattern is not None:
            return super().look_up(item, indices)
        values = ops.convert_to_tensor(item.packed.values)
        scale = ops.convert_to_tensor(item.packed.scale)
        if self.dtype == "int8":
            scale = ops.expand_dims(scale, 1)
        _, blocks, words, columns, run = values.shape
        leading, size = ops.shape(indices), item.shape[0]
        block = ops.expand_dims(ops.floor_divide(indices, columns), -1)
        lane = ops.expand_dims(ops.mod(indices, columns), -1)

        def take(array, count, run):
            places = ops.arange(count, dtype="int32")
            places = (block * count + places) * columns + lane
            return ops.take(ops.reshape(array, (-1, run)), places, axis=0)

        found = take(values, blocks * words, run)
        found = ops.reshape(found, (-1, blocks, words, 1, run))
        found = layout.words(ops, found, self.dtype)
        found = ops.reshape(found, (*leading, blocks * layout.ROWS))
        found = ops.cast(found[..., :size], "float32")
        scale = ops.cast(take(scale, scale.shape[1], 1)[..., 0], "float32")
        if layout.is_grouped(self.dtype):
            scale = ops.repeat(scale, layout.GROUP, axis=-1)[..., :size]
        return found * scale


# {name in files: format}; `register_format` adds to it.
FORMATS: dict[str, Format] = {}


def register_format(form: Format) -> None:
    """Make a format known to `pack(dtype=...)`, `save_model` and `load_model`.

    Args:
        form: `Format`.

    Raises:
        ValueError: If it is none, or its name is taken.
    """
    if not isinstance(form, Format):
        raise checks.error("form", "a `Format`", form)
    if form.name in FORMATS:
        expected = f"a format with a name other than {sorted(FORMATS)}"
        raise checks.error("form", expected, form.name)
    FORMATS[form.name] = form


def formats_of(dtype: str | None) -> dict[str | None, Format]:
    """Return {pattern: format} for a type of values."""
    return {f.pattern: f for f in FORMATS.values() if f.dtype == dtype}


for _pattern in layout.PATTERNS:
    for _dtype in layout.VALUE_TYPES:
        register_format(NativeFormat(_dtype, _pattern))
for _dtype in layout.INTEGERS:
    register_format(NativeFormat(_dtype, None))
