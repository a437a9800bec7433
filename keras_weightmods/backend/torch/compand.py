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


@torch.no_grad()
def compand_derivative(v, a, b, function):
    """As in `ops`, with the same conditions, and not differentiable."""
    slope = torch.empty_like(v)
    for u, piece in _pieces(v, slope):
        _DERIVATIVE[function](torch.div(u, b, out=piece), _one(v))
        piece.mul_(a / b)
    return slope


class _Compand(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v, a, b, function):
        w = torch.empty_like(v)
        for stored, piece in _pieces(v, w):
            _APPLY[function](torch.div(stored, b, out=piece)).mul_(a)
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
        derivative = _DERIVATIVE[ctx.function]
        to_v = torch.empty_like(v)
        to_a = to_b = None
        for stored, weight, up, piece in _pieces(v, w, upstream, to_v):
            derivative(torch.div(stored, b, out=piece), up)
            piece.mul_(a / b)
            if needs_a:
                dot = torch.dot(up.reshape(-1), weight.reshape(-1)) / a
                to_a = dot if to_a is None else to_a + dot
            if needs_b:
                dot = torch.dot(piece.reshape(-1), stored.reshape(-1)) / -b
                to_b = dot if to_b is None else to_b + dot
        return to_v, to_a, to_b, None


def _pieces(*tensors):
    """Yields views of the tensors, piece by piece where that is of use."""
    if (
        tensors[0].device.type != "cpu"
        or not all(t.is_contiguous() for t in tensors)
        or torch.compiler.is_compiling()
    ):
        yield tensors
        return
    yield from zip(*(t.detach().view(-1).split(_PIECE) for t in tensors))


def _one(v):
    return torch.ones((), dtype=v.dtype, device=v.device)


def _arctan(u):
    """The arc tangent, in place."""
    if (
        u.device.type != "cpu"
        or u.dtype != torch.float32
        or torch.compiler.is_compiling()
    ):
        return u.atan_()
    low, high = torch.aminmax(u)
    # Not so for NaN either.
    if not (low >= -_SMALL and high <= _SMALL):
        return u.atan_()
    terms = [torch.tensor(c) for c in _COEFFICIENTS]
    square = u * u
    series = torch.addcmul(terms[1], square, terms[0])
    for term in terms[2:]:
        torch.addcmul(term, series, square, out=series)
    return u.mul_(series)


# The derivatives at u, times `upstream`, in place of u.


def _arctan_slope(u, upstream):
    torch.addcmul(_one(u), u, u, out=u)
    torch.div(upstream, u, out=u)


def _arsinh_slope(u, upstream):
    torch.addcmul(_one(u), u, u, out=u).sqrt_()
    torch.div(upstream, u, out=u)


def _erf_slope(u, upstream):
    u.square_().neg_().exp_().mul_(2 / math.sqrt(math.pi)).mul_(upstream)


_APPLY = {"arctan": _arctan, "arsinh": torch.asinh_, "erf": torch.erf_}
_DERIVATIVE = {
    "arctan": _arctan_slope,
    "arsinh": _arsinh_slope,
    "erf": _erf_slope,
}
