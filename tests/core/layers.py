"""Layers, and what the tests of targets compare."""

import keras

from keras_weightmods.core.keras_compat import layers_of
from tests.models import assert_same


def keys(targets):
    return [target.key for target in targets]


def names(targets):
    return [target.layer.name for target in targets]


def reasons(targets):
    return {skip.path: skip.reason for skip in targets.skipped}


def built(layer, *shape):
    layer.build((None, *shape))
    return layer


def state_of(model):
    """All that the layers hold, by identity, and the weights by value."""
    layers = layers_of(model)
    held = [(layer, type(layer), dict(vars(layer))) for layer in layers]
    return held, model.get_weights()


def assert_unchanged(model, state):
    for before, after in zip(state[0], state_of(model)[0], strict=True):
        assert before[:2] == after[:2]
        assert before[2].keys() == after[2].keys()
        assert all(after[2][name] is x for name, x in before[2].items())
    assert_same(model.get_weights(), state[1])


class Block(keras.layers.Layer):
    """Declares its parts, and so its weights, against the order of use."""

    def __init__(self, width=4, **kwargs):
        super().__init__(**kwargs)
        self.down = keras.layers.Dense(width, name="down")
        self.up = keras.layers.Dense(2 * width, name="up")
        self.gate = keras.layers.Dense(2 * width, name="gate")

    def build(self, input_shape):
        wide = (*input_shape[:-1], 2 * input_shape[-1])
        self.down.build(wide)
        self.up.build(input_shape)
        self.gate.build(input_shape)
        super().build(input_shape)

    def call(self, x):
        return self.down(keras.ops.silu(self.gate(x)) * self.up(x))


class Experts(keras.layers.Layer):
    def build(self, input_shape):
        width = input_shape[-1]
        self.gate = self.add_weight(shape=(2, width, 4), name="gate")
        self.bank = self.add_weight(shape=(2, 4, width), name="bank")
        self.bank_bias = self.add_weight(shape=(2, width), name="bank_bias")

    def call(self, x):
        hidden = keras.ops.einsum("bi,eio->ebo", x, self.gate)
        out = keras.ops.einsum("ebo,eoi->ebi", hidden, self.bank)
        return keras.ops.sum(out + self.bank_bias[:, None], axis=0)
