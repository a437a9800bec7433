"""See `backend.interface`."""

import contextlib
import importlib

import keras
import numpy as np
import tensorflow as tf


def vjp(function, *inputs):
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        output = function(*inputs)

    def pullback(upstream):
        return tape.gradient(
            output,
            inputs,
            upstream,
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )

    return output, pullback


def loss_gradients(model, variables, x, y, sample_weight):
    with tf.GradientTape() as tape:
        loss = model.compute_loss(
            x, y, model(x, training=False), sample_weight, training=False
        )
    return tape.gradient(loss, [v.value for v in variables])


@contextlib.contextmanager
def full_precision():
    config = tf.config.experimental
    before = config.tensor_float_32_execution_enabled()
    config.enable_tensor_float_32_execution(False)
    try:
        yield
    finally:
        config.enable_tensor_float_32_execution(before)


def compiled(function, static=()):
    return function


def fused(function):
    # One each, or TensorFlow warns of retracing where there are many shapes.
    functions = {}

    def call(*args):
        args = tf.nest.map_structure(_dense, args)
        key = tuple(
            tuple(x.shape) if tf.is_tensor(x) else x
            for x in tf.nest.flatten(args)
        )
        if key not in functions:
            functions[key] = tf.function(
                function, autograph=False, jit_compile=True
            )
        return functions[key](*args)

    return call


def _dense(x):
    """A tensor for a variable, of TensorFlow or Keras, or sparse gradient."""
    return tf.convert_to_tensor(x) if hasattr(x, "dtype") else x


def compiled_call(layer):
    return layer.predict_on_batch


def after(tensors, first):
    with tf.control_dependencies(first):
        return [tf.identity(tensor) for tensor in tensors]


def view_of(tensor):
    device = tf.DeviceSpec.from_string(tensor.device).device_type
    # Of a scalar in bfloat16 NumPy makes no array.
    if device != "CPU" or not tensor.shape.rank:
        return None
    return np.asarray(tensor)


def array_of(tensor):
    return keras.ops.convert_to_numpy(tensor)


def tensor_of(array):
    if array.dtype == "bfloat16":
        # Dtypes of ml_dtypes are not part of DLPack's interface in NumPy.
        return tf.bitcast(tensor_of(array.view("uint16")), tf.bfloat16)
    return tf.experimental.dlpack.from_dlpack(array.__dlpack__())


def layouts():
    return None


def processes():
    return None


def in_place():
    return None


def products():
    return _module("sparse_matmul")


def gpu_products():
    return None


def attention():
    return None


def generation():
    return _module("generation")


def _module(name):
    return importlib.import_module(
        f"keras_weightmods.backend.tensorflow.{name}"
    )
