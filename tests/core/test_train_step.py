"""What runs around the training step of a model."""

import gc
import weakref

import keras
import pytest

from keras_weightmods.core import train_step
from keras_weightmods.utils import progress
from tests.models import mlp

LINE = "Compiling the training step: "


class Slow:
    def __init__(self):
        self.calls = 0

    def __call__(self, *args):
        self.calls += 1
        progress.time.sleep(0.1)
        return args


def model_with(step, **kwargs):
    model = mlp()
    model.compile("sgd", "mse", **kwargs)
    model.train_function = step
    return model


def noting(name, seen):
    def around(model, step, *args):
        seen.append((name, model.name))
        return step(*args)

    return around


@pytest.fixture
def shown(monkeypatch, capsys):
    monkeypatch.setattr(progress, "DELAY", 0.01)

    def shown(call, *args):
        assert call(*args) == args
        return LINE in capsys.readouterr().out

    return shown


@pytest.mark.one_backend
def test_the_order_is_fixed_and_the_plain_step_comes_back():
    step, seen = Slow(), []
    model = model_with(step)
    names = ["weights kept", "first step", "frozen weights"]
    for name in [*names, names[0]]:
        train_step.put_around(model, name, noting(name, seen))
    assert model.train_function(1, 2) == (1, 2)
    expected = ["first step", "frozen weights", "weights kept"]
    assert seen == [(name, model.name) for name in expected]
    # Keras makes its function anew, and one of them comes again.
    model.train_function = other = Slow()
    train_step.put_around(model, names[0], noting(names[0], seen))
    model.train_function()
    assert seen[3:] == seen[:3]
    assert (step.calls, other.calls) == (1, 1)
    for name in names:
        assert model.train_function is not other
        train_step.take_off(model, name)
        train_step.take_off(model, name)
    assert model.train_function is other


@pytest.mark.one_backend
def test_a_model_without_a_train_function_waits_for_it_and_is_collected():
    model, seen = model_with(None), []
    train_step.put_around(model, "weights kept", noting("kept", seen))
    train_step.show_first(model, 1)
    assert model.train_function is None
    model.make_train_function()
    train_step.put_around(model, "frozen weights", noting("frozen", seen))
    model.train_function.plain = Slow()
    model.train_function()
    assert [name for name, _ in seen] == ["frozen", "kept"]
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


def test_the_first_step_shows_that_it_is_compiled(shown):
    is_compiled = keras.backend.backend() != "torch"
    model = model_with(step := Slow())
    train_step.show_first(model, "auto")
    assert shown(model.train_function, 1, 2) is is_compiled
    assert model.train_function is step
    train_step.show_first(model, "auto")
    assert shown(model.train_function, 3) is False
    assert step.calls == 2
    # Nor of a quiet or an eager fit.
    model = model_with(Slow())
    train_step.show_first(model, 0)
    train_step.show_first(model, 1)
    assert shown(model.train_function, 1) is False
    model = model_with(Slow(), run_eagerly=True)
    train_step.show_first(model, 1)
    assert shown(model.train_function, 1) is False
