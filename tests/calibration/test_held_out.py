import keras
import numpy as np
import pytest

from keras_weightmods.calibration.held_out import HeldOut
from tests import models
from tests.models import numpy

pytestmark = pytest.mark.one_backend
TOKENS = np.random.default_rng(0).integers(9, size=(4, 5))
WEIGHTS = np.arange(20).reshape(4, 5) % 3


def log_softmax(x):
    return x - np.log(np.sum(np.exp(x), axis=-1, keepdims=True))


def test_a_language_model_by_its_divergence():
    embedding, dense = keras.layers.Embedding(9, 4), keras.layers.Dense(9)
    model = models.sequential((None,), embedding, dense, dtype="int32")
    models.randomize(model, scale=1.0)

    def logits():
        found = [numpy(x).astype("float64") for x in model.weights]
        return log_softmax(found[0][TOKENS] @ found[1] + found[2])

    before = logits()
    measure = HeldOut(model, [(TOKENS[:2], WEIGHTS[:2]), (TOKENS, None)])
    assert measure() == 0
    # Which changes the squared error, and no text.
    dense.bias.assign(dense.bias + 3.0)
    assert measure() == pytest.approx(0, abs=1e-6)
    dense.kernel.assign(numpy(dense.kernel)[:, ::-1])
    each = np.sum(np.exp(before) * (before - logits()), axis=-1)
    each = [*each[:2][WEIGHTS[:2] > 0], *each.ravel()]
    assert measure() == pytest.approx(np.mean(each), rel=1e-5)


def test_others_by_the_squared_error():
    x, model = models.normal(6, 8), models.randomize(models.mlp(8, 4))
    before = x @ numpy(model.layers[0].kernel) + numpy(model.layers[0].bias)
    measure = HeldOut(model, [(x, None)])
    model.layers[0].bias.assign(model.layers[0].bias + 3.0)
    expected = 9 * before.size / np.sum(before**2)
    assert measure() == pytest.approx(expected, rel=1e-5)
