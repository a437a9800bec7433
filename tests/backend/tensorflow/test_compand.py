import keras
import numpy as np
import pytest

import keras_weightmods as kwm
from keras_weightmods.backend import backend_module
from keras_weightmods.ops import compand

if keras.backend.backend() != "tensorflow":
    pytest.skip("needs TensorFlow", allow_module_level=True)

import tensorflow as tf


@pytest.fixture
def arrays():
    v = tf.constant(np.random.default_rng(0).normal(size=(6, 5)), tf.float32)
    if not backend_module("compand").is_native(v):
        pytest.skip("no compiled kernels")
    return v, tf.constant(0.7), tf.constant(1.3)


def gradients(*arrays):
    with tf.GradientTape() as tape:
        tape.watch(arrays)
        total = tf.reduce_sum(tf.sin(compand(*arrays, training=True)))
    return tape.gradient(total, arrays)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_function(jit_compile, arrays):
    function = tf.function(gradients, jit_compile=jit_compile)
    for got, expected in zip(function(*arrays), gradients(*arrays)):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_rows_of_any_number(arrays):
    scalar = tf.TensorSpec(())
    function = tf.function(
        gradients, input_signature=[tf.TensorSpec((None, 5)), scalar, scalar]
    )
    for got, expected in zip(function(*arrays), gradients(*arrays)):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_inference_can_be_exported(tmp_path):
    model = keras.Sequential([keras.Input((6,)), kwm.CompanderDense(4)])
    model.compile("sgd", "mse")
    x = np.ones((2, 6), "float32")
    model.fit(x, np.ones((2, 4)), verbose=0)
    model.export(tmp_path, verbose=False)
    assert b"kwm_xla" not in (tmp_path / "saved_model.pb").read_bytes()
    loaded = tf.saved_model.load(tmp_path)
    np.testing.assert_allclose(loaded.serve(x), model(x), rtol=1e-6)
