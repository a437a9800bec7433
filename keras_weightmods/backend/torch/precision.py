"""Products of float32 matrices in float32, also on a GPU."""

import contextlib

import torch


@contextlib.contextmanager
def full_precision():
    """A context in which torch rounds no factor of a product."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_float32_matmul_precision(before)
