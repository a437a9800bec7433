import keras
import numpy as np
import pytest

from keras_weightmods.core.targets import find_targets
from tests.core.layers import Block, assert_unchanged, names, paths, state_of
from tests.models import sequential


def test_order_of_execution_in_nested_models():
    inputs = keras.Input((4,))
    inner = sequential((4,), Block(name="a"), keras.layers.Dense(4, name="b"))
    nested = keras.Model(inputs, inner(Block(name="c")(inputs)), name="nested")
    model = keras.Model(inputs, Block(name="d")(nested(inputs)))
    targets = find_targets(model)
    for path, end in zip(
        paths(targets),
        [
            *("c/gate", "c/up", "c/down"),
            *("a/gate", "a/up", "a/down", "b"),
            *("d/gate", "d/up", "d/down"),
        ],
    ):
        assert path.endswith(f"{end}/kernel")
    assert [target.depth for target in targets] == list(range(10))


class OneInput(keras.Model):
    def __init__(self):
        super().__init__()
        self.block = Block()

    def call(self, x):
        return self.block(x)


class TwoInputs(keras.Model):
    def __init__(self):
        super().__init__()
        self.last = keras.layers.Dense(2, name="last")
        self.block = Block()
        self.seen = None

    def build(self, first_shape, second_shape):
        self.block.build(first_shape)
        self.last.build(first_shape)
        super().build(first_shape)

    def call(self, first, second):
        self.seen = first
        return self.last(self.block(first) + second["x"])


@pytest.mark.parametrize("functional", [True, False])
def test_order_of_execution_in_subclassed_models(functional):
    x = np.zeros((2, 4), "float32")
    if functional:
        inputs = keras.Input((4,), name="x")
        model = keras.Model({"x": inputs}, Block()(inputs))
    else:
        model = OneInput()
        model(x)
    assert names(find_targets(model)) == ["gate", "up", "down"]


def test_order_of_execution_with_several_inputs():
    model = TwoInputs()
    x = np.zeros((2, 4), "float32")
    model(x, {"x": x})
    model.seen = None
    state = state_of(model)
    assert names(find_targets(model)) == ["gate", "up", "down", "last"]
    assert_unchanged(model, state)


def test_layers_that_do_not_run_come_last():
    class Partial(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.unused = keras.layers.Dense(4, name="unused")
            self.block = Block()

        def build(self, input_shape):
            self.unused.build(input_shape)
            self.block.build(input_shape)

        def call(self, x):
            return self.block(x)

    model = sequential((4,), Partial())
    assert names(find_targets(model)) == ["gate", "up", "down", "unused"]


def test_declared_order_where_the_model_does_not_run():
    class Broken(keras.layers.Layer):
        fails = False

        def __init__(self):
            super().__init__()
            self.block = Block()

        def build(self, input_shape):
            self.block.build(input_shape)

        def call(self, x):
            x = self.block(x)
            if self.fails:
                raise RuntimeError("not on symbols")
            return x

    model = sequential((4,), Broken())
    assert names(find_targets(model)) == ["gate", "up", "down"]
    Broken.fails = True
    state = state_of(model)
    assert names(find_targets(model)) == ["down", "up", "gate"]
    assert_unchanged(model, state)


def test_open_dimensions():
    inputs = keras.Input((None, None, 3))
    x = inputs
    for width in (4, 6, 8):
        x = keras.layers.Conv2D(
            width, 3, strides=2, data_format="channels_last"
        )(x)
    x = keras.layers.GlobalAveragePooling2D(data_format="channels_last")(x)
    model = keras.Model(inputs, Block(8)(x))
    found = names(find_targets(model))
    assert found[-3:] == ["gate", "up", "down"]
