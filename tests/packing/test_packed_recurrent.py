"""Recurrent layers with packed cells against loops in float64."""

import keras
import numpy as np
import pytest
from keras import layers
from numpy.testing import assert_allclose

import keras_weightmods as kwm
from tests import models
from tests.backends import breadth
from tests.models import make_sparse, normal, numpy, outputs, sequential

one_backend = pytest.mark.one_backend
UNITS, SHAPE = 12, (5, 8)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def lstm(weights, x):
    kernel, recurrent, bias = weights
    h = c = np.zeros((len(x), UNITS))
    for at in range(x.shape[1]):
        gates = x[:, at] @ kernel + h @ recurrent + bias
        i, f, new, o = np.split(gates, 4, axis=-1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(new)
        h = sigmoid(o) * np.tanh(c)
        yield h


def gru(weights, x):
    kernel, recurrent, bias = weights
    own, inner = bias if bias.ndim == 2 else (bias, None)
    h = np.zeros((len(x), UNITS))
    for at in range(x.shape[1]):
        xz, xr, xn = np.split(x[:, at] @ kernel + own, 3, axis=-1)
        hz, hr, hn = np.split(
            h @ recurrent + (0 if inner is None else inner), 3, axis=-1
        )
        z, r = sigmoid(xz + hz), sigmoid(xr + hr)
        if inner is None:
            new = np.tanh(xn + (r * h) @ recurrent[:, 2 * UNITS :])
        else:
            new = np.tanh(xn + r * hn)
        h = z * h + (1 - z) * new
        yield h


def simple(weights, x):
    kernel, recurrent, bias = weights
    h = np.zeros((len(x), UNITS))
    for at in range(x.shape[1]):
        h = np.tanh(x[:, at] @ kernel + h @ recurrent + bias)
        yield h


CASES = {
    "lstm": (layers.LSTM, lstm, {"use_cudnn": False}),
    "gru": (layers.GRU, gru, {"use_cudnn": False}),
    "gru, reset before": (
        layers.GRU,
        gru,
        {"use_cudnn": False, "reset_after": False},
    ),
    "simple": (layers.SimpleRNN, simple, {}),
}


def make(name, **kwargs):
    """A sparse model of one layer, and its input."""
    kind, _, options = CASES[name]
    keras.utils.set_random_seed(0)
    layer = kind(UNITS, return_sequences=True, **options, **kwargs)
    model = models.randomize(sequential(SHAPE, layer))
    return make_sparse(model), normal(3, *SHAPE, seed=1)


@breadth("name", list(CASES), 1, 2, 3)
def test_is_the_recurrence(name):
    model, x = make(name)
    (layer,) = model.layers
    plain, weights = type(layer.cell), models.weights_of(model)
    loop = CASES[name][1]
    wide = [w.astype("float64") for w in weights]
    expected = np.stack(list(loop(wide, x.astype("float64"))), axis=1)
    report = kwm.pack(model)
    paths = [w.path.rsplit("/", 1)[-1] for w in report.weights]
    assert sorted(paths) == ["kernel", "recurrent_kernel"]
    assert_allclose(outputs(model, x), expected, atol=1e-5)
    kwm.unpack(model)
    assert type(layer.cell) is plain
    models.assert_same(models.weights_of(model), weights)


@one_backend
@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("rates", [(0.5, 0.0), (0.3, 0.4)])
def test_dropout_is_that_of_the_layer(name, rates):
    """With masks of its own for each gate, where Keras has them."""
    found = []
    for packs in (False, True):
        dropout, recurrent = rates
        model, x = make(
            name, dropout=dropout, recurrent_dropout=recurrent, seed=3
        )
        if packs:
            kwm.pack(model)
        found.append(numpy(model(x, training=True)))
    assert_allclose(*found, atol=1e-5)
    assert np.abs(found[0] - numpy(model(x))).max() > 0.01


@one_backend
def test_gates_without_a_bias_and_with_one_kernel_packed():
    for name in CASES:
        model, x = make(name, use_bias=False)
        before = outputs(model, x)
        targets = kwm.find_targets(model, include="recurrent_kernel")
        assert len(kwm.pack(model, targets=targets).weights) == 1
        assert_allclose(outputs(model, x), before, atol=1e-5)


@one_backend
def test_masks_directions_and_files(tmp_path):
    keras.utils.set_random_seed(0)
    cell = layers.LSTM(8, return_sequences=True, use_cudnn=False)
    model = keras.Sequential(
        [
            keras.Input((6,), dtype="int32"),
            layers.Embedding(20, 8, mask_zero=True),
            layers.Bidirectional(cell),
            layers.RNN([layers.GRUCell(8), layers.SimpleRNNCell(8)]),
        ]
    )
    make_sparse(model)
    x = np.random.default_rng(0).integers(1, 20, (4, 6))
    x[:2, 4:] = 0
    weights, before = models.weights_of(model), outputs(model, x)
    assert len(kwm.pack(model).weights) == 8
    assert_allclose(outputs(model, x), before, atol=1e-5)
    kwm.save_model(model, tmp_path / "m.safetensors")
    loaded = kwm.load_model(tmp_path / "m.safetensors")
    models.assert_same(outputs(loaded, x), outputs(model, x))
    kwm.unpack(loaded)
    models.assert_same(models.weights_of(loaded), weights)


def test_what_reads_its_kernels_whole_stays_dense():
    keras.utils.set_random_seed(0)
    model = make_sparse(
        sequential(SHAPE, layers.LSTM(8), layers.Dense(4)),
    )
    before = outputs(model, normal(2, *SHAPE))
    report = kwm.pack(model)
    reads = keras.backend.backend() == "torch"
    assert len(report.weights) == (1 if reads else 3)
    assert [s.reason for s in report.skipped] == 2 * reads * [
        "of LSTM, which on torch reads its kernels whole; pass "
        "`use_cudnn=False` to it"
    ]
    assert_allclose(outputs(model, normal(2, *SHAPE)), before, atol=1e-5)
