"""See `backend.interface`."""

import contextlib

import keras
import torch
import torch.utils.checkpoint

from keras_weightmods.backend.interface import Backend


class _Torch(Backend):
    def vjp(self, function, *inputs):
        inputs = tuple(x.detach().requires_grad_() for x in inputs)
        with torch.enable_grad():
            output = function(*inputs)
        # It holds no values of the output.
        edge = torch.autograd.graph.get_gradient_edge(output)

        def pullback(upstream):
            return torch.autograd.grad(
                edge, inputs, upstream, materialize_grads=True
            )

        return output.detach(), pullback

    @contextlib.contextmanager
    def full_precision(self):
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            with torch.no_grad():
                yield
        finally:
            torch.set_float32_matmul_precision(before)

    def recomputed(self, function):
        function = keras.remat(function)

        def run(*args, **kwargs):
            # An early stop is an exception, whose frames would hold all
            # tensors of a layer until the next search for garbage.
            with torch.utils.checkpoint.set_checkpoint_early_stop(False):
                return function(*args, **kwargs)

        return run

    def view_of(self, tensor):
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

    def array_of(self, tensor):
        # Keras' own way goes through float32, which changes NaN of bfloat16.
        tensor = tensor.detach().cpu()
        view = self.view_of(tensor)
        return super().array_of(tensor) if view is None else view

    def tensor_of(self, array):
        if array.dtype == "bfloat16":
            return torch.from_numpy(array.view("int16")).view(torch.bfloat16)
        return torch.from_numpy(array)


backend = _Torch()
