"""The AdamS update on torch, in place and in pieces that stay in cache.

Run eagerly and op by op, `AdamS.update_step` would read and write whole
kernels through memory a dozen times. The numbers are the same.
"""

import math
import typing

import torch
from keras import ops

# Entries updated at once on a CPU; an accelerator takes a variable whole.
_PIECE = 2**17


@torch.no_grad()
def update_variable(optimizer, gradient, variable, scalars):
    """Updates one variable and its state, in place.

    Args:
        optimizer: A built `AdamS`.
        gradient: Tensor of the variable's shape.
        variable: `keras.Variable`.
        scalars: The dict from `step_scalars`.
    """
    index = optimizer._get_variable_index(variable)
    spec = optimizer._specs[index]
    state = {"weight": variable, **optimizer._state_of(index)}
    state = {name: v.value.data for name, v in state.items()}
    w = state["weight"]
    gradient = gradient.to(w.dtype)
    bits, pull = None, 0.0
    if spec is not None:
        bits = optimizer._new_bits(state, scalars["step"], spec.axes)
        state["mask"].copy_(bits)
    if spec is not None and optimizer.decay == "published":
        pull = scalars["ramp"] * _pull(optimizer, state, gradient, scalars)
    scalars = {
        **scalars,
        "pull": pull,
        "weight_decay": optimizer._decay_rate_of(variable) or 0.0,
    }

    # A layout that is not contiguous is worked on as a copy, then written.
    updated = (w, state["momentum"], state["velocity"])
    flat = [t.contiguous().view(-1) for t in (gradient, *updated)]
    for part, plane in _pieces(flat[0].numel(), bits, flat[0].device):
        pieces = [t[part] for t in flat]
        mask = None
        if bits is not None:
            mask = bits[plane.part].bitwise_and(plane.bit)
        _update_piece(pieces, optimizer, scalars, mask)
    for original, new in zip(updated, flat[1:]):
        if not original.is_contiguous():
            original.copy_(new.view(original.shape))


def step_scalars(optimizer, learning_rate):
    """What all variables share in one step: two tensors, and floats."""
    step = int(optimizer.iterations)
    device = optimizer.variables[0].value.device
    return {
        "step": torch.tensor(float(step), device=device),
        "count": torch.tensor(step + 1.0, device=device),
        "learning_rate": float(ops.convert_to_numpy(learning_rate)),
        "ramp": float(optimizer._ramp_at(ops.cast(step, "float32"))),
        "shrink": float(optimizer._shrink_at(ops.cast(step, "float32"))),
        "correction_1": _bias_correction(optimizer.beta_1, step),
        "correction_2": _bias_correction(optimizer.beta_2, step),
    }


def _bias_correction(beta, step):
    """1 - beta**(step + 1), exact also where beta is near 1."""
    return -math.expm1((step + 1) * math.log(beta)) if beta else 1.0


def _pull(optimizer, state, gradient, scalars):
    if not optimizer._measures_gradients:
        return optimizer.l1
    square = optimizer._new_gradient_square(state, gradient, scalars["step"])
    state["gradient_square"].copy_(square)
    return optimizer.l1_scale * float(square) ** 0.5


class _Plane(typing.NamedTuple):
    """Where the mask of a piece is: bit `bit` of the bytes `part`."""

    part: slice
    bit: int


def _pieces(size, bits, device):
    """Yields slices of the flat kernel, with the bits that hold its mask.

    `pack_bits` keeps entry `b * planes + i` in bit b of byte i.
    """
    piece = _PIECE if device.type == "cpu" else size
    if bits is None:
        for start in range(0, size, piece):
            yield slice(start, min(start + piece, size)), None
        return
    plane_size = bits.numel()
    for bit in range(8):
        first, last = bit * plane_size, min((bit + 1) * plane_size, size)
        for start in range(first, last, piece):
            stop = min(start + piece, last)
            plane = _Plane(slice(start - first, stop - first), 1 << bit)
            yield slice(start, stop), plane


def _update_piece(pieces, optimizer, scalars, mask):
    """One step of a flat piece; `mask` is nonzero where kept, or None."""
    g, w, momentum, v = pieces
    if mask is None:
        _adam(w, g, momentum, v, optimizer, scalars, sparsified=False)
        return
    momentum.lerp_(g, 1 - optimizer.beta_1)
    # On a CPU `torch.where` takes some 20 times as long as a product, so the
    # mask acts through a factor, which is exactly 1 where kept.
    mask = mask.to(w.dtype)
    mixed = mask.clamp(1 - scalars["ramp"], 1).mul_(momentum)
    if optimizer.decay == "published":
        dropped = (1 - mask).clamp_(min=0)
        mixed.addcmul_(torch.sign(w), dropped, value=scalars["pull"])
    _adam(w, mixed, mixed, v, optimizer, scalars, sparsified=True)
    if optimizer.decay == "relative":
        w.mul_(mask.clamp_(scalars["shrink"], 1))


def _adam(w, g, momentum, v, optimizer, scalars, sparsified):
    """Updates `w` and its moments in one pass.

    By the kernel of `torch.optim.AdamW(fused=True)`, whose public form would
    count the steps by itself. Where sparsified, `g` and `momentum` are both
    the mixed first moment: with beta1 = 0 it keeps its value, `lr` carries
    its correction, and the weight decay undoes that.
    """
    correction = scalars["correction_1"] if sparsified else 1.0
    # Where not sparsified, epsilon is added where Keras' Adam does.
    epsilon_scale = 1.0 if sparsified else scalars["correction_2"] ** -0.5
    torch._fused_adamw_(
        [w],
        [g],
        [momentum],
        [v],
        [],
        [scalars["count"]],
        lr=scalars["learning_rate"] / correction,
        weight_decay=scalars["weight_decay"] * correction,
        beta1=0.0 if sparsified else optimizer.beta_1,
        beta2=optimizer.beta_2,
        eps=optimizer.epsilon * epsilon_scale,
        amsgrad=False,
        maximize=False,
    )
