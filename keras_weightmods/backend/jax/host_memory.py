"""Tensors and NumPy arrays of one memory."""

import jax.numpy as jnp
import keras
import numpy as np


def view_of(tensor):
    """The tensor as a NumPy array in its memory, or None if that cannot be."""
    if [device.platform for device in tensor.devices()] == ["cpu"]:
        return np.asarray(tensor)
    return None


def array_of(tensor):
    """Return the values of a tensor as a NumPy array, bit for bit."""
    return keras.ops.convert_to_numpy(tensor)


def tensor_of(array):
    """A tensor, on the CPU in the memory of the array where it is aligned."""
    # Without the dtype JAX makes a copy.
    return jnp.asarray(array, dtype=array.dtype)
