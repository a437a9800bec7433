"""Packed kernels of which some columns are 2:4 and the others dense."""

import numpy as np
from keras import ops

from keras_weightmods.core import keras_compat
from keras_weightmods.native import layout
from keras_weightmods.native import packed as packed_format
from keras_weightmods.ops.sparse_matmul import (
    gpu_plan,
    reason_for_dense,
    sparse_matmul,
)
from keras_weightmods.packing import packed_dense
from keras_weightmods.packing.packed_parameters import relative_error
from keras_weightmods.utils import checks

COLUMNS = 16  # of a block of the packed format
# Fewer sparse columns do not pay for a product of their own.
LEAST_SHARE = 0.25
_PARTS = ("", "dense_")


def mixed_kernel(target, dtype, dense, blocks, activations="float32"):
    """Return the `MixedKernel` of a target."""
    checks.check_choice("dense", dense, layout.INTEGERS)
    packed_dense.check_values(dtype, False, activations)
    columns = packed_dense.PackedKernel.shape_of(target)[1]
    total = -(-columns // COLUMNS)
    is_list = isinstance(blocks, list) and 0 < len(blocks) < total
    if not is_list or not all(
        type(b) is int and a < b < total for a, b in zip([-1, *blocks], blocks)
    ):
        expected = f"some of the {total} blocks of columns, rising"
        raise checks.error("blocks", expected, blocks)
    return MixedKernel(target, dtype, dense, blocks, activations)


def dense_blocks(target):
    """Return the blocks of 16 columns that are not 2:4, if packing them apart
    from the others pays; None if not.

    Args:
        target: `Target` of a kernel that can be packed as 2:4.
    """
    shape = packed_dense.PackedKernel.shape_of(target)
    is_laid_out = keras_compat.layout_of(target.variable) is not None
    on_gpu = gpu_plan(shape, target.layer.compute_dtype, "int8") is not None
    # There the kernels are held dense, or split.
    if reason_for_dense() or is_laid_out or on_gpu:
        return None
    rows, columns = shape
    matrix = packed_dense.to_matrix(
        target.variable.value, target.contraction_axes
    )
    matrix = ops.reshape(matrix, (rows // 4, 4, columns))
    kept = ops.sum(ops.cast(ops.not_equal(matrix, 0), "int32"), axis=1)
    is_dense = ops.convert_to_numpy(ops.max(kept, axis=0)) > 2
    padding = -columns % COLUMNS
    is_dense = np.pad(is_dense, (0, padding)).reshape(-1, COLUMNS).any(axis=1)
    if np.mean(~is_dense) < LEAST_SHARE:
        return None
    return [int(block) for block in np.flatnonzero(is_dense)]


class MixedKernel(packed_dense.PackedKernel):
    """A kernel in two parts: columns that are 2:4, and others in integers.

    Args:
        target, dtype, activations: As in `PackedKernel`, of the first part.
        dense: String, `"int8"` or `"int4"`, type of the second.
        blocks: List of ints, the blocks of 16 columns that are dense.
    """

    name = "packed_mixed"
    pattern = "2:4 in part"
    settings = ("dtype", "dense", "blocks")
    make = staticmethod(mixed_kernel)

    def __init__(self, target, dtype, dense, blocks, activations):
        self.dense, self.blocks = dense, blocks
        super().__init__(target, dtype, False, activations)
        rows, columns = self.matrix_shape
        is_dense = np.isin(np.arange(columns) // COLUMNS, blocks)
        self.columns = np.flatnonzero(~is_dense), np.flatnonzero(is_dense)
        self.order = np.argsort(np.concatenate(self.columns))
        self.arrays = {
            prefix + name: spec
            for prefix, dtype, own in zip(_PARTS, (dtype, dense), self.columns)
            for name, spec in layout.packed_arrays(
                (rows, len(own)), dtype, prefix == "dense_"
            ).items()
        }

    def get_config(self):
        names = {"dense": self.dense, "blocks": self.blocks}
        return self.with_activations({"dtype": self.value_dtype, **names})

    def split_as_weight(self, *args):
        """Split nothing: the parts have other columns than the weight."""

    def create_parameters(self, add_weight):
        arrays = {}
        if not self.is_empty:
            arrays = self.pack(self.target.variable)
        for name, spec in self.arrays.items():
            self.add(add_weight, name, spec, arrays.get(name))
        self.packed = self.packed_of(*self.parameters)

    def multiply(self, x):
        parts = [sparse_matmul(x, packed) for packed in self.packed]
        return self._in_order(parts)

    def effective(self, stored):
        parts = map(packed_format.unpack_tensor, self.packed)
        return self.to_kernel(self._in_order(list(parts)))

    def folded(self):
        parts = map(packed_format.unpack_kernel, self.packed)
        return self.to_kernel(self._in_order(list(parts)))

    def pack(self, kernel):
        """Return the arrays of a dense kernel, by their names."""
        matrix = ops.convert_to_numpy(self.to_matrix(kernel))
        sparse, dense = (matrix[:, columns] for columns in self.columns)
        packed = (
            packed_format.pack_kernel(
                sparse, self.value_dtype, self.activations
            ),
            packed_format.pack_dense(dense, self.dense),
        )
        kept = list(map(packed_format.unpack_kernel, packed))
        kept = ops.convert_to_numpy(self._in_order(kept))
        self.rounding_error = relative_error(kept, matrix)
        return {
            prefix + name: getattr(part, name)
            for prefix, part in zip(_PARTS, packed)
            for name in ("values", "meta", "scale")
            if prefix + name in self.arrays
        }

    def packed_of(self, *arrays):
        """Return the `Packed` of both parts."""
        named = dict(zip(self.arrays, arrays))
        rows = self.matrix_shape[0]
        types = (self.value_dtype, self.activations), (self.dense, "int8")
        return tuple(
            packed_format.Packed(
                named[f"{prefix}values"],
                named.get(f"{prefix}meta"),
                named.get(f"{prefix}scale"),
                (rows, len(columns)),
                *kinds,
            )
            for prefix, columns, kinds in zip(_PARTS, self.columns, types)
        )

    def _in_order(self, parts):
        return ops.take(ops.concatenate(parts, axis=-1), self.order, axis=-1)
