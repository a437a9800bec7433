"""Tensors and NumPy arrays of one memory."""

import keras
import torch


def view_of(tensor):
    """The tensor as a NumPy array in its memory, or None if that cannot be."""
    tensor = tensor.detach()
    if tensor.device.type != "cpu":
        return None
    if tensor.dtype == torch.bfloat16:
        # NumPy gets the dtype from ml_dtypes, which torch does not know.
        return tensor.view(torch.int16).numpy().view("bfloat16")
    try:
        return tensor.numpy()
    except TypeError:  # of 8 bits
        return None


def array_of(tensor):
    """Return the values of a tensor as a NumPy array, bit for bit.

    Keras' own way goes through float32, which changes NaN of bfloat16.
    """
    tensor = tensor.detach().cpu()
    view = view_of(tensor)
    return keras.ops.convert_to_numpy(tensor) if view is None else view


def tensor_of(array):
    """Return a tensor, in the memory of the array."""
    if array.dtype == "bfloat16":
        return torch.from_numpy(array.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(array)
