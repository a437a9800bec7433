"""Weight normalization: exact at the start, foldable, a norm of its own."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_weightmods as kwm


def model_of(layer, shape):
    return keras.Sequential([keras.Input(shape), layer])


MODELS = {
    "dense": lambda: model_of(keras.layers.Dense(3), (5,)),
    "einsum first": lambda: model_of(
        keras.layers.EinsumDense("bqm,muh->bquh", (None, 2, 3)), (4, 5)
    ),
    "einsum several": lambda: model_of(
        keras.layers.EinsumDense("bquh,uhm->bqm", (None, 3)), (4, 2, 5)
    ),
    "conv": lambda: model_of(keras.layers.Conv2D(3, 2), (4, 4, 2)),
    "depthwise": lambda: model_of(keras.layers.DepthwiseConv2D(2), (4, 4, 3)),
}
AXES = {
    "dense": (0,),
    "einsum first": (0,),
    "einsum several": (0, 1),
    "conv": (0, 1, 2),
    "depthwise": (0, 1),
}


def reference(v, g, axes):
    v = np.float64(v)
    return g * v / np.sqrt(np.sum(v**2, axis=axes, keepdims=True))


def outputs(model):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *model.input_shape[1:])).astype("float32")
    return ops.convert_to_numpy(model(x))


@pytest.mark.parametrize("name", MODELS)
def test_same_function_then_g_over_the_norm(name):
    model = MODELS[name]()
    layer, weights = model.layers[0], list(model.weights)
    cls, before = type(layer), outputs(model)
    (kernel,) = kwm.attach_weight_norm(model).kernels
    np.testing.assert_allclose(outputs(model), before, rtol=0, atol=1e-6)
    v = weights[0].numpy()
    norm = np.sqrt(np.sum(v**2, axis=AXES[name], keepdims=True))
    np.testing.assert_allclose(kernel.g.numpy(), norm, rtol=1e-6)

    g = np.random.default_rng(1).uniform(-2, 2, norm.shape).astype("float32")
    kernel.g.assign(g)
    weights[0].assign(3 * v)
    np.testing.assert_allclose(
        ops.convert_to_numpy(layer.kernel),
        reference(v, g, AXES[name]),
        rtol=1e-5,
        atol=1e-7,
    )
    after = outputs(model)
    assert "norms" in str(kwm.fold(model))
    np.testing.assert_allclose(outputs(model), after, rtol=0, atol=1e-6)
    assert type(layer) is cls
    assert [id(w) for w in model.weights] == [id(w) for w in weights]


def test_a_train_step_follows_the_gradient():
    model = model_of(keras.layers.Dense(3, use_bias=False), (4,))
    (kernel,) = kwm.attach_weight_norm(model).kernels
    v, g = np.float64(model.weights[0].numpy()), np.float64(kernel.g.numpy())
    x = np.random.default_rng(0).normal(size=(8, 4))
    model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=False)
    model.fit(np.float32(x), np.ones((8, 3)), batch_size=8, verbose=0)
    norm = np.linalg.norm(v, axis=0, keepdims=True)
    to_w = x.T @ (2 * (x @ (g * v / norm) - 1) / 24)
    to_g = np.sum(to_w * v, axis=0, keepdims=True) / norm
    to_v = g / norm * to_w - g * to_g / norm**2 * v
    np.testing.assert_allclose(kernel.g.numpy(), g - 0.1 * to_g, atol=1e-6)
    np.testing.assert_allclose(
        model.weights[0].numpy(), v - 0.1 * to_v, atol=1e-6
    )


def test_zero_kernels_stay_finite_and_can_be_trained():
    model = model_of(keras.layers.Dense(3, kernel_initializer="zeros"), (4,))
    kwm.attach_weight_norm(model)
    model.compile(keras.optimizers.Adam(0.1), "mse", jit_compile=False)
    model.fit(np.ones((8, 4)), np.ones((8, 3)), epochs=2, verbose=0)
    kernel = ops.convert_to_numpy(model.layers[0].kernel)
    assert np.isfinite(kernel).all()
    assert np.abs(kernel).max() > 0


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "bfloat16", "float16"])
def test_low_precision_norms_are_in_float32(dtype):
    model = model_of(keras.layers.Dense(3, dtype=dtype), (4,))
    (kernel,) = kwm.attach_weight_norm(model).kernels
    assert kernel.g.dtype == "float32"
    assert np.isfinite(np.float32(outputs(model))).all()
