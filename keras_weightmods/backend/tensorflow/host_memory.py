"""Tensors and NumPy arrays of one memory."""

import keras
import numpy as np
import tensorflow as tf


def view_of(tensor):
    """The tensor as a NumPy array in its memory, or None if that cannot be."""
    device = tf.DeviceSpec.from_string(tensor.device).device_type
    # Of a scalar in bfloat16 NumPy makes no array.
    if device != "CPU" or not tensor.shape.rank:
        return None
    return np.asarray(tensor)


def array_of(tensor):
    """Return the values of a tensor as a NumPy array, bit for bit."""
    return keras.ops.convert_to_numpy(tensor)


def tensor_of(array):
    """Return a tensor, on the CPU in the memory of the array."""
    if array.dtype == "bfloat16":
        # Dtypes of ml_dtypes are not part of DLPack's interface in NumPy.
        return tf.bitcast(tensor_of(array.view("uint16")), tf.bfloat16)
    return tf.experimental.dlpack.from_dlpack(array.__dlpack__())
