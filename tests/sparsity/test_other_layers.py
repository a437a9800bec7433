"""The methods on layers that are no Dense, EinsumDense or convolution."""

import contextlib

import keras
import pytest

import keras_weightmods as kwm
from tests import models

pytestmark = pytest.mark.one_backend
layers = keras.layers
LAST = {"data_format": "channels_last"}
MODELS = {
    "recurrent": (
        lambda: [
            layers.LSTM(8, return_sequences=True),
            layers.GRU(8, return_sequences=True),
            layers.Bidirectional(layers.SimpleRNN(4)),
        ],
        (5, 8),
    ),
    "transposed": (
        lambda: [
            layers.Conv2DTranspose(8, 3, 2, **LAST),
            layers.Reshape((49, 8)),
            layers.Conv1DTranspose(4, 3, **LAST),
        ],
        (3, 3, 8),
    ),
}
COUNTS = {"recurrent": 8, "transposed": 2}


def make(name):
    keras.utils.set_random_seed(0)
    make_layers, shape = MODELS[name]
    return models.sequential(shape, *make_layers()), models.normal(8, *shape)


@pytest.mark.parametrize("name", MODELS)
def test_cast_and_one_shot(name):
    model, x = make(name)
    count = len(kwm.find_targets(model))
    assert count == COUNTS[name]
    cast = kwm.CAST(model)
    cast.compile(loss="mse")
    y = models.normal(*model(x).shape)
    unread = contextlib.nullcontext()
    if name == "recurrent":
        unread = pytest.warns(UserWarning, match="could not be read")
    with unread:
        cast.fit(x, y, batch_size=4, epochs=2, verbose=0)
    cast.finalize()
    kwm.assert_sparse(model)
    assert len(kwm.sparsity_report(model).kernels) == count

    model, _ = make(name)
    report = kwm.sparsify(model, "2:4", x, criterion="sparsegpt", verbose=0)
    kwm.assert_sparse(model)
    by = {k.path.split("/")[-2]: (k.criterion, k.note) for k in report.kernels}
    if name == "recurrent":
        criterion, note = by["lstm_cell"]
        assert criterion == "magnitude"
        assert "whose `call` is not known" in note
    else:
        assert set(by.values()) == {("sparsegpt", "")}


def convolutions():
    """Those that are sparsified, and others for each reason."""
    return models.sequential(
        (9, 9, 3),
        layers.Conv2D(8, 3, name="of_27", **LAST),
        layers.Conv2D(8, 3, name="plain", **LAST),
        layers.DepthwiseConv2D(3, name="depthwise", **LAST),
        layers.SeparableConv2D(8, 3, name="separable", **LAST),
        layers.Flatten(),
        layers.Dense(4, name="dense"),
    )


def test_all_methods_agree_on_convolutions():
    """On targets, contraction axes and reasons to skip."""
    x = models.normal(4, 9, 9, 3)
    y = models.normal(4, 4)
    model = models.randomize(convolutions())
    start = models.weights_of(model)
    expected = kwm.sparsify(model, verbose=0)
    sparse = models.weights_of(model)
    paths = [kernel.path for kernel in expected.kernels]
    assert [path.split("/")[-2] for path in paths] == [
        *("plain", "separable", "dense")
    ]
    reasons = {skip.path: skip.reason for skip in expected.skipped}
    (odd,) = (path for path in reasons if "of_27" in path)
    assert reasons[odd] == "its contraction size 27 is not a multiple of m=4"

    model.set_weights(start)
    report = kwm.SemiStructuredSparse.attach(model)
    assert [kernel.path for kernel in report.kernels] == paths
    assert {skip.path: skip.reason for skip in report.skipped} == reasons
    models.assert_same(models.weights_of(model), sparse)
    kwm.SemiStructuredSparse.detach(model)

    # A rate of zero: only what the first mask cuts changes.
    model.set_weights(start)
    adam = kwm.AdamS(0.0, total_steps=1, targets=model, decay="relative")
    model.compile(adam, "mse")
    with pytest.warns(UserWarning, match=f"{odd}: {reasons[odd]}"):
        model.fit(x, y, batch_size=4, verbose=0)
    adam.prune()
    assert [variable.path for variable in adam.sparsified] == paths
    models.assert_same(models.weights_of(model), sparse)
