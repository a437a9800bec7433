"""`sparse_matmul` on TensorFlow: XLA custom calls through XlaCallModule.

Eager, in `tf.function` with or without `jit_compile`, with a batch of any
size, and in a SavedModel, which runs where the package was imported. XLA's
thread pool shares the work.
"""

import functools

import keras
import numpy as np
import tensorflow as tf

from keras_weightmods import native
from keras_weightmods.backend.tensorflow import xla_calls
from keras_weightmods.native.packed import Packed, pack_kernel, unpack_tensor


def reason_unavailable():
    """Return why the compiled kernels cannot be used; empty if they can."""
    if not native.is_available():
        return native.reason_unavailable()
    if native.xla_handler(native.XLA_TARGETS[0]) is None:
        return native.NO_XLA
    if tf.config.list_physical_devices("GPU"):
        return (
            "on TensorFlow the compiled kernels are for the CPU alone, and "
            "this process has a GPU. Use JAX or torch, or hide the GPU by "
            "CUDA_VISIBLE_DEVICES=''."
        )
    return _refusal()


@functools.cache
def _refusal():
    """What TensorFlow has against the handlers, found by a first product.

    The ways into XLA are not in its public interface.
    """
    try:
        xla_calls.register()
        with tf.init_scope():
            kernel = pack_kernel(np.ones((2, 1), np.float32))
            correct = float(sparse_matmul(tf.ones((1, 2)), kernel)[0, 0]) == 2
    except (
        AttributeError,
        ImportError,
        OSError,
        TypeError,
        tf.errors.OpError,
    ) as error:
        return (
            f"TensorFlow {tf.__version__} does not take the compiled kernels: "
            f"{error}. They are tested with TensorFlow 2.21."
        )
    return "" if correct else f"wrong results on TensorFlow {tf.__version__}."


# AutoGraph would rewrite the nested functions, and mix up their names.
@tf.autograph.experimental.do_not_convert
def sparse_matmul(x, packed):
    """See `keras_weightmods.ops.sparse_matmul`."""
    multiply = _matmul_int8 if packed.activations == "int8" else _matmul
    values = _tensor(packed.values)
    is_bfloat16 = x.dtype == values.dtype == tf.bfloat16
    y = multiply(
        x if is_bfloat16 else tf.cast(x, tf.float32),
        values,
        tf.zeros((0,), "int32") if packed.is_dense else _tensor(packed.meta),
        tf.zeros((0,)) if packed.scale is None else _tensor(packed.scale),
        packed.shape[1],
    )
    return tf.cast(y, x.dtype)


def _tensor(array):
    # Keras' own function leaves a variable as it is.
    value = array.value if isinstance(array, keras.Variable) else array
    return tf.convert_to_tensor(value)


def _matmul(x, values, meta, scale, size, transposed=False):
    """By the kernel or its transpose; `size` entries in the last axis."""

    @tf.custom_gradient
    def matmul(x, values, meta, scale):
        def gradient(dy):
            given = tf.cast(dy, tf.float32)
            weights = values, meta, scale
            dx = _matmul(given, *weights, x.shape[-1], not transposed)
            dx, dvalues = tf.cast(dx, dy.dtype), None
            if values.dtype == tf.float32:
                pair = (dy, x) if transposed else (x, dy)
                dvalues = _values_gradient(*pair, meta)
            return dx, dvalues, None, None

        target, weights = "kwm_xla_matmul", [values, meta, scale]
        if transposed:
            target = "kwm_xla_matmul_transposed"
        elif x.dtype == tf.bfloat16:
            target, weights = "kwm_xla_matmul_bfloat16", [values, meta]
        shape = [*x.shape[:-1], size]
        return xla_calls.call(target, shape, x, *weights), gradient

    return matmul(x, values, meta, scale)


def _matmul_int8(x, values, meta, scale, n):
    """By int8 activations; an empty meta, in one axis, is a dense matrix."""

    @tf.custom_gradient
    def matmul(x, values, meta, scale):
        def gradient(dy):
            k = x.shape[-1]
            if len(meta.shape) == 1:
                dtype = "int8" if values.dtype == tf.int8 else "int4"
                packed = Packed(values, None, scale, (k, n), dtype, "int8")
                axes = [[len(dy.shape) - 1], [1]]
                dx = tf.tensordot(dy, unpack_tensor(packed), axes)
            else:
                dx = _matmul(dy, values, meta, scale, k, transposed=True)
            return dx, None, None, None

        shape = [*x.shape[:-1], n]
        weights = values, meta, scale
        y = xla_calls.call("kwm_xla_matmul_int8", shape, x, *weights)
        return y, gradient

    return matmul(x, values, meta, scale)


@tf.custom_gradient
def _values_gradient(x, dy, meta):
    def gradient(ddvalues):
        weights = ddvalues, meta, tf.zeros((0,))
        dx = _matmul(dy, *weights, x.shape[-1], transposed=True)
        return dx, _matmul(x, *weights, dy.shape[-1]), None

    blocks, rows, columns = meta.shape
    shape = [blocks, 16 * rows, columns]
    y = xla_calls.call("kwm_xla_values_gradient", shape, x, dy, meta)
    return y, gradient
