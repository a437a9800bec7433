"""What the methods do with convolutions."""

import keras
import pytest

import keras_weightmods as kwm
from tests import models

pytestmark = pytest.mark.one_backend
layers = keras.layers
LAST = {"data_format": "channels_last"}


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
    assert all(kernel.error is None for kernel in expected.kernels)
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
