"""What shows that the first step of a fit is being compiled."""

import keras
import pytest

from keras_weightmods.core import keras_compat
from keras_weightmods.core.first_step import show_first_step
from keras_weightmods.utils import progress
from tests.models import mlp

LINE = "Compiling the training step: "


class Slow:
    """A train function that takes a while."""

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


@pytest.fixture
def shown(monkeypatch, capsys):
    """Whether a call showed that it takes long."""
    monkeypatch.setattr(progress, "DELAY", 0.01)

    def shown(call, *args):
        assert call(*args) == args
        return LINE in capsys.readouterr().out

    return shown


def test_the_first_step_shows_that_it_is_compiled(shown):
    is_compiled = keras.backend.backend() != "torch"
    model = model_with(step := Slow())
    show_first_step(model, "auto")
    assert shown(model.train_function, 1, 2) is is_compiled
    assert shown(model.train_function, 3) is False
    assert step.calls == 2


def test_a_train_function_is_wrapped_once():
    model = model_with(Slow())
    show_first_step(model, 0)
    # As `Checkpoint` does on JAX.
    keras_compat.keep_weights(model)
    before = model.train_function
    show_first_step(model, 1)
    keras_compat.keep_weights(model)
    assert model.train_function is before


def test_nothing_is_shown_of_a_quiet_or_an_eager_fit(shown):
    model = model_with(Slow())
    show_first_step(model, 0)
    assert shown(model.train_function, 1) is False
    model = model_with(Slow(), run_eagerly=True)
    show_first_step(model, 1)
    assert shown(model.train_function, 1) is False
