"""A bound on the tensors that are made in a scope."""

import contextlib
import math

import torch
from torch.overrides import TorchFunctionMode

_MADE_BY = {
    torch.empty,
    torch.full,
    torch.normal,
    torch.ones,
    torch.rand,
    torch.randint,
    torch.randn,
    torch.zeros,
}


class _Bounded(TorchFunctionMode):
    def __init__(self, most):
        super().__init__()
        self.most = most

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in _MADE_BY and str(kwargs.get("device")) != "meta":
            sizes = [kwargs.get("size"), *args]
            for size in sizes:
                if isinstance(size, (tuple, list)):
                    self._check(size)
        return function(*args, **kwargs)

    def _check(self, size):
        numbers = [n for n in size if isinstance(n, int)]
        if math.prod(numbers) > self.most:
            raise ValueError(
                f"A tensor of {' x '.join(map(str, numbers))} entries is more "
                f"than {self.most}"
            )


@contextlib.contextmanager
def at_most_entries(most):
    """Raise ValueError in a scope rather than make a larger tensor.

    Keras infers shapes on the device "meta", which takes no memory, and where
    that fails on tensors of ones of the shape that a file may have told.
    """
    with _Bounded(most):
        yield
