"""A tied embedding and head, looked up and multiplied from one table.

The table is in int8 with a scale for each row, or in int4 with one for each 64
entries of a row. With int8 activations the compiled kernels multiply by the
dense table. With float ones the product uses those for 2:4 kernels: a dense
matrix W is a 2:4 one of twice the rows, every group of four of which holds two
rows of W and two of zeros, for an activation spread out alike. The places of
these cost two bits a weight in memory. A file holds the table and its scales.

Tried for int4, and no better: to keep the mean of the rows apart, in floats.
The rounding error of SmolLM2's table falls from 12.9 % to 7.3 %, and its
perplexity rises from 37.7 to 44.1. The columns where the mean is large, which
the scales fit best, are those where the hidden states are large.
"""

from typing import Any

import keras
import ml_dtypes
import numpy as np
from keras import ops

from keras_weightmods.core import keras_compat, seam
from keras_weightmods.core.reparameterization import slots
from keras_weightmods.native import layout, quantize
from keras_weightmods.native import packed as packed_format
from keras_weightmods.ops.sparse_matmul import (
    gpu_plan,
    reason_for_dense,
    sparse_matmul,
)
from keras_weightmods.packing.packed_parameters import (
    HeldDense,
    PackedParameters,
    relative_error,
)
from keras_weightmods.utils import checks

_GROUP = layout.GROUP
# Places 0 and 1 in each of the eight groups of a word.
_PLACES = 0x44444444


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


def packed_embedding(target, dtype, activations="float32"):
    """Return the `PackedEmbedding` of a target, of the class to use here."""
    checks.check_choice("head", dtype, layout.INTEGERS)
    layout.check_activations(activations, dtype)
    # On a GPU nothing multiplies by a packed table at any number of rows.
    on_gpu = gpu_plan((1, 1), "float32", "int8") is not None
    is_dense = on_gpu or reason_for_dense()
    table_class = UnpackedEmbedding if is_dense else PackedEmbedding
    return table_class(target, dtype, activations)


class _FrozenEmbedding:
    def enable_lora(self: Any, *args, **kwargs):
        raise ValueError(
            f"LoRA needs the table of layer '{self.name}', which is packed to "
            f"{slots(self)['embeddings'].value_dtype}. Call `unpack(model)` "
            "first."
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
    """A table of shape (vocabulary, dim) in int8 or int4, with scales.

    Args:
        target: `Target` of a reversible embedding, without a `reason_to_skip`.
        dtype: String, `"int8"` or `"int4"`.
        activations: String, what the head multiplies by, see `Packed`.
    """

    name = "packed_embedding"
    settings: tuple[str, ...] = ("dtype",)
    mixin: type | None = _PackedEmbeddingCall
    make = staticmethod(packed_embedding)
    reason_to_skip = staticmethod(reason_to_skip)

    def __init__(self, target, dtype, activations):
        super().__init__(target)
        self.vocabulary, self.width = target.shape
        self.value_dtype = dtype
        self.activations = activations
        self.is_spread = activations == "float32"
        rows = self.width
        if self.is_spread:
            # An odd width gets a column of zeros.
            rows = 4 * -(-self.width // 2)
        self.matrix_shape = (rows, self.vocabulary)
        self.arrays = layout.packed_arrays(
            self.matrix_shape, dtype, is_dense=not self.is_spread
        )
        self.packed: Any = None
        # Rows are looked up in the columns, each in one place.
        sides = ("columns",)
        self.split_as_weight(self.matrix_shape, dtype, self.arrays, sides)

    def get_config(self):
        return self.with_activations({"dtype": self.value_dtype})

    def create_parameters(self, add_weight):
        packed = None
        if not self.is_empty:
            packed = self._pack(*self.round())
        for name, spec in self.arrays.items():
            self.add(add_weight, name, spec, getattr(packed, name, None))
        arrays = dict(zip(self.arrays, self.parameters))
        self.packed = self._packed(arrays)

    def round(self):
        """Return the rounded table (vocabulary, dim), and its scales."""
        table = ops.convert_to_numpy(self.target.variable).astype("float32")
        steps, scale = quantize.round_matrix(table.T, self.value_dtype)
        steps, scale = np.ascontiguousarray(steps.T), scale.T
        self.rounding_error = relative_error(
            self._times(steps, scale, np), table
        )
        return steps, scale

    def effective(self, stored):
        return ops.cast(self._times(*self._table()), self.dtype)

    def rows(self, indices):
        """Look up rows: float32 of shape (..., dim)."""
        values, scale = self._values_and_scale()
        _, blocks, words, columns, run = values.shape
        indices = ops.cast(indices, "int32")
        leading = ops.shape(indices)
        block = ops.expand_dims(ops.floor_divide(indices, columns), -1)
        lane = ops.expand_dims(ops.mod(indices, columns), -1)

        def take(array, count, run):
            places = ops.arange(count, dtype="int32")
            places = (block * count + places) * columns + lane
            return ops.take(ops.reshape(array, (-1, run)), places, axis=0)

        found = take(values, blocks * words, run)
        # One axis more than in `Packed.values`: the columns, here one.
        found = ops.reshape(found, (-1, blocks, words, 1, run))
        found = self._in_order(found)
        found = ops.reshape(found, (*leading, found.shape[-1]))
        scale = take(scale, scale.shape[1], 1)[..., 0]
        return self._times(found[..., : self.width], scale)

    def logits(self, x):
        """`x`, of shape (..., dim), times the transposed table."""
        if self.is_spread:
            leading = ops.shape(x)[:-1]
            if self.width % 2:
                x = _pad_last(x, 1)
            x = ops.reshape(x, (*leading, self.matrix_shape[0] // 4, 2))
            x = ops.reshape(_pad_last(x, 2), (*leading, self.matrix_shape[0]))
        return sparse_matmul(x, self.packed)

    def saved_arrays(self):
        values = self.width, "int8"
        scales: Any = ((self.vocabulary,), "float32")
        if self.value_dtype == "int4":
            values = -(-self.width // 2), "uint8"
            scales = (self.vocabulary, -(-self.width // _GROUP)), "bfloat16"
        return {
            "embeddings_values": ((self.vocabulary, values[0]), values[1]),
            "embeddings_scale": scales,
        }

    def saved(self):
        return self._saved(*map(ops.convert_to_numpy, self._table()))

    def load(self, saved):
        packed = self._pack(*self._loaded(saved))
        for parameter, name in zip(self.parameters, self.arrays):
            parameter.assign(getattr(packed, name))

    def _saved(self, steps, scale):
        """What a file holds of a table (vocabulary, dim) and its scales."""
        if self.value_dtype == "int8":
            steps, scale = steps.astype(np.int8), scale[:, 0]
        else:
            # Two to a byte, the first in the low half.
            steps = np.pad(steps.astype(np.int8), ((0, 0), (0, self.width % 2)))
            steps = steps.view(np.uint8) & 15
            steps = steps[:, ::2] | (steps[:, 1::2] << 4)
            scale = scale.astype(ml_dtypes.bfloat16)
        return dict(zip(self.saved_arrays(), (steps, scale)))

    def _loaded(self, saved):
        """Undo `_saved`."""
        steps, scale = (saved[key] for key in self.saved_arrays())
        if self.value_dtype == "int8":
            return steps, scale[:, None]
        steps = np.stack([steps & 15, steps >> 4], axis=-1).view(np.int8)
        steps = steps.reshape(self.vocabulary, -1)[:, : self.width]
        return steps - 16 * (steps > 7).astype(np.int8), scale

    def _times(self, steps, scale, xp=ops):
        """Return a table (..., dim) from its steps and scales, as float32.

        By the functions of `xp`, which is NumPy or `keras.ops`.
        """
        scale = layout.cast(xp, scale, "float32")
        if self.value_dtype == "int4":
            scale = xp.repeat(scale, _GROUP, axis=-1)[..., : self.width]
        return layout.cast(xp, steps, "float32") * scale

    def _in_order(self, values):
        """Return the values (NB, KB, words, columns, 4) as (NB, columns, K)."""
        values = layout.words(ops, values, self.value_dtype)
        # Slot p + 4q of two rows' groups, or row 4g + q.
        order = (0, 3, 1, 4, 2) if self.is_spread else (0, 3, 1, 2, 4)
        _, rows, words, columns, run = values.shape
        values = ops.transpose(values, order)
        return ops.reshape(values, (-1, columns, rows * words * run))

    def _table(self):
        """Return the table (vocabulary, dim), and its scales.

        One a row, (vocabulary, 1), or one a group, (vocabulary, groups).
        """
        values, scale = self._values_and_scale()
        table = self._in_order(values)
        table = ops.reshape(table, (-1, table.shape[-1]))
        count = scale.shape[1]
        scale = ops.reshape(ops.transpose(scale, (0, 2, 1)), (-1, count))
        return (
            table[: self.vocabulary, : self.width],
            scale[: self.vocabulary],
        )

    def _values_and_scale(self):
        """Return the arrays, the scales as (NB, 1 or groups of a row, 16)."""
        arrays = dict(zip(self.arrays, self.parameters))
        scale = ops.convert_to_tensor(arrays["scale"])
        if self.value_dtype == "int8":
            scale = ops.expand_dims(scale, 1)
        elif self.is_spread:
            # 64 rows of the table are 128 of the matrix.
            scale = scale[:, ::2]
        return ops.convert_to_tensor(arrays["values"]), scale

    def _pack(self, steps, scale):
        """Return the `Packed` of a rounded table (vocabulary, dim)."""
        steps, scale = steps.T, scale.T
        if not self.is_spread:
            dtype = self.value_dtype
            return packed_format.dense_of_steps(steps, scale, dtype)
        columns, blocks, _ = self.arrays["meta"][0]
        slots = np.zeros((blocks * 16, columns * 16), np.int8)
        slots[: self.width, : self.vocabulary] = steps
        if self.value_dtype == "int4":
            scale = np.repeat(scale, 2, axis=0)[: -(-blocks // 2)]
        return self._packed(
            {
                "values": layout.values_of_slots(slots, self.value_dtype),
                "meta": np.full(self.arrays["meta"][0], _PLACES, np.int32),
                "scale": layout.lay_out_scale(scale, self.arrays["scale"]),
            }
        )

    def _packed(self, arrays):
        packed = packed_format.Packed(
            arrays["values"],
            arrays.get("meta"),
            arrays["scale"],
            self.matrix_shape,
            self.value_dtype,
            self.activations,
        )
        return self.with_split(packed)


class UnpackedEmbedding(HeldDense, PackedEmbedding):
    """A packed table where nothing can multiply by it: held dense."""

    def __init__(self, target, *args):
        super().__init__(target, *args)
        if self.activations == "float32":
            self.mixin = _FrozenEmbedding
        # As in a file, the scales are those of rows.
        self.layouts = {}
        if self.split is not None:
            self.layouts["unpacked"] = keras_compat.layout_of(target.variable)

    def create_parameters(self, add_weight):
        table = scale = None
        if not self.is_empty:
            steps, scale = self.round()
            table = self._times(steps, scale, np)
            scale = self._saved(steps, scale)["embeddings_scale"]
        spec = self.target.shape, self.dtype
        # Without int8 activations the layer's own call casts it.
        autocast = self.activations == "float32"
        self.add(add_weight, "unpacked", spec, table, autocast=autocast)
        spec = self.saved_arrays()["embeddings_scale"]
        self.add(add_weight, "scale", spec, scale)

    def rows(self, indices):
        indices = ops.cast(indices, "int32")
        return ops.take(self.parameters[0], indices, axis=0)

    def logits(self, x):
        rounded = quantize.round_activations(ops.cast(x, "float32"))
        table = ops.cast(self.parameters[0], "float32")
        return ops.cast(ops.matmul(rounded, ops.transpose(table)), x.dtype)

    def saved(self):
        table, scale = map(ops.convert_to_numpy, self.parameters)
        scale = scale.reshape(self.vocabulary, -1)
        ones = np.ones(table.shape, "float32")
        steps = table.astype("float32") / self._times(ones, scale, np)
        return self._saved(np.rint(steps), scale)

    def load(self, saved):
        steps, scale = self._loaded(saved)
        table = self._times(steps, scale, np)
        self.parameters[0].assign(table)
        self.parameters[1].assign(saved["embeddings_scale"])


def _pad_last(x, count):
    return ops.pad(x, [(0, 0)] * (len(x.shape) - 1) + [(0, count)])
