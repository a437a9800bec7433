"""The formats that packed weights are stored in.

An entry of `FORMATS` is a type of values with a pattern, and says how a matrix
(K, N), K the contraction, is stored and multiplied. A kernel, a stack of
kernels, and a table that is looked up and multiplied as a head are all stored
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

Specs = dict[str, tuple[tuple[int, ...], str]]


class Format:
    """How a matrix is stored.

    An instance of a subclass with `arrays`, `pack` and `unpack`, given to
    `register_format`, is all that a new format needs.

    Attributes:
        dtype: String, for `pack(dtype=...)`.
        pattern: String, `"2:4"` if it holds such matrices alone; else None.
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

    def unpack(
        self, arrays: Mapping[str, Any], shape: tuple[int, int], xp: Any
    ) -> Any:
        """Undo `pack`, but for rounding.

        Args:
            arrays: Dict of NumPy arrays or tensors.
            shape: Pair of ints (K, N).
            xp: NumPy, or `keras.ops` for tensors.

        Returns:
            float32 array or tensor (K, N).
        """
        raise NotImplementedError

    def stored(self, *args: Any) -> "Stored":
        """Return the `Stored` of these arguments."""
        return Stored(self, *args)


class Stored:
    """A matrix in the arrays of a format.

    Args:
        form: `Format`.
        arrays: Dict of arrays, tensors or variables, by name.
        shape: Pair of ints (K, N).
        activations: String, what it is multiplied by.
    """

    def __init__(
        self,
        form: Any,
        arrays: Mapping[str, Any],
        shape: tuple[int, int],
        activations: str = "float32",
    ) -> None:
        self.form, self.arrays, self.shape = form, arrays, shape
        self.activations = activations

    def multiply(self, x: Any, columns: slice | None = None) -> Any:
        """Return `x`, of shape (..., K), times the matrix, or columns of it."""
        matrix = self.tensor()
        matrix = matrix if columns is None else matrix[:, columns]
        return ops.matmul(x, ops.cast(matrix, x.dtype))

    def look_up(self, indices: Any) -> Any:
        """Return columns as rows, float32 of shape (..., K)."""
        return ops.take(ops.transpose(self.tensor()), indices, axis=0)

    def tensor(self) -> Any:
        """Return the matrix as a float32 tensor."""
        arrays = {k: ops.convert_to_tensor(v) for k, v in self.arrays.items()}
        return self.form.unpack(arrays, self.shape, ops)

    def numpy(self) -> Any:
        """Return the matrix as a float32 NumPy array."""
        arrays = {k: ops.convert_to_numpy(v) for k, v in self.arrays.items()}
        return self.form.unpack(arrays, self.shape, np)


class NativeFormat(Format):
    """A format of `native/layout.py`, which the compiled kernels read."""

    columns = layout.COLUMNS

    def __init__(self, dtype: str, pattern: str | None) -> None:
        self.dtype, self.pattern = dtype, pattern
        is_integer = dtype in layout.INTEGERS
        self.activations = layout.ACTIVATIONS if is_integer else ("float32",)
        self.trainable = dtype == "float32"
        self.needs_finite = is_integer

    def arrays(self, shape):
        return layout.packed_arrays(shape, self.dtype, self.pattern is None)

    def pack(self, matrix):
        if self.pattern is None:
            packed = native_format.pack_dense(matrix, self.dtype)
        else:
            packed = native_format.pack_kernel(matrix, self.dtype)
        return {
            name: getattr(packed, name) for name in self.arrays(packed.shape)
        }

    def unpack(self, arrays, shape, xp):
        stored = NativeStored(self, arrays, shape)
        return stored.numpy() if xp is np else stored.tensor()

    def stored(self, *args):
        return NativeStored(self, *args)

    def values_at(self, matrix, kept):
        """Return the arrays of an unpacked matrix by its scales and places.

        `pack` would choose new ones: a kept value may be zero.
        """
        matrix = ops.convert_to_numpy(matrix)
        arrays = {
            name: np.asarray(ops.convert_to_numpy(array))
            for name, array in kept.items()
        }
        values = native_format.values_at(
            matrix, arrays.get("meta"), self.dtype, arrays["scale"]
        )
        return {"values": values, **arrays}


class NativeStored(Stored):
    """A matrix in the arrays of a `NativeFormat`.

    Attributes:
        packed: The `Packed` that `ops.sparse_matmul` takes.
    """

    def __init__(self, form, arrays, shape, activations="float32"):
        super().__init__(form, arrays, shape, activations)
        # Compiled kernels multiply by dense integers in int8 alone.
        is_dense = form.pattern is None
        self.packed = native_format.Packed(
            arrays["values"],
            arrays.get("meta"),
            arrays.get("scale"),
            shape,
            form.dtype,
            "int8" if is_dense else activations,
        )

    def multiply(self, x, columns=None):
        packed = self.packed
        if columns is not None:
            # Each kernel of a stack has blocks of its own.
            blocks = slice(
                columns.start // layout.COLUMNS,
                -(-columns.stop // layout.COLUMNS),
            )
            packed = dataclasses.replace(
                packed,
                values=packed.values[blocks],
                meta=None if packed.meta is None else packed.meta[blocks],
                scale=None if packed.scale is None else packed.scale[blocks],
                shape=(self.shape[0], columns.stop - columns.start),
            )
        return sparse_matmul(x, packed)

    def look_up(self, indices):
        if self.form.pattern is not None:
            return super().look_up(indices)
        values = ops.convert_to_tensor(self.packed.values)
        scale = ops.convert_to_tensor(self.packed.scale)
        if self.form.dtype == "int8":
            scale = ops.expand_dims(scale, 1)
        _, blocks, words, columns, run = values.shape
        leading = ops.shape(indices)
        block = ops.expand_dims(ops.floor_divide(indices, columns), -1)
        lane = ops.expand_dims(ops.mod(indices, columns), -1)

        def take(array, count, run):
            places = ops.arange(count, dtype="int32")
            places = (block * count + places) * columns + lane
            return ops.take(ops.reshape(array, (-1, run)), places, axis=0)

        found = take(values, blocks * words, run)
        found = ops.reshape(found, (-1, blocks, words, 1, run))
        found = layout.words(ops, found, self.form.dtype)
        found = ops.reshape(found, (*leading, blocks * layout.ROWS))
        found = ops.cast(found[..., : self.shape[0]], "float32")
        scale = ops.cast(take(scale, scale.shape[1], 1)[..., 0], "float32")
        if self.form.dtype == "int4":
            scale = ops.repeat(scale, layout.GROUP, axis=-1)
            scale = scale[..., : self.shape[0]]
        return found * scale

    def tensor(self):
        return native_format.unpack_tensor(self.packed)

    def numpy(self):
        return native_format.unpack_kernel(self.packed)


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


def formats_of(dtype: str) -> dict[str | None, Format]:
    """Return {pattern: format} of those of a type of values."""
    return {f.pattern: f for f in FORMATS.values() if f.dtype == dtype}


def dtypes() -> tuple[str, ...]:
    """Return the types of values that there are."""
    return tuple(dict.fromkeys(form.dtype for form in FORMATS.values()))


for _dtype in layout.VALUE_TYPES:
    register_format(NativeFormat(_dtype, "2:4"))
for _dtype in layout.INTEGERS:
    register_format(NativeFormat(_dtype, None))
