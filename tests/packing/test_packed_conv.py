"""Convolutions with packed kernels against patches, taken a pixel at a time."""

import keras
import numpy as np
import pytest
from keras import layers, ops
from numpy.testing import assert_allclose

import keras_weightmods as kwm
from tests import models, references
from tests.models import make_sparse, normal, numpy, outputs, sequential

one_backend = pytest.mark.one_backend
# The layer, and the shape of an input, channels last.
CASES = {
    "1d": (layers.Conv1D, (9, 4), (6, 3), {}),
    "1d causal": (
        layers.Conv1D,
        (9, 8),
        (5, 3),
        {"padding": "causal", "dilation_rate": 2},
    ),
    "1d stride": (
        layers.Conv1D,
        (9, 4),
        (3, 4),
        {"strides": 2, "padding": "same"},
    ),
    "2d": (layers.Conv2D, (6, 7, 4), (17, 3), {}),
    "2d strides": (
        layers.Conv2D,
        (6, 7, 4),
        (5, (2, 4)),
        {"strides": (3, 2), "padding": "same", "activation": "tanh"},
    ),
    "2d channels first": (
        layers.Conv2D,
        (8, 7, 12),
        (5, 3),
        {
            "dilation_rate": 2,
            "padding": "same",
            "data_format": "channels_first",
        },
    ),
    "2d of one tap": (layers.Conv2D, (5, 4, 8), (3, 1), {"strides": 2}),
    "2d larger than its input": (
        layers.Conv2D,
        (2, 3, 4),
        (3, 5),
        {"padding": "same", "strides": 2},
    ),
    "3d": (
        layers.Conv3D,
        (4, 3, 5, 4),
        (3, 2),
        {"padding": "same", "use_bias": False, "strides": (1, 2, 2)},
    ),
}


def make(name, **kwargs):
    """A sparse model of one convolution, and its input."""
    kind, shape, (filters, size), options = CASES[name]
    keras.utils.set_random_seed(0)
    if options.get("data_format") == "channels_first":
        shape = (shape[-1], *shape[:-1])
    layer = kind(filters, size, **options, **kwargs)
    model = models.randomize(sequential(shape, layer))
    return make_sparse(model), normal(2, *shape, seed=1)


def expected(model, x, kernel, rounded=False):
    """The output in float64, from a kernel."""
    (layer,) = model.layers
    x = x.astype("float64")
    is_first = layer.data_format == "channels_first"
    if is_first:
        x = np.moveaxis(x, 1, -1)
    sizes = layer.kernel_size, layer.strides
    rows = references.convolution_patches(
        x, *sizes, layer.padding, layer.dilation_rate
    )
    if rounded:
        flat = rows.reshape(-1, rows.shape[-1]).astype("float32")
        rows = references.round_activations(flat).reshape(rows.shape)
    y = rows @ kernel.reshape(-1, kernel.shape[-1]).astype("float64")
    if layer.bias is not None:
        y = y + numpy(layer.bias)
    y = np.tanh(y) if layer.activation is keras.activations.tanh else y
    return np.moveaxis(y, -1, 1) if is_first else y


# On each backend; the others, which differ in sizes alone, on one.
EVERYWHERE = ("1d causal", "2d strides", "2d channels first")


@pytest.mark.parametrize(
    "name",
    [
        name if name in EVERYWHERE else pytest.param(name, marks=one_backend)
        for name in CASES
    ],
)
def test_is_the_convolution(name):
    model, x = make(name)
    (layer,) = model.layers
    before = numpy(layer.kernel)
    plain = type(layer), layer.get_config()
    report = kwm.pack(model)
    assert [w.pattern for w in report.weights] == ["2:4"]
    assert "kernel_meta" in [w.name for w in model.weights]
    assert_allclose(outputs(model, x), expected(model, x, before), atol=1e-5)
    models.assert_same(numpy(layer.kernel), before)
    kwm.unpack(model)
    models.assert_same(numpy(layer.kernel), before)
    assert (type(layer), layer.get_config()) == plain


@one_backend
@pytest.mark.parametrize("name", ["1d causal", "2d", "2d channels first"])
@pytest.mark.parametrize(
    ("dtype", "pattern"), [("int8", "2:4"), ("int4", "2:4"), ("int8", None)]
)
@pytest.mark.filterwarnings("ignore:`pack` rounded")
def test_in_integers_patches_are_rounded(name, dtype, pattern):
    model, x = make(name)
    (layer,) = model.layers
    if pattern is None:
        models.randomize(model)
    (weight,) = kwm.pack(model, dtype).weights
    assert weight.pattern == pattern
    assert weight.activations == "int8"
    found = expected(model, x, numpy(layer.kernel), rounded=True)
    assert_allclose(outputs(model, x), found, atol=1e-5)


def test_of_any_size(tmp_path):
    """As of images of several sizes, and in a file."""
    keras.utils.set_random_seed(0)
    model = sequential(
        (None, None, 4),
        layers.Conv2D(8, 3, 2, "same", activation="relu"),
        layers.BatchNormalization(),
        layers.Conv2D(4, 3, padding="same", activation="relu"),
        layers.GlobalAveragePooling2D(),
        layers.Dense(4),
    )
    make_sparse(models.randomize(model))
    images = [normal(2, *size, 4, seed=1) for size in ((6, 7), (9, 5))]
    before = [outputs(model, x) for x in images]
    report = kwm.pack(model)
    assert len(report.weights) == 3
    for x, y in zip(images, before):
        assert_allclose(outputs(model, x), y, atol=1e-5)
        assert_allclose(model.predict(x, verbose=0), y, atol=1e-5)
    path = tmp_path / "packed.safetensors"
    kwm.save_model(model, path)
    other = kwm.load_model(path)
    models.assert_same(outputs(other, images[0]), outputs(model, images[0]))
    kwm.unpack(other)
    assert_allclose(outputs(other, images[1]), before[1], atol=1e-5)


def test_lora_and_gradients_are_those_of_the_dense_layer():
    model, x = make("2d strides")
    (layer,) = model.layers
    layer.enable_lora(2)
    layer.lora_kernel_b.assign(normal(2, 5))
    dense = outputs(model, x)
    slopes = models.gradients(lambda x: ops.sum(model(x) ** 2), x)
    kwm.pack(model)
    assert_allclose(outputs(model, x), dense, atol=1e-4)
    found = models.gradients(lambda x: ops.sum(model(x) ** 2), x)
    assert_allclose(found[0], slopes[0], atol=1e-3)
    names = [v.name for v in model.trainable_variables]
    assert names == ["bias", "lora_kernel_a", "lora_kernel_b"]
    models.fit_step(model, x, dense)


class Standardized(layers.Conv2D):
    def convolution_op(self, inputs, kernel):
        return super().convolution_op(inputs, kernel / 2)


@one_backend
def test_what_stays_dense_is_reported():
    keras.utils.set_random_seed(0)
    model = sequential(
        (8, 8, 8),
        layers.Conv2D(8, 3, groups=2, name="grouped"),
        Standardized(8, 3, name="own"),
        layers.SeparableConv2D(8, 3, name="separable"),
        layers.Conv2DTranspose(8, 3, name="transposed"),
        layers.Conv2D(3, 1, name="packed"),
        layers.Conv2D(2, 3, name="odd"),
    )
    make_sparse(model)
    report = kwm.pack(model)
    packed = [w.path.split("/")[-2] for w in report.weights]
    assert packed == ["separable", "packed"]
    reasons = {s.path.split("/")[-2]: s.reason for s in report.skipped}
    assert "in 2 groups" in reasons["grouped"]
    assert "of Standardized, whose `call` is not known" in reasons["own"]
    assert "of a transposed convolution" in reasons["transposed"]
    assert "is not a multiple of 4" in reasons["odd"]
