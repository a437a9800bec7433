"""The methods on layers that are no Dense, EinsumDense or convolution."""

import contextlib

import keras
import numpy as np
import pytest

import keras_weightmods as kwm
from tests import models

layers = keras.layers
ON_TORCH = keras.backend.backend() == "torch"
LAST = {"data_format": "channels_last"}
MODELS = {
    "recurrent": (
        lambda: [
            layers.LSTM(8, return_sequences=True),
            # The breadth is tested on torch, the fastest to start.
            *(ON_TORCH * [layers.GRU(8, return_sequences=True)]),
            *(ON_TORCH * [layers.Bidirectional(layers.SimpleRNN(4))]),
        ],
        (5, 8),
    ),
    "transposed": (
        lambda: [
            *(ON_TORCH * [layers.Conv2DTranspose(8, 3, 2, **LAST)]),
            *(ON_TORCH * [layers.Reshape((49, 8))]),
            layers.Conv1DTranspose(4, 3, **LAST),
        ],
        (3, 3, 8) if ON_TORCH else (9, 8),
    ),
}

COUNTS = {"recurrent": 2 + 6 * ON_TORCH, "transposed": 1 + ON_TORCH}


def make(name):
    keras.utils.set_random_seed(0)
    make_layers, shape = MODELS[name]
    return models.sequential(shape, *make_layers()), models.normal(8, *shape)


@pytest.mark.parametrize("name", MODELS)
def test_cast_lift_and_files(name, tmp_path):
    model, x = make(name)
    count = len(kwm.find_targets(model))
    assert count == COUNTS[name]
    cast = kwm.CAST(model)
    cast.compile(loss="mse", jit_compile=models.JIT)
    y = models.normal(*model(x).shape)
    unread = contextlib.nullcontext()
    if name == "recurrent":
        unread = pytest.warns(UserWarning, match="could not be read")
    with unread:
        cast.fit(x, y, batch_size=4, epochs=2, verbose=0)
    cast.finalize()
    kwm.assert_sparse(model)
    assert len(kwm.sparsity_report(model).kernels) == count

    before = models.weights_of(model)
    model.compile(kwm.SparseAdamW(0.1), "mse", jit_compile=models.JIT)
    lift = kwm.PrincipalMaskCallback(0.25, keep_pattern=True)
    model.fit(x, y, batch_size=4, verbose=0, callbacks=[lift])
    kwm.assert_sparse(model)
    kernels = {t.path for t in kwm.find_targets(model)}
    for weight, old in zip(model.weights, before):
        moved = not np.array_equal(models.numpy(weight), old)
        assert moved == (weight.path in kernels)

    model.compile("sgd", "mse")
    kwm.attach_weight_norm(model)
    kwm.save_model(model, tmp_path / "model")
    loaded = kwm.load_model(tmp_path / "model")
    models.assert_same(models.outputs(loaded, x), models.outputs(model, x))


@pytest.mark.parametrize("name", MODELS)
def test_one_shot_says_what_it_went_by(name):
    model, x = make(name)
    report = kwm.sparsify(model, "2:4", "sparsegpt", data=x, verbose=0)
    kwm.assert_sparse(model)
    by = {k.path.split("/")[-2]: (k.method, k.note) for k in report.kernels}
    if name == "recurrent":
        note = "the inputs of LSTMCell cannot be read"
        assert by["lstm_cell"] == ("magnitude", note)
    else:
        assert set(by.values()) == {("sparsegpt", "")}


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_separable_convolutions_have_inputs(method):
    keras.utils.set_random_seed(0)
    layer = layers.SeparableConv2D(8, 3, data_format="channels_last")
    model = models.sequential((6, 6, 8), layer)
    x = models.normal(4, 6, 6, 8) * np.exp(models.normal(8, seed=1))
    depthwise = keras.ops.depthwise_conv(
        x, layer.depthwise_kernel, data_format="channels_last"
    )
    rows = models.numpy(depthwise).reshape(-1, 8)
    before = models.numpy(layer.pointwise_kernel).reshape(8, 8)
    report = kwm.sparsify(model, "2:4", method, data=x, verbose=0)
    assert [k.method for k in report.kernels] == [method]
    if method == "wanda":
        norms = np.sqrt(np.square(rows).mean(axis=0))
        expected = kwm.ops.nm_mask(before * norms[:, None], "2:4")
        after = models.numpy(layer.pointwise_kernel).reshape(8, 8)
        np.testing.assert_array_equal(after != 0, models.numpy(expected))
