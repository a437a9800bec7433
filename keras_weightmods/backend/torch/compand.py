"""`compand` on torch: both directions in few passes over the kernel."""

import math

import torch
from torch.autograd.function import once_differentiable

# Entries worked on at once on a CPU, to stay in its cache.
_PIECE = 2**16

# arctan(u) / u as a polynomial in u**2 for |u| <= 0.5, exact to 5e-9, highest
# power first. Most weights lie there, and torch.arctan takes as long as 25
# products.
_SMALL = 0.5
_COEFFICIENTS = (
    -0.050803819,
    0.101243911,
    -0.141662025,
    0.199932798,
    -0.333331933,
    0.999999995,
)


def compand(v, a, b, function):
    """As in `ops`, for `v` of 32 bits at least and scalars `a` and `b`."""
    return _Compand.apply(v, a, b, function)


class _Compand(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v, a, b, function):
        w = _APPLY[function](torch.div(v, b)).mul_(a)
        ctx.function = function
        ctx.scalars = a, b
        ctx.save_for_backward(v, w)
        return w

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        v, w = ctx.saved_tensors
        a, b = ctx.scalars
        _, needs_a, needs_b, _ = ctx.needs_input_grad
        to_v = _DERIVATIVE[ctx.function](v, b).mul_(upstream).mul_(a / b)
        to_a = to_b = None
        if needs_a:
            to_a = _dot(upstream, w) / a
        if needs_b:
            to_b = -_dot(to_v, v) / b
        return to_v, to_a, to_b, None


def _arctan(u):
    """The arc tangent, in place."""
    if (
        u.device.type != "cpu"
        or u.dtype != torch.float32
        or not u.is_contiguous()
        or torch.compiler.is_compiling()
    ):
        return u.atan_()
    terms = [torch.tensor(c) for c in _COEFFICIENTS]
    for piece in u.view(-1).split(_PIECE):
        low, high = torch.aminmax(piece)
        # Not so for NaN either.
        if low >= -_SMALL and high <= _SMALL:
            square = piece * piece
            series = torch.addcmul(terms[1], square, terms[0])
            for term in terms[2:]:
                torch.addcmul(term, series, square, out=series)
            piece.mul_(series)
        else:
            piece.atan_()
    return u


def _dot(x, y):
    return torch.dot(x.reshape(-1), y.reshape(-1))


def _of_arctan(v, b):
    return torch.div(v, b).square_().add_(1).reciprocal_()


def _of_arsinh(v, b):
    return torch.div(v, b).square_().add_(1).rsqrt_()


def _of_erf(v, b):
    slope = torch.div(v, b).square_().neg_().exp_()
    return slope.mul_(2 / math.sqrt(math.pi))


_APPLY = {"arctan": _arctan, "arsinh": torch.asinh_, "erf": torch.erf_}
_DERIVATIVE = {"arctan": _of_arctan, "arsinh": _of_arsinh, "erf": _of_erf}
