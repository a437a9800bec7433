import keras
import numpy as np
import pytest

from keras_weightmods.core.targets import find_targets
from tests.core.layers import Block, assert_unchanged, names, state_of
from tests.models import Subclassed, sequential


def test_order_of_execution_in_nested_models():
    inputs = keras.Input((4,))
    inner = sequential((4,), Block(name="a"), keras.layers.Dense(4, name="b"))
    nested = keras.Model(inputs, inner(Block(name="c")(inputs)), name="nested")
    model = keras.Model(inputs, Block(name="d")(nested(inputs)))
    targets = find_targets(model)
    ends = [
        *("c/gate", "c/up", "c/down"),
        *("a/gate", "a/up", "a/down", "b"),
        *("d/gate", "d/up", "d/down"),
    ]
    for target, end in zip(targets, ends, strict=True):
        assert target.path.endswith(f"{end}/kernel")
    assert [target.depth for target in targets] == list(range(10))


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


def test_order_of_execution_in_subclassed_models():
    model = Subclassed()
    model(np.zeros((2, 8), "float32"))
    expected = [*model.block.layers, model.last]
    assert [target.layer for target in find_targets(model)] == expected
    model = TwoInputs()
    x = np.zeros((2, 4), "float32")
    model(x, {"x": x})
    model.seen = None
    state = state_of(model)
    assert names(find_targets(model)) == ["gate", "up", "down", "last"]
    assert_unchanged(model, state)
    inputs = keras.Input((4,), name="x")
    model = keras.Model({"x": inputs}, Block()(inputs))
    assert names(find_targets(model)) == ["gate", "up", "down"]


class Partial(keras.layers.Layer):
    fails = False

    def __init__(self):
        super().__init__()
        self.unused = keras.layers.Dense(4, name="unused")
        self.block = Block()

    def build(self, input_shape):
        self.unused.build(input_shape)
        self.block.build(input_shape)

    def call(self, x):
        x = self.block(x)
        if self.fails:
            raise RuntimeError("not on symbols")
        return x


@pytest.mark.one_backend
def test_layers_that_do_not_run_come_last(monkeypatch):
    model = sequential((4,), Partial())
    assert names(find_targets(model)) == ["gate", "up", "down", "unused"]
    # The declared order, where the model does not run.
    monkeypatch.setattr(Partial, "fails", True)
    state = state_of(model)
    assert names(find_targets(model)) == ["unused", "down", "up", "gate"]
    assert_unchanged(model, state)


@pytest.mark.one_backend
def test_open_dimensions():
    form = {"data_format": "channels_last"}
    model = sequential(
        (None, None, 3),
        *(keras.layers.Conv2D(w, 3, strides=2, **form) for w in (4, 6, 8)),
        keras.layers.GlobalAveragePooling2D(**form),
        Block(8),
    )
    assert names(find_targets(model))[-3:] == ["gate", "up", "down"]
