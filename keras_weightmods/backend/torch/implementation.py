"""See `backend.interface`."""

import contextlib
import importlib

import keras
import torch


def vjp(function, *inputs):
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    with torch.enable_grad():
        output = function(*inputs)

    def pullback(upstream):
        return torch.autograd.grad(
            output, inputs, upstream, materialize_grads=True
        )

    return output.detach(), pullback


def loss_gradients(model, variables, x, y, sample_weight):
    with torch.enable_grad():
        loss = model.compute_loss(
            x, y, model(x, training=False), sample_weight, training=False
        )
        return torch.autograd.grad(loss, [v.value for v in variables])


@contextlib.contextmanager
def full_precision():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def compiled(function, static=()):
    return function


def fused(function):
    return function


def compiled_call(layer):
    return layer.predict_on_batch


def after(tensors, first):
    return tensors


def view_of(tensor):
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
    # Keras' own way goes through float32, which changes NaN of bfloat16.
    tensor = tensor.detach().cpu()
    view = view_of(tensor)
    return keras.ops.convert_to_numpy(tensor) if view is None else view


def tensor_of(array):
    if array.dtype == "bfloat16":
        return torch.from_numpy(array.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(array)


def layouts():
    return None


def processes():
    return None


def in_place():
    return _module("in_place")


def products():
    return _module("sparse_matmul")


def gpu_products():
    return _module("sparse_matmul_gpu")


def attention():
    return _module("attention")


def generation():
    return _module("generation")


def _module(name):
    return importlib.import_module(f"keras_weightmods.backend.torch.{name}")
