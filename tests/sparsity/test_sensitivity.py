"""What each kernel costs when it alone is pruned."""

import keras
import numpy as np
import pytest

import keras_weightmods as kwm
from tests import models, references
from tests.models import sequential


def make_net():
    return models.randomize(
        sequential(
            (16,),
            keras.layers.Dense(32, activation="relu"),
            keras.layers.Dense(16, activation="relu"),
            keras.layers.Dense(4),
        )
    )


def forward(weights, x):
    """The net in NumPy, and the inputs of its kernels."""
    inputs = []
    for place in range(0, len(weights), 2):
        inputs.append(x)
        x = x @ weights[place] + weights[place + 1]
        x = np.maximum(x, 0) if place < 4 else x
    return x, inputs


def test_errors_are_those_of_numpy_and_the_model_is_unchanged():
    model = make_net()
    weights = [w.astype("float64") for w in model.get_weights()]
    x = np.random.default_rng(0).normal(size=(24, 16))
    y, inputs = forward(weights, x)
    expected = {}
    for place in range(3):
        pruned = list(weights)
        pruned[2 * place] = references.wanda(
            weights[2 * place], inputs[place], 2, 4
        )
        change = forward(pruned, x)[0] - y
        expected[place] = (change**2).sum() / (y**2).sum()
    report = kwm.sensitivity(model, x, batch_size=10, verbose=0)
    found = {int(k.key.split(":")[0]): k.error for k in report.kernels}
    for place, error in zip(sorted(found), expected.values(), strict=True):
        np.testing.assert_allclose(found[place], error, rtol=1e-3)
    costs = [k.error / k.size for k in report.kernels]
    assert costs == sorted(costs, reverse=True)
    for a, b in zip(model.get_weights(), weights):
        np.testing.assert_array_equal(a, b.astype("float32"))
    assert "Pruned alone to 2:4" in str(report)


@pytest.mark.one_backend
def test_the_share_that_stays_dense():
    model = make_net()
    x = np.random.default_rng(0).normal(size=(8, 16))
    report = kwm.sensitivity(model, x, verbose=0)
    total = sum(k.size for k in report.kernels)
    for share in (0.0, 0.2, 0.6, 0.99):
        targets = report.targets(model, share)
        sparse = {t.key for t in targets}
        dense = [k for k in report.kernels if k.key not in sparse]
        assert sum(k.size for k in dense) <= share * total
        assert len(targets.skipped) == len(dense)
        assert all("stays dense" in s.reason for s in targets.skipped)
    assert len(report.targets(model, 0.0)) == 3
    assert len(report.targets(model, 0.6)) < 3
    kwm.sparsify(model, targets=report.targets(model, 0.6))
    after = kwm.sparsity_report(model, "2:4").totals
    assert 0 < after["exact"] < 3


@pytest.mark.one_backend
def test_a_language_model():
    model = models.randomize(models.causal_lm("llama"), scale=0.2)
    tokens = np.random.default_rng(0).integers(20, size=(2, 8))
    inputs = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}
    before = [np.array(w) for w in model.get_weights()]
    report = kwm.sensitivity(model, inputs, verbose=0)
    assert len(report.kernels) == 7
    assert all(0 < k.error < 10 for k in report.kernels)
    for a, b in zip(before, model.get_weights()):
        np.testing.assert_array_equal(a, b)
    cast = kwm.CAST(model, targets=report.targets(model, 0.3))
    assert 0 < len(cast.targets) < 7


def test_wrong_use():
    model = make_net()
    x = np.ones((2, 16))
    with pytest.raises(ValueError, match="batch_size"):
        kwm.sensitivity(model, x, batch_size=0)
    with pytest.raises(ValueError, match="`data`"):
        kwm.sensitivity(model, None)
    with pytest.raises(ValueError, match="finite"):
        kwm.sensitivity(model, x * np.nan, verbose=0)
    report = kwm.sensitivity(model, x, verbose=0)
    with pytest.raises(ValueError, match="dense_share"):
        report.targets(model, 1.0)
    other = models.randomize(sequential((4,), keras.layers.Dense(4)))
    with pytest.raises(ValueError, match="measured on"):
        report.targets(other, 0.5)
