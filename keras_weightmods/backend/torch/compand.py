"""`compand` on torch: the compiled kernels, one pass for each direction."""

import torch
from torch.autograd.function import once_differentiable

from keras_weightmods import native
from keras_weightmods.backend.torch.threads import threads

# Multiply-adds that the compiled kernels take the time of, for an entry.
_WORK = 16


def is_native(v):
    """Return whether `compand` can be taken."""
    return (
        v.dtype == torch.float32
        and v.device.type == "cpu"
        # A program is to hold torch's own operators.
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and native.has_vectors()
    )


def compand(v, a, b, *by_torch):
    """`a * arctan(v / b)`; the arguments are those of `compand` on JAX."""
    return _Compand.apply(v, a, b)


class _Compand(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v, a, b):
        ctx.pair = float(a), float(b)
        w = torch.ops.keras_weightmods.compand(v, *ctx.pair)
        ctx.save_for_backward(v, w)
        return w

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        v, w = ctx.saved_tensors
        ops = torch.ops.keras_weightmods
        if not any(ctx.needs_input_grad[1:]):
            return ops.compand_slope(v, upstream, *ctx.pair), None, None
        return ops.compand_gradient(v, w, upstream, *ctx.pair)


_library = torch.library.Library("keras_weightmods", "FRAGMENT")
_library.define("compand(Tensor v, float a, float b) -> Tensor")
_library.define(
    "compand_slope(Tensor v, Tensor upstream, float a, float b) -> Tensor"
)
_library.define(
    "compand_gradient(Tensor v, Tensor w, Tensor upstream, float a, float b) "
    "-> (Tensor, Tensor, Tensor)"
)


@torch.library.impl(_library, "compand", "CPU")
def _native_compand(v, a, b):
    v = v.contiguous()
    w = torch.empty_like(v)
    native.library().kwm_compand(
        v.data_ptr(), v.numel(), a, b, w.data_ptr(), *threads(_WORK * v.numel())
    )
    return w


@torch.library.impl(_library, "compand_slope", "CPU")
def _native_slope(v, upstream, a, b):
    return _differentiate(v, None, upstream, a, b, None, None)


@torch.library.impl(_library, "compand_gradient", "CPU")
def _native_gradient(v, w, upstream, a, b):
    to_a, to_b = v.new_empty(()), v.new_empty(())
    w = w.contiguous()
    return _differentiate(v, w, upstream, a, b, to_a, to_b), to_a, to_b


def _differentiate(v, w, upstream, a, b, to_a, to_b):
    """Return the gradient of v, and fill in those of a and b."""
    v, upstream = v.contiguous(), upstream.contiguous()
    to_v = torch.empty_like(v)
    inputs, results = (
        [None if x is None else x.data_ptr() for x in tensors]
        for tensors in ((v, w, upstream), (to_v, to_a, to_b))
    )
    arguments = *inputs, v.numel(), a, b, *results
    work = _WORK * v.numel()
    native.library().kwm_compand_gradient(*arguments, *threads(work))
    return to_v


@torch.library.register_fake("keras_weightmods::compand")
def _fake_compand(v, a, b):
    return torch.empty_like(v)


@torch.library.register_fake("keras_weightmods::compand_slope")
def _fake_slope(v, upstream, a, b):
    return torch.empty_like(v)


@torch.library.register_fake("keras_weightmods::compand_gradient")
def _fake_gradient(v, w, upstream, a, b):
    return torch.empty_like(v), v.new_empty(()), v.new_empty(())
