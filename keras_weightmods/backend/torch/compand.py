"""`compand` on torch: both directions in few passes over the kernel.

On a CPU the compiled kernels take one pass for each, where they are there.
"""

import math

import torch
from torch.autograd.function import once_differentiable

from keras_weightmods import native
from keras_weightmods.backend.torch.threads import threads

# Multiply-adds that the compiled kernels take the time of, for an entry.
_WORK = 16

# Entries worked on at once on a CPU, to stay in its cache.
_PIECE = 2**16

# arctan(u) / u as polynomials in u**2, exact to 1.2e-8 for |u| up to the key,
# highest power first. Most weights lie there, and torch.arctan takes as long
# as 25 products.
_SERIES = {
    0.1: (0.197876418, -0.333325394, 0.999999996),
    0.25: (-0.129906206, 0.199505935, -0.33332723, 0.999999988),
    0.5: (
        -0.050803819,
        0.101243911,
        -0.141662025,
        0.199932798,
        -0.333331933,
        0.999999995,
    ),
}


def compand(v, a, b, function):
    """As in `ops`, for `v` of 32 bits at least and scalars `a` and `b`."""
    return _Compand.apply(v, a, b, function)


@torch.no_grad()
def compand_derivative(v, a, b, function):
    """As in `ops`, with the same conditions, and not differentiable."""
    slope = torch.empty_like(v)
    rule = _rule_of_pieces(function, v, a, b)
    for stored, piece in _pieces(v, slope):
        rule.slope(stored, _one(v), piece)
    return slope


class _Compand(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v, a, b, function):
        ctx.rule = _rule(function, v, a, b)
        w = ctx.rule.forward(v)
        ctx.save_for_backward(v, w)
        return w

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        v, w = ctx.saved_tensors
        _, *needed, _ = ctx.needs_input_grad
        return *ctx.rule.backward(v, w, upstream, needed), None


def _pieces(*tensors):
    """Views of the tensors, piece by piece where that is of use."""
    if (
        tensors[0].numel() <= _PIECE
        or not _on_cpu(tensors[0])
        or not all(t.is_contiguous() for t in tensors)
    ):
        return [tensors]
    return zip(*(t.view(-1).split(_PIECE) for t in tensors))


def _on_cpu(v):
    return v.device.type == "cpu" and not torch.compiler.is_compiling()


def _one(v):
    return torch.ones((), dtype=v.dtype, device=v.device)


def _rule(function, v, a, b):
    if (
        function == "arctan"
        and v.dtype == torch.float32
        and _on_cpu(v)
        # A trace is to hold torch's own operators.
        and not torch.jit.is_tracing()
        and native.has_vectors()
    ):
        return _NativeArctan(a, b)
    return _rule_of_pieces(function, v, a, b)


def _rule_of_pieces(function, v, a, b):
    if (
        function == "arctan"
        and v.dtype == torch.float32
        and _on_cpu(v)
        and v.numel()
    ):
        a, b = float(a), float(b)
        # So that no power of them overflows below.
        if all(1e-3 <= p <= 1e3 for p in (a, b)):
            return _SmallArctan(a, b)
    return _Rule(a, b, function)


class _Rule:
    """A function of `compand`: its values, its derivative times `upstream`."""

    def __init__(self, a, b, function):
        self.a, self.b = a, b
        self.function = function

    def forward(self, v):
        w = torch.empty_like(v)
        for stored, piece in _pieces(v, w):
            self.apply(stored, piece)
        return w

    def backward(self, v, w, upstream, needed):
        """Return the gradients of v, and of a and b where they are needed."""
        needs_a, needs_b = needed
        to_v = torch.empty_like(v)
        to_a, to_b = v.new_zeros(()), v.new_zeros(())
        for stored, weight, up, piece in _pieces(v, w, upstream, to_v):
            self.slope(stored, up, piece)
            if needs_a:
                to_a += torch.dot(up.reshape(-1), weight.reshape(-1))
            if needs_b:
                to_b += torch.dot(piece.reshape(-1), stored.reshape(-1))
        return (
            to_v,
            to_a / self.a if needs_a else None,
            to_b / -self.b if needs_b else None,
        )

    def apply(self, v, out):
        _APPLY[self.function](torch.div(v, self.b, out=out)).mul_(self.a)

    def slope(self, v, upstream, out):
        u = torch.div(v, self.b, out=out)
        _DERIVATIVE[self.function](u, upstream)
        out.mul_(self.a / self.b)


class _NativeArctan:
    """The arc tangent by the compiled kernels."""

    def __init__(self, a, b):
        self.pair = float(a), float(b)

    def forward(self, v):
        return torch.ops.keras_weightmods.compand(v, *self.pair)

    def backward(self, v, w, upstream, needed):
        ops = torch.ops.keras_weightmods
        if not any(needed):
            return ops.compand_slope(v, upstream, *self.pair), None, None
        return ops.compand_gradient(v, w, upstream, *self.pair)


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
        v.data_ptr(),
        v.numel(),
        a,
        b,
        w.data_ptr(),
        *threads(_WORK * v.numel()),
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
    native.library().kwm_compand_gradient(
        v.data_ptr(),
        None if w is None else w.data_ptr(),
        upstream.data_ptr(),
        v.numel(),
        a,
        b,
        to_v.data_ptr(),
        None if to_a is None else to_a.data_ptr(),
        None if to_b is None else to_b.data_ptr(),
        *threads(_WORK * v.numel()),
    )
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


class _SmallArctan(_Rule):
    """The arc tangent in fewer passes: `a` and `b` are in the constants."""

    def __init__(self, a, b):
        super().__init__(a, b, "arctan")
        self.ratio = torch.tensor(b / a)
        self.series = {}

    def apply(self, v, out):
        series = self._series_for(*(x.item() for x in torch.aminmax(v)))
        if series is None:
            super().apply(v, out)
            return
        square = v * v
        # A product with two scalars is a slow path of addcmul.
        torch.add(series[1], square, alpha=series[0], out=out)
        for term in series[2:]:
            torch.addcmul(term, out, square, out=out)
        out.mul_(v)

    def slope(self, v, upstream, out):
        # a / b / (1 + (v / b)**2), with one product and one division.
        torch.addcmul(self.ratio, v, v, value=1 / (self.a * self.b), out=out)
        torch.div(upstream, out, out=out)

    def _series_for(self, low, high):
        """The shortest series for the range; None if there is none, or NaN."""
        limit = next(
            (x for x in _SERIES if low >= -x * self.b and high <= x * self.b),
            None,
        )
        if limit is None:
            return None
        if limit not in self.series:
            coefficients = _SERIES[limit]
            powers = range(2 * len(coefficients) - 1, 0, -2)
            highest, *rest = (
                self.a * c / self.b**p for c, p in zip(coefficients, powers)
            )
            self.series[limit] = highest, *torch.tensor(rest).unbind()
        return self.series[limit]


# The derivatives at u, times `upstream`, in place of u.


def _arctan_slope(u, upstream):
    torch.addcmul(_one(u), u, u, out=u)
    torch.div(upstream, u, out=u)


def _arsinh_slope(u, upstream):
    torch.addcmul(_one(u), u, u, out=u).sqrt_()
    torch.div(upstream, u, out=u)


def _erf_slope(u, upstream):
    u.square_().neg_().exp_().mul_(2 / math.sqrt(math.pi)).mul_(upstream)


_APPLY = {"arctan": torch.atan_, "arsinh": torch.asinh_, "erf": torch.erf_}
_DERIVATIVE = {
    "arctan": _arctan_slope,
    "arsinh": _arsinh_slope,
    "erf": _erf_slope,
}
