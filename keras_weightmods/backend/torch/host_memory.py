"""Tensors and NumPy arrays of one memory."""

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


def tensor_of(array):
    """Return a tensor, in the memory of the array."""
    if array.dtype == "bfloat16":
        return torch.from_numpy(array.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(array)
