"""Cells of recurrent layers with packed kernels."""

from typing import Any

import keras
from keras import ops

from keras_weightmods.core import keras_compat
from keras_weightmods.core.reparameterization import slots

KERNELS = ("kernel", "recurrent_kernel")


class _PackedCell:
    """What the cells have in common: products of all gates at once."""

    def _gates(self: Any, attribute, x, masks, count):
        """Return `x` times a kernel, split into so many gates.

        With a list of dropout masks each gate has inputs of its own.
        """
        if not isinstance(masks, (list, tuple)):
            x = x if masks is None else ops.multiply(x, masks)
            return ops.split(self._times(attribute, x), count, axis=-1)
        products = [self._times(attribute, ops.multiply(x, m)) for m in masks]
        return [
            ops.split(product, count, axis=-1)[gate]
            for gate, product in enumerate(products)
        ]

    def _times(self: Any, attribute, x):
        item = slots(self).get(attribute)
        # Of two kernels one may be dense, or companded.
        if not hasattr(item, "product"):
            return ops.matmul(x, getattr(self, attribute))
        return item.product(x, item.multiply)

    def _masks(self: Any, x, h, training):
        makers = (
            (self.dropout, self.get_dropout_mask, x),
            (self.recurrent_dropout, self.get_recurrent_dropout_mask, h),
        )
        return [
            make(like) if training and 0 < rate < 1 else None
            for rate, make, like in makers
        ]


class _PackedLSTMCell(_PackedCell):
    def call(self: Any, inputs, states, training=False):
        h, c = states
        masks = self._masks(inputs, h, training)
        x = self._gates("kernel", inputs, masks[0], 4)
        inner = self._gates("recurrent_kernel", h, masks[1], 4)
        gates = list(map(ops.add, x, inner))
        if self.use_bias:
            gates = list(map(ops.add, gates, ops.split(self.bias, 4)))
        c, o = self._compute_carry_and_output_fused(gates, c)
        h = ops.multiply(o, self.activation(c))
        return h, [h, c]


class _PackedGRUCell(_PackedCell):
    def call(self: Any, inputs, states, training=False):
        h = states[0] if keras.tree.is_nested(states) else states
        masks = self._masks(inputs, h, training)
        x = self._gates("kernel", inputs, masks[0], 3)
        if self.use_bias:
            bias = self.bias[0] if self.reset_after else self.bias
            x = list(map(ops.add, x, ops.split(bias, 3)))
        inner = self._gates("recurrent_kernel", h, masks[1], 3)
        if self.use_bias and self.reset_after:
            inner = list(map(ops.add, inner, ops.split(self.bias[1], 3)))
        update = self.recurrent_activation(ops.add(x[0], inner[0]))
        reset = self.recurrent_activation(ops.add(x[1], inner[1]))
        if self.reset_after:
            last = ops.multiply(reset, inner[2])
        else:
            left = h if masks[1] is None else ops.multiply(h, masks[1][2])
            left = ops.multiply(reset, left)
            last = self._gates("recurrent_kernel", left, None, 3)[2]
        new = self.activation(ops.add(x[2], last))
        h = ops.add(ops.multiply(update, h), ops.multiply(1 - update, new))
        return h, [h] if keras.tree.is_nested(states) else h


class _PackedSimpleRNNCell(_PackedCell):
    def call(self: Any, inputs, states, training=False):
        h = states[0] if keras.tree.is_nested(states) else states
        masks = self._masks(inputs, h, training)
        (x,) = self._gates("kernel", inputs, masks[0], 1)
        if self.bias is not None:
            x = ops.add(x, self.bias)
        (inner,) = self._gates("recurrent_kernel", h, masks[1], 1)
        h = ops.add(x, inner)
        if self.activation is not None:
            h = self.activation(h)
        return h, [h] if keras.tree.is_nested(states) else h


_CELLS: dict[Any, type] = {
    keras.layers.LSTMCell.call: _PackedLSTMCell,
    keras.layers.GRUCell.call: _PackedGRUCell,
    keras.layers.SimpleRNNCell.call: _PackedSimpleRNNCell,
}


def read_whole(model: Any) -> dict[int, str]:
    """Return {id of a variable: reason} of kernels that no cell multiplies by.

    On torch the loops of LSTM and GRU take the kernels themselves, unless they
    are told to leave it to their cells.
    """
    found = {}
    for layer in keras_compat.layers_of(model):
        if (
            keras.backend.backend() == "torch"
            and isinstance(layer, (keras.layers.LSTM, keras.layers.GRU))
            and layer.use_cudnn in (True, "auto")
        ):
            kind = type(layer).__name__
            reason = (
                f"of {kind}, which on torch reads its kernels whole; pass "
                "`use_cudnn=False` to it"
            )
            for variable in layer.cell.weights:
                found[id(variable)] = reason
    return found


def packed_call(layer: Any) -> type | None:
    """Return the class whose `call` is for a packed cell; None for others.

    Args:
        layer: A layer, packed already or not.
    """
    cls = type(layer)
    if issubclass(cls, _PackedCell):
        return next(each for each in _CELLS.values() if issubclass(cls, each))
    return _CELLS.get(getattr(cls, "call", None))
