"""What runs in place of a layer's call, seen from other threads."""

import threading

import keras
import pytest

from keras_weightmods.core.execution_order import execution_order
from keras_weightmods.core.watched import called_by
from tests import models
from tests.core.layers import built

pytestmark = pytest.mark.one_backend


def in_thread(run):
    found = []
    thread = threading.Thread(target=lambda: found.append(run()))
    thread.start()
    thread.join()
    return found


def test_another_thread_calls_and_watches_the_layer_by_itself():
    layer, x, seen = built(keras.layers.Dense(2), 3), models.normal(1, 3), []

    def watched(name):
        def call(plain, *args):
            seen.append(name)
            return plain(*args)

        return called_by(layer, call)

    other = watched("other")
    with watched("own"):
        (y,) = in_thread(lambda: models.outputs(layer, x))
        in_thread(lambda: other.__enter__() or layer(x))
        assert seen == ["other"]
        models.assert_same(models.outputs(layer, x), y)
        assert seen == ["other", "own"]
    # What was begun first ended first.
    in_thread(lambda: other.__exit__(None, None, None))
    assert type(layer) is keras.layers.Dense
    assert "_watchers" not in vars(layer)


def test_a_scope_that_ends_during_a_call_hides_no_other(monkeypatch):
    layer, seen, scopes = built(keras.layers.Dense(2), 3), [], []

    class OtherThread:
        def __eq__(self, other):
            while scopes:
                scopes.pop().__exit__(None, None, None)
            return self is other

    def watched(name):
        return called_by(layer, lambda plain, x: seen.append(name) or plain(x))

    with monkeypatch.context() as patch:
        patch.setattr(threading, "get_ident", OtherThread)
        scopes.append(watched("other"))
        scopes[0].__enter__()
    with watched("own"):
        layer(models.normal(1, 3))
    assert not scopes
    assert seen == ["own"]


def test_a_model_can_be_called_while_its_order_is_found():
    model, x, found = models.mlp(), models.normal(1, 8), []
    expected, is_over = models.outputs(model, x), threading.Event()

    def call():
        while not is_over.is_set():
            found.append(models.outputs(model, x))

    thread = threading.Thread(target=call)
    thread.start()
    for _ in range(30):
        order = execution_order(model, model.layers)
        assert list(order.values()) == [0, 1]
    is_over.set()
    thread.join()
    for y in found:
        models.assert_same(y, expected)
