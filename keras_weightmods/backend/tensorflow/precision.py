"""Products of float32 matrices in float32, also on a GPU."""

import contextlib

import tensorflow as tf


@contextlib.contextmanager
def full_precision():
    """A context in which TensorFlow rounds no factor of a product."""
    config = tf.config.experimental
    before = config.tensor_float_32_execution_enabled()
    config.enable_tensor_float_32_execution(False)
    try:
        yield
    finally:
        config.enable_tensor_float_32_execution(before)
