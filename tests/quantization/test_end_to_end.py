"""Scales that are trained through the whole model."""

import keras
import numpy as np
import pytest

import keras_weightmods as kwm
from keras_weightmods.core import seam
from keras_weightmods.ops.rounding import Grid
from keras_weightmods.quantization import quantize as module
from keras_weightmods.quantization.grid_weights import GridScales
from tests import models, references
from tests.backends import breadth
from tests.models import gradients, normal, numpy
from tests.quantization.test_head import TOKENS, WIDTH, make, table_of
from tests.quantization.test_quantize import data, kernels_of, quantize

one_backend = pytest.mark.one_backend


def log_softmax(x):
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


@breadth("kind", ["dense", "tied", "untied"])
def test_scales_are_trained_by_the_divergence_of_the_logits(kind):
    """In three bits. On rows held out; the integers stay."""
    model, table = make(kind)
    kernel = model.get_layer("dense").kernel
    _, held = models.split(TOKENS)
    given = log_softmax(numpy(model(held)).astype("float64"))
    before, found, divergence = models.weights_of(model), [], []
    options = {"bits": 3, "group_size": 32, "verbose": 0, "batch_size": 4}
    for refine in (None, "scales"):
        model.set_weights(before)
        with pytest.warns(UserWarning, match="scale for each 64 inputs"):
            report = kwm.quantize(model, TOKENS, refine=refine, **options)
        found.append([table_of(table), numpy(kernel)])
        now = log_softmax(numpy(model(held)).astype("float64"))
        divergence.append(np.mean(np.sum(np.exp(given) * (given - now), -1)))
    np.testing.assert_allclose(report.scales, divergence, rtol=1e-3)
    assert divergence[1] < 0.98 * divergence[0]
    for rounded, trained in zip(*found):
        assert references.is_on_grid(trained, 3, 32)
        assert (trained != rounded).any()
        for start in range(0, WIDTH, 32):
            part = slice(start, start + 32)
            ratio = trained[part] / np.where(rounded, rounded, 1)[part]
            spread = np.where(rounded[part], ratio, ratio.max(0)) - ratio.max(0)
            assert abs(spread).max() < 1e-5
    assert "scales end to end" in str(report)


@one_backend
@pytest.mark.parametrize("positions", [(), (4,)])
def test_scales_of_a_model_without_a_head(positions):
    """By the squared error of its outputs, on rows held out."""
    layers = keras.layers.Dense(24, "relu"), keras.layers.Dense(6)
    model = models.sequential((*positions, 72), *layers)
    model, x = models.randomize(model), data().reshape(-1, *positions, 72)
    _, held = models.split(x)
    given = numpy(model(held)).astype("float64")
    report = quantize(model, x, bits=2, refine="scales")
    before, after = report.scales
    assert after < before
    energy = np.sum(given**2, axis=-1)
    change = np.sum((numpy(model(held)) - given) ** 2, axis=-1)
    error = np.mean(change / (energy + 1e-3 * energy.mean()))
    assert after == pytest.approx(error, rel=1e-3)
    for w in kernels_of(model):
        assert references.is_on_grid(w, 2, 64)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "bfloat16"])
def test_gradients_of_scales(policy):
    """The stored weights are integers, and a scale gets the sum of theirs.

    In bfloat16 the weight is the exact product, rounded once.
    """
    model = models.sequential((6,), keras.layers.Dense(3, dtype=policy))
    (target,) = kwm.find_targets(model)
    scales = normal(2, 3, seed=1).round(1) / 8 + 0.5
    # As `quantize` does: products are exact in the type of the weight.
    grid = Grid(4, 4, precision=5 if policy == "bfloat16" else 8)
    scales = grid.rounded_scales(scales)
    spread = np.repeat(scales, 4, axis=0)[:6]
    integers = np.clip(np.rint(4 * normal(6, 3)), -8, 7)
    stored = keras.ops.convert_to_tensor(integers)
    target.variable.assign(integers * spread)
    item = GridScales(target, keras.ops.convert_to_tensor(scales[None]), grid)
    seam.attach(model, [item])
    np.testing.assert_array_equal(numpy(target.variable), integers)
    (factor,) = item.parameters
    outer = keras.ops.convert_to_tensor(normal(6, 3, seed=3))
    values = numpy(keras.ops.cast(item.effective(stored), "float32"))
    weight = integers * item.grid.rounded_scales(spread)
    weight = keras.ops.cast(weight, target.layer.compute_dtype)
    weight = numpy(keras.ops.cast(weight, "float32"))
    np.testing.assert_array_equal(values, weight)

    def loss(value):
        with keras.StatelessScope([(factor, value)]):
            return keras.ops.sum(
                keras.ops.multiply(item.effective(stored), outer)
            )

    (gradient,) = gradients(loss, np.ones((1, 2, 3), "float32"))
    products = integers * spread * numpy(outer)
    groups = np.pad(products, ((0, 2), (0, 0)))
    expected = groups.reshape(2, 4, 3).sum(axis=1)
    error = 1e-5 if policy == "float32" else 0.02
    np.testing.assert_allclose(gradient[0], expected, rtol=error, atol=error)
    factor.assign(numpy(factor) * 1.1)
    seam.fold(model, GridScales)
    assert references.is_on_grid(numpy(target.variable), 4, 4)


@one_backend
def test_a_head_in_float16_is_no_teacher():
    model, _ = make("dense")
    for layer in model.layers:
        layer.dtype_policy = "mixed_float16"
    report = kwm.quantize(model, TOKENS, refine="scales", verbose=0)
    assert report.scales is None
    assert "Without scales" in str(report)
    inputs = keras.Input((72,))
    outputs = keras.ops.squeeze(keras.layers.Dense(1)(inputs), -1)
    report = quantize(keras.Model(inputs, outputs), data(), refine="scales")
    assert report.scales is report.held_out is None
    assert "Without scales: it gives no vector of floats" in str(report)


@pytest.mark.skipif(
    keras.backend.backend() == "jax",
    reason="JAX compiles each length, which takes long",
)
def test_batches_of_several_lengths():
    """Also the third that Keras sees, and those that it shuffles."""
    layers = keras.layers.Dense(24, "relu"), keras.layers.Dense(6)
    model = models.randomize(models.sequential((None, 72), *layers))
    lengths = (4, 4, 4, 3, 5)
    x = (data(8 * t, 72).reshape(8, t, 72) for t in lengths)
    report = quantize(model, x, refine=("blocks", "scales"), epochs=2)
    assert len(report.blocks) == 2
    assert report.scales[1] <= report.scales[0]
    for w in kernels_of(model):
        assert references.is_on_grid(w, 4, 64)


@one_backend
@pytest.mark.filterwarnings("ignore:All was rounded to nearest")
def test_a_kernel_that_two_layers_share_keeps_its_scales(monkeypatch):
    shared = keras.layers.Dense(72), keras.layers.Dense(72)
    model = models.sequential((72,), *shared, keras.layers.Dense(6))
    models.share_kernel(*shared)
    seen = []

    def trained(model, head, values, outputs, items, *_):
        seen.extend(item.target.layer for item in items)
        return 1.0, 0.9

    monkeypatch.setattr(module, "train_scales", trained)
    quantize(models.randomize(model), data(), refine="scales")
    assert seen == [model.layers[-1]]


@one_backend
def test_scales_that_diverge_are_left_as_they_were(monkeypatch):
    model, x = models.randomize(models.mlp(72, 24, 6)), data()
    before = models.weights_of(model)
    quantize(model, x)
    rounded = kernels_of(model)
    model.set_weights(before)
    monkeypatch.setattr(module, "_SCALES", (1, 1e30))
    report = quantize(model, x, refine="scales")
    models.assert_same(kernels_of(model), rounded)
    assert report.scales[0] == report.scales[1]
    assert "was undone" in str(report)
