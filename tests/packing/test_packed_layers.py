"""Packed layers against the layers that they were, whatever their kind."""

from functools import partial

import keras
import numpy as np
import pytest
from keras import layers, ops
from numpy.testing import assert_allclose

import keras_weightmods as kwm
from tests import models, references
from tests.backends import breadth
from tests.models import make_sparse, normal, numpy, outputs, sequential

one_backend = pytest.mark.one_backend
pytestmark = pytest.mark.filterwarnings("ignore:`pack` rounded")
FIRST = {"padding": "same", "data_format": "channels_first"}
Conv1D, Conv2D, Conv3D = layers.Conv1D, layers.Conv2D, layers.Conv3D
# What makes a layer, and the shape of its input. All patches and stacks of
# each kind are tested with `layer_kinds`. All have fewer than 32 patches, which
# AMX would multiply in bfloat16.
LAYERS = {
    "2d": (partial(Conv2D, 5, (2, 4), (3, 2)), (6, 7, 4)),
    "stack": (
        partial(layers.EinsumDense, "btge,egh->bght", (3, 16, 4)),
        (4, 3, 8),
    ),
    "1d": (partial(Conv1D, 5, 3, padding="causal", dilation_rate=2), (9, 8)),
    "2d first": (partial(Conv2D, 17, 3, dilation_rate=2, **FIRST), (12, 5, 3)),
    "3d": (partial(Conv3D, 3, 2, use_bias=False), (4, 3, 5, 4)),
}


def make(name, **more):
    """A sparse model of one layer, and its input."""
    keras.utils.set_random_seed(0)
    layer, shape = LAYERS[name]
    model = models.randomize(sequential(shape, layer(**more)))
    return make_sparse(model), normal(2, *shape, seed=1)


@breadth("name", list(LAYERS), 0, 1)
def test_a_packed_layer_computes_what_it_did(name):
    model, x = make(name)
    (layer,) = model.layers
    before, weights = outputs(model, x), models.weights_of(model)
    plain = type(layer), layer.get_config()
    count = len(kwm.find_targets(model))
    report = kwm.pack(model)
    assert [w.pattern for w in report.weights] == ["2:4"] * count
    assert not kwm.find_targets(model)
    kwm.assert_sparse(model, "2:4")
    assert_allclose(outputs(model, x), before, atol=1e-5)
    kwm.unpack(model)
    models.assert_same(models.weights_of(model), weights)
    assert (type(layer), layer.get_config()) == plain


@one_backend
@pytest.mark.parametrize(
    ("name", "dtype", "pattern"),
    [
        ("1d", "int8", "2:4"),
        ("2d", "int4", "2:4"),
        ("2d first", "int8", None),
    ],
)
def test_in_integers_patches_are_rounded(name, dtype, pattern):
    model, x = make(name)
    (layer,) = model.layers
    if pattern is None:
        models.randomize(model)
    (weight,) = kwm.pack(model, dtype).weights
    assert (weight.pattern, weight.activations) == (pattern, "int8")
    is_first = layer.data_format == "channels_first"
    rows = references.convolution_patches(
        np.moveaxis(x, 1, -1) if is_first else x,
        layer.kernel_size,
        layer.strides,
        layer.padding,
        layer.dilation_rate,
    )
    flat = rows.reshape(-1, rows.shape[-1]).astype("float32")
    rows = references.round_activations(flat).reshape(rows.shape)
    kernel = numpy(layer.kernel).astype("float64")
    y = rows @ kernel.reshape(-1, kernel.shape[-1]) + numpy(layer.bias)
    y = np.moveaxis(y, -1, 1) if is_first else y
    assert_allclose(outputs(model, x), y, atol=1e-5)


@one_backend
def test_images_of_any_size():
    keras.utils.set_random_seed(0)
    model = sequential(
        (None, None, 4),
        Conv2D(8, 3, 2, "same", activation="relu"),
        layers.BatchNormalization(),
        Conv2D(4, 3, padding="same", activation="relu"),
        layers.GlobalAveragePooling2D(),
        layers.Dense(4),
    )
    make_sparse(models.randomize(model))
    images = [normal(2, *size, 4, seed=1) for size in ((6, 7), (9, 5))]
    before = [outputs(model, x) for x in images]
    assert len(kwm.pack(model).weights) == 3
    for x, y in zip(images, before):
        assert_allclose(model.predict(x, verbose=0), y, atol=1e-5)


@one_backend
def test_lora_and_gradients_are_those_of_the_dense_layer():
    model, x = make("2d")
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


class Standardized(Conv2D):
    def convolution_op(self, inputs, kernel):
        return super().convolution_op(inputs, kernel / 2)


class Custom(layers.Dense):
    def call(self, inputs):
        return ops.matmul(inputs, ops.tanh(self.kernel))


@one_backend
def test_what_stays_dense_is_reported():
    keras.utils.set_random_seed(0)
    shared = layers.Dense(8, name="shared"), layers.Dense(8, name="again")
    model = sequential(
        (8, 8, 8),
        Conv2D(8, 3, groups=2, name="grouped"),
        Standardized(8, 3, name="own"),
        layers.SeparableConv2D(8, 3, name="separable"),
        layers.Conv2DTranspose(8, 3, name="transposed"),
        *shared,
        Custom(8, name="custom"),
        Conv2D(3, 1, name="packed"),
        Conv2D(2, 3, name="odd"),
    )
    models.share_kernel(*shared)
    x = normal(1, 8, 8, 8)
    before = outputs(make_sparse(model), x)
    report = kwm.pack(model)
    packed = [w.path.split("/")[-2] for w in report.weights]
    assert packed == ["separable", "packed"]
    reasons = {s.path.split("/")[-2]: s.reason for s in report.skipped}
    for name, reason in {
        "grouped": "in 2 groups",
        "own": "of Standardized, whose `call` is not known",
        "transposed": "of a transposed convolution",
        "shared": "shared by several layers",
        "custom": "of Custom, whose `call` is not known",
        "odd": "27 is not a multiple of 4",
    }.items():
        assert reason in reasons[name]
    assert_allclose(outputs(model, x), before, atol=1e-5)


X = {
    "token_ids": np.array([[3, 1, 4, 1, 5, 0], [9, 2, 6, 5, 3, 5]]),
    "padding_mask": np.array([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]),
}


def mixture(family):
    pytest.importorskip("keras_hub")
    return make_sparse(models.randomize(models.causal_lm(family)))


@one_backend
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_mixture_and_its_file(family, tmp_path):
    model = mixture(family)
    before, weights = outputs(model, X), models.weights_of(model)
    targets = kwm.find_targets(model)
    assert any(target.stack_axes for target in targets)
    assert len(kwm.pack(model).weights) == len(targets)
    assert_allclose(outputs(model, X), before, rtol=1e-4, atol=1e-5)
    assert not kwm.find_targets(model)

    kwm.save_model(model, tmp_path / "model")
    loaded = kwm.load_model(tmp_path / "model")
    models.assert_same(outputs(loaded, X), outputs(model, X))
    for each in (model, loaded):
        kwm.unpack(each)
        models.assert_same(each.get_weights(), weights)


@one_backend
def test_stacks_without_compiled_kernels_are_held_dense(monkeypatch, tmp_path):
    model = mixture("qwen3_moe")
    kwm.pack(model, dtype="int8")
    expected = outputs(model, X)
    kwm.save_model(model, tmp_path / "model")
    name = "keras_weightmods.packing.packed_parameters.reason_for_dense"
    monkeypatch.setattr(name, lambda: "no kernels in this test")
    loaded = kwm.load_model(tmp_path / "model")
    assert_allclose(outputs(loaded, X), expected, rtol=1e-4, atol=1e-4)
    kwm.save_model(loaded, tmp_path / "again")
    monkeypatch.undo()
    again = kwm.load_model(tmp_path / "again")
    models.assert_same(outputs(again, X), expected)


@one_backend
def test_trained_values_of_a_stack_learn_and_keep_their_places():
    model = mixture("mixtral").backbone
    targets = [t for t in kwm.find_targets(model) if t.stack_axes]
    before = [numpy(t.variable) for t in targets]
    kwm.pack(model, targets=targets, trainable=True)
    models.fit_step(model, X, normal(*model(X).shape))
    kwm.unpack(model)
    for target, old in zip(targets, before):
        new = numpy(target.variable)
        assert not np.array_equal(new, old)
        np.testing.assert_array_equal(new[old == 0], 0)


@one_backend
@pytest.mark.parametrize(
    ("dtype", "activations", "close"),
    [
        ("bfloat16", None, 1e-4),
        ("int8", "int8", 0.1),
        ("int4", "float32", 1e-4),
    ],
)
def test_rounded_stacks_compute_with_what_they_give_back(
    dtype, activations, close
):
    model = mixture("gpt_oss")
    if activations == "int8":  # dense ones, too
        models.randomize(model)
        with pytest.raises(ValueError, match="at most two nonzeros"):
            kwm.pack(model)
    # The head is not 2:4, which inputs in float do not multiply.
    report = kwm.pack(model, dtype, head=None, activations=activations)
    assert all(weight.rounding_error > 0 for weight in report.weights)
    packed = outputs(model, X)
    kwm.unpack(model)
    rounded = outputs(model, X)
    assert_allclose(packed, rounded, atol=close * np.abs(rounded).max())
