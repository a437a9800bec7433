"""Steps that keep the weights on errors and Ctrl-C; see `kept_step`."""

import os
import signal

import keras
import numpy as np
import pytest

import keras_weightmods as kwm
from keras_weightmods.backend.jax.kept_step import kept
from tests.models import mlp, normal, weights_of


@pytest.fixture(autouse=True)
def python_raises_on_ctrl_c():
    # A shell leaves it out in what it runs in the background.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Array:
    def __init__(self, name):
        self.name, self.used_up = name, False

    def is_deleted(self):
        return self.used_up

    def block_until_ready(self):
        pass


def held_after(step, error, data=()):
    held = []
    with pytest.raises(error):
        kept(step, held.append, [[Array("old")]], iter(data))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    return [each[0][0].name for each in held]


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.one_backend
def test_an_interrupt_waits_for_the_end_of_the_step():
    def step(state, data):
        interrupt()
        return {}, [[Array("new")]]

    assert held_after(step, KeyboardInterrupt) == ["new", "new"]


@pytest.mark.one_backend
@pytest.mark.parametrize("in_data", [False, True])
def test_a_second_interrupt_and_one_in_data_do_not_wait(in_data):
    def data():
        interrupt()
        raise AssertionError("it has waited")
        yield

    def step(state, data):
        if in_data:
            next(data)
        interrupt()
        interrupt()
        raise AssertionError("it has waited")

    assert held_after(step, KeyboardInterrupt, data()) == ["old"]


@pytest.mark.one_backend
@pytest.mark.parametrize("is_used_up", [False, True])
def test_errors_leave_what_is_not_used_up(is_used_up):
    def step(state, data):
        state[0][0].used_up = is_used_up
        raise OSError("from within")

    assert held_after(step, OSError) == ([] if is_used_up else ["old"])


@pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="the others need none of it"
)
@pytest.mark.parametrize(("method", "steps"), [("cast", 2), ("checkpoint", 0)])
def test_fit_gives_the_weights_back(method, steps, tmp_path):
    class Interrupted(keras.utils.PyDataset):
        def __getitem__(self, index):
            if index == steps:
                raise KeyboardInterrupt
            return normal(4, 8), normal(4, 4)

        def __len__(self):
            return 4

    model, callbacks = mlp(), []
    before = weights_of(model)
    if method == "cast":
        fitted = kwm.CAST(model, teacher=None)
    else:
        fitted, callbacks = model, [kwm.Checkpoint(tmp_path)]
    fitted.compile(loss="mse")
    with pytest.raises(KeyboardInterrupt):
        fitted.fit(Interrupted(), verbose=0, shuffle=False, callbacks=callbacks)
    assert all(np.isfinite(weight).all() for weight in weights_of(model))
    same = [*map(np.array_equal, weights_of(model), before)]
    assert all(same) is (steps == 0)
