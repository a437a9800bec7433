"""`sparse_matmul` on TensorFlow: XLA custom calls through XlaCallModule.

Eager, in `tf.function` with or without `jit_compile`, with a batch of any
size, and in a SavedModel, which runs where the package was imported. XLA's
thread pool shares the work.
"""

import functools

import numpy as np
import tensorflow as tf

from keras_weightmods import native
from keras_weightmods.backend import xla_products
from keras_weightmods.backend.tensorflow import xla_calls
from keras_weightmods.native.packed import pack_kernel


def reason_unavailable():
    """Return why the compiled kernels cannot be used; empty if they can."""
    if reason := native.reason_without_xla():
        return reason
    if tf.config.list_physical_devices("GPU"):
        return (
            "on TensorFlow the compiled kernels are for the CPU alone, and "
            "this process has a GPU. Use JAX or torch, or hide the GPU by "
            "CUDA_VISIBLE_DEVICES=''."
        )
    return _refusal()


@functools.cache
def _refusal():
    """Return why TensorFlow refuses the handlers, found by a first product.

    The ways into XLA are not in its public interface.
    """
    try:
        xla_calls.register()
        with tf.init_scope():
            kernel = pack_kernel(np.ones((2, 1), np.float32))
            correct = float(sparse_matmul(tf.ones((1, 2)), kernel)[0, 0]) == 2
    except Exception as error:
        # Any error will do: the dense product is there.
        return (
            f"TensorFlow {tf.__version__} does not take the compiled kernels: "
            f"{error}. They are tested with TensorFlow 2.21."
        )
    return "" if correct else f"wrong results on TensorFlow {tf.__version__}."


# AutoGraph would rewrite the nested functions, and mix up their names.
@tf.autograph.experimental.do_not_convert
def sparse_matmul(x, packed):
    """See `keras_weightmods.ops.sparse_matmul`."""
    return xla_products.sparse_matmul(xla_calls, x, packed)
