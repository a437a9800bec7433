"""A tied embedding and head, looked up and multiplied from one int8 table.

The product with the table uses the compiled 2:4 kernels. A dense matrix W is a
2:4 one of twice the rows, every group of four of which holds two rows of W and
two of zeros, for an activation spread out alike. The places of these cost two
bits a weight in memory; a file leaves them out.
"""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_weightmods.core import keras_private, seam
from keras_weightmods.core.reparameterization import slots
from keras_weightmods.core.targets import target_of
from keras_weightmods.core.weight_keys import weight_keys
from keras_weightmods.native.packed import Packed, packed_arrays
from keras_weightmods.ops.sparse_matmul import (
    gpu_plan,
    reason_for_dense,
    sparse_matmul,
)
from keras_weightmods.packing.packed_parameters import (
    HeldDense,
    PackedParameters,
)

# Places 0 and 1 in each of the eight groups of a word.
_PLACES = 0x44444444


def find_embeddings(model):
    """A `Target` for each reversible embedding of a model that has a table.

    The contraction is that of the head, a product with the table's transpose.
    """
    keys = weight_keys(model)
    return [
        target_of(layer, "embeddings", keys=keys)
        for layer in keras_private.layers_of(model)
        if isinstance(layer, keras.layers.ReversibleEmbedding)
        and keras_private.stored_variable(layer, "embeddings") is not None
    ]


def reason_to_skip(target):
    """Return why a table cannot be packed; None if it can."""
    layer = target.layer
    if type(layer).call is not keras.layers.ReversibleEmbedding.call:
        return f"{type(layer).__name__} has a call of its own"
    if not layer.tie_weights:
        return "its head has weights of its own"
    if layer.lora_enabled:
        return "LoRA is enabled"
    if layer.mask_zero:
        return "mask_zero is set"
    return seam.reason_to_skip(target)


def packed_embedding(target):
    """Return the `PackedEmbedding` of a target, of the class to use here."""
    # On a GPU nothing multiplies by a packed table at any number of rows.
    on_gpu = gpu_plan((1, 1), "float32", "int8") is not None
    is_dense = on_gpu or reason_for_dense()
    return (UnpackedEmbedding if is_dense else PackedEmbedding)(target)


class _FrozenEmbedding:
    def enable_lora(self: Any, *args, **kwargs):
        raise ValueError(
            f"LoRA needs the table of layer '{self.name}', which is packed to "
            "int8. Call `unpack(model)` first."
        )


class _PackedEmbeddingCall(_FrozenEmbedding):
    """The `call` of a ReversibleEmbedding with a packed table."""

    def call(self: Any, inputs, reverse=False):
        item = slots(self)["embeddings"]
        if not reverse:
            return ops.cast(item.rows(inputs), self.compute_dtype)
        if self.reverse_dtype is not None:
            inputs = ops.cast(inputs, self.reverse_dtype)
        logits = item.logits(inputs)
        if self.logit_soft_cap is not None:
            cap = self.logit_soft_cap
            logits = ops.multiply(ops.tanh(ops.divide(logits, cap)), cap)
        return logits


class PackedEmbedding(PackedParameters):
    """A table (vocabulary, dim) in int8, with a scale for each row.

    Args:
        target: `Target` from `find_embeddings`, without a `reason_to_skip`.
    """

    name = "int8_embedding"
    mixin: type | None = _PackedEmbeddingCall
    value_dtype = "int8"
    make = staticmethod(packed_embedding)
    reason_to_skip = staticmethod(reason_to_skip)

    def __init__(self, target):
        super().__init__(target)
        self.vocabulary, self.width = target.shape
        # An odd width gets a column of zeros.
        self.matrix_shape = (4 * -(-self.width // 2), self.vocabulary)
        self.arrays = packed_arrays(self.matrix_shape, "int8")
        self.packed: Any = None

    def create_parameters(self, add_weight):
        arrays = {}
        if not self.is_empty:
            arrays = self._pack(*_quantize(self.target.variable))
        for name, spec in self.arrays.items():
            self.add(add_weight, name, spec, arrays.get(name))
        self.packed = Packed(
            *self.parameters, shape=self.matrix_shape, dtype="int8"
        )

    def effective(self, stored):
        table, scale = self._table()
        table = ops.cast(table, "float32") * ops.expand_dims(scale, 1)
        return ops.cast(table, self.dtype)

    def rows(self, indices):
        """Look up rows: float32 of shape (..., dim)."""
        values, _, scale = self.parameters
        _, blocks, planes, columns, run = values.shape
        indices = ops.expand_dims(ops.cast(indices, "int32"), -1)
        block = ops.floor_divide(indices, columns)
        places = ops.arange(blocks * planes, dtype="int32")
        places = block * (blocks * planes) + places
        places = places * columns + ops.mod(indices, columns)
        found = ops.take(ops.reshape(values, (-1, run)), places, axis=0)
        leading = ops.shape(indices)[:-1]
        found = ops.reshape(found, (*leading, blocks, planes, run))
        found = ops.swapaxes(found, -1, -2)
        found = ops.reshape(found, (*leading, blocks * planes * run))
        found = ops.cast(found[..., : self.width], "float32")
        return found * ops.take(ops.reshape(scale, (-1,)), indices, axis=0)

    def logits(self, x):
        """`x`, of shape (..., dim), times the transposed table."""
        leading = ops.shape(x)[:-1]
        if self.width % 2:
            x = _pad_last(x, 1)
        x = ops.reshape(x, (*leading, self.matrix_shape[0] // 4, 2))
        x = ops.reshape(_pad_last(x, 2), (*leading, self.matrix_shape[0]))
        return sparse_matmul(x, self.packed)

    def saved_arrays(self):
        return {
            "embeddings_values": ((self.vocabulary, self.width), "int8"),
            "embeddings_scale": ((self.vocabulary,), "float32"),
        }

    def saved(self):
        return dict(
            zip(self.saved_arrays(), map(ops.convert_to_numpy, self._table()))
        )

    def load(self, saved):
        arrays = self._pack(*(saved[key] for key in self.saved_arrays()))
        for parameter, name in zip(self.parameters, self.arrays):
            parameter.assign(arrays[name])

    def _table(self):
        """Return the table (vocabulary, dim) of int8, and its scales."""
        values, _, scale = self.parameters
        scale = ops.reshape(scale, (-1,))
        table = ops.transpose(values, (0, 3, 1, 4, 2))
        table = ops.reshape(table, (scale.shape[0], -1))
        return table[: self.vocabulary, : self.width], scale[: self.vocabulary]

    def _pack(self, table, scale):
        """Return the packed arrays of a table (vocabulary, dim) of int8."""
        (columns, blocks, planes, width, run), _ = self.arrays["values"]
        padded = np.zeros((columns * width, blocks * planes * run), np.int8)
        padded[: self.vocabulary, : self.width] = table
        values = padded.reshape(columns, width, blocks, run, planes)
        scales = np.ones(columns * width, np.float32)
        scales[: self.vocabulary] = scale
        return {
            "values": np.ascontiguousarray(values.transpose(0, 2, 4, 1, 3)),
            "meta": np.full(self.arrays["meta"][0], _PLACES, np.int32),
            "scale": scales.reshape(columns, width),
        }


class UnpackedEmbedding(HeldDense, PackedEmbedding):
    """A packed table where nothing can multiply by it: held dense."""

    mixin = _FrozenEmbedding

    def create_parameters(self, add_weight):
        table = scale = None
        if not self.is_empty:
            steps, scale = _quantize(self.target.variable)
            table = steps * scale[:, None]
        spec = self.target.shape, self.dtype
        self.add(add_weight, "unpacked", spec, table, autocast=True)
        self.add(add_weight, "scale", ((self.vocabulary,), "float32"), scale)

    def saved(self):
        table, scale = map(ops.convert_to_numpy, self.parameters)
        steps = np.rint(table.astype("float32") / scale[:, None])
        return dict(zip(self.saved_arrays(), (steps.astype(np.int8), scale)))

    def load(self, saved):
        table, scale = (saved[key] for key in self.saved_arrays())
        self.parameters[0].assign(table.astype("float32") * scale[:, None])
        self.parameters[1].assign(scale)


def _quantize(table):
    """int8 table and float32 scales; a row's largest entry becomes 127."""
    table = ops.convert_to_numpy(table).astype("float32")
    scale = np.abs(table).max(axis=1) / np.float32(127)
    scale[scale == 0] = 1
    return np.rint(table / scale[:, None]).astype(np.int8), scale


def _pad_last(x, count):
    return ops.pad(x, [(0, 0)] * (len(x.shape) - 1) + [(0, count)])
