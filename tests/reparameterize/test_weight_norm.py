"""Weight normalization: its equation, its gradient, kernels of zeros."""

import keras
import numpy as np
import pytest
from keras.layers import EinsumDense
from numpy.testing import assert_allclose

import keras_weightmods as kwm
from tests.backends import breadth
from tests.models import fit_step, normal, numpy, sequential

MODELS = {
    "dense": (keras.layers.Dense(3), (5,), (0,)),
    "einsum two": (EinsumDense("bquh,uhm->bqm", (None, 3)), (4, 2, 5), (0, 1)),
    "depthwise": (keras.layers.DepthwiseConv2D(2), (4, 4, 3), (0, 1)),
}


@breadth("name", MODELS)
def test_kernel_is_g_times_the_direction(name):
    layer, shape, axes = MODELS[name]
    model = sequential(shape, layer)
    v = numpy(model.weights[0])
    report = kwm.attach_weight_norm(model)
    (kernel,) = report.kernels
    assert "norms" in str(report)
    norm = np.sqrt(np.sum(v**2, axis=axes, keepdims=True))
    assert_allclose(numpy(kernel.g), norm, rtol=1e-6)
    g = np.random.default_rng(1).uniform(-2, 2, norm.shape).astype("float32")
    kernel.g.assign(g)
    model.weights[0].assign(3 * v)
    expected = g * np.float64(v) / norm
    assert_allclose(numpy(layer.kernel), expected, rtol=1e-5, atol=1e-7)


def test_a_train_step_follows_the_gradient():
    model = sequential((4,), keras.layers.Dense(3, use_bias=False))
    (kernel,) = kwm.attach_weight_norm(model).kernels
    v, g = np.float64(model.weights[0].numpy()), np.float64(kernel.g.numpy())
    x = np.float64(normal(8, 4))
    fit_step(model, np.float32(x), np.ones((8, 3)))
    norm = np.linalg.norm(v, axis=0, keepdims=True)
    to_w = x.T @ (2 * (x @ (g * v / norm) - 1) / 24)
    to_g = np.sum(to_w * v, axis=0, keepdims=True) / norm
    to_v = g / norm * to_w - g * to_g / norm**2 * v
    assert_allclose(kernel.g.numpy(), g - 0.1 * to_g, atol=1e-6)
    assert_allclose(model.weights[0].numpy(), v - 0.1 * to_v, atol=1e-6)


@pytest.mark.one_backend
def test_zero_kernels_stay_finite_and_can_be_trained():
    model = sequential((4,), keras.layers.Dense(3, kernel_initializer="zeros"))
    kwm.attach_weight_norm(model)
    model.compile(keras.optimizers.Adam(0.1), "mse", jit_compile=False)
    model.fit(np.ones((8, 4)), np.ones((8, 3)), epochs=2, verbose=0)
    kernel = numpy(model.layers[0].kernel)
    assert np.isfinite(kernel).all()
    assert np.abs(kernel).max() > 0
