"""Steps of optimizers and of distillation on torch, in the memory they change.

Run eagerly and op by op, an update would read and write whole kernels through
memory a dozen times, and each new tensor costs a copy. The numbers are the
same.
"""

import math

import torch
from keras import ops

# Entries updated at once on a CPU; an accelerator takes a variable whole.
_PIECE = 2**17


@torch.no_grad()
def adam_s(optimizer, rules, gradients, variables, learning_rate):
    """Take one step of the variables of a built `AdamS`, in place.

    Args:
        optimizer: `AdamS`.
        rules: The module `adam_s_update`.
        gradients: List of tensors.
        variables: List of `keras.Variable`.
        learning_rate: Scalar.
    """
    step = int(optimizer.iterations)
    device = optimizer.variables[0].value.device
    steps = ops.cast(step, "float32")
    shared = {
        "step": torch.tensor(float(step), device=device),
        "count": torch.tensor(step + 1.0, device=device),
        "learning_rate": float(ops.convert_to_numpy(learning_rate)),
        "ramp": float(rules.ramp_at(optimizer, steps)),
        "shrink": float(rules.shrink_at(optimizer, steps)),
        "correction_1": _bias_correction(optimizer.beta_1, step),
        "correction_2": _bias_correction(optimizer.beta_2, step),
    }
    for gradient, variable in zip(gradients, variables):
        decay = optimizer._decay_rate_of(variable) or 0.0
        scalars = {**shared, "weight_decay": decay}
        _update_variable(optimizer, rules, gradient, variable, scalars)


def _update_variable(optimizer, rules, gradient, variable, scalars):
    index = optimizer._get_variable_index(variable)
    axes = optimizer._axes[index]
    state = {"weight": variable, **optimizer._states[index]}
    state = {name: v.value.data for name, v in state.items()}
    gradient = gradient.to(state["weight"].dtype)

    # A layout that is not contiguous is worked on as a copy, then written.
    updated = [state[name] for name in ("weight", "momentum", "velocity")]
    flat = [t.contiguous().view(-1) for t in (gradient, *updated)]
    if axes is None:
        g, w, momentum, v = flat
        _adam(w, g, momentum, v, optimizer, scalars, sparsified=False)
    else:
        step = scalars["step"]
        bits = rules.new_bits(optimizer, state, step, axes)
        state["mask"].copy_(bits)
        if optimizer.decay == "published":
            pull = optimizer.l1
            if optimizer.measures_gradients:
                square = state["gradient_square"]
                new = rules.new_gradient_square(state, gradient, step)
                pull = optimizer.l1_scale * float(square.copy_(new)) ** 0.5
            scalars["pull"] = scalars["ramp"] * pull
        for part, mask in _pieces(flat[0], bits):
            _update_piece([t[part] for t in flat], mask, optimizer, scalars)
    for original, new in zip(updated, flat[1:]):
        if not original.is_contiguous():
            original.copy_(new.view(original.shape))


def _bias_correction(beta, step):
    """1 - beta**(step + 1), exact also where beta is near 1."""
    return -math.expm1((step + 1) * math.log(beta)) if beta else 1.0


def _pieces(flat, bits):
    """Yield slices of a flat kernel, with their masks, nonzero where kept.

    `pack_bits` keeps entry `b * planes + i` in bit b of byte i.
    """
    size, planes = flat.numel(), bits.numel()
    piece = _PIECE if flat.device.type == "cpu" else size
    for bit in range(8):
        first, last = bit * planes, min((bit + 1) * planes, size)
        for start in range(first, last, piece):
            stop = min(start + piece, last)
            mask = bits[start - first : stop - first].bitwise_and(1 << bit)
            yield slice(start, stop), mask


def _update_piece(pieces, mask, optimizer, scalars):
    """Take one step of a flat piece of a sparsified kernel."""
    g, w, momentum, v = pieces
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
    """Update `w` and its moments in one pass.

    Where sparsified, `g` and `momentum` are both
    the mixed first moment: with beta1 = 0 it keeps its value, `lr` carries
    its correction, and the weight decay undoes that.
    """
    correction = scalars["correction_1"] if sparsified else 1.0
    # Where not sparsified, epsilon is added where Keras' Adam does.
    epsilon_scale = 1.0 if sparsified else scalars["correction_2"] ** -0.5
    _fused_adamw(
        (w, g, momentum, v),
        scalars["count"],
        lr=scalars["learning_rate"] / correction,
        weight_decay=scalars["weight_decay"] * correction,
        beta1=0.0 if sparsified else optimizer.beta_1,
        beta2=optimizer.beta_2,
        eps=optimizer.epsilon * epsilon_scale,
    )


def _fused_adamw(tensors, count, **options):
    """Update a weight, by its gradient, and its two moments.

    By the kernel of `torch.optim.AdamW(fused=True)`, whose public form would
    count the steps by itself.
    """
    weight, gradient, momentum, velocity = ([x] for x in tensors)
    torch._fused_adamw_(
        *(weight, gradient, momentum, velocity, [], [count]),
        amsgrad=False,
        maximize=False,
        **options,
    )


@torch.no_grad()
def sparse_adamw(optimizer, variable, gradient, indices, state, weight_decay):
    """Update one variable of a `SparseAdamW`, and its two moments.

    Args:
        optimizer: A built `SparseAdamW`.
        variable: `keras.Variable`.
        gradient: Tensor, compact where there are indices.
        indices: `keras.Variable` with the entries to update; None for all.
        state: Pair of `keras.Variable`, the moments.
        weight_decay: Float.
    """
    weight = variable.value.data
    flat = weight.contiguous().view(-1)
    places = None if indices is None else indices.value.data.long()
    entries = flat if places is None else flat.index_select(0, places)
    count = int(optimizer.iterations) + 1.0
    gradient = gradient.to(entries.dtype).reshape(-1)
    moments = (moment.value.data.view(-1) for moment in state)
    _fused_adamw(
        (entries, gradient, *moments),
        torch.tensor(count, device=weight.device),
        lr=float(optimizer.learning_rate),
        weight_decay=weight_decay,
        beta1=optimizer.beta_1,
        beta2=optimizer.beta_2,
        eps=optimizer.epsilon,
    )
    if places is not None:
        flat.index_copy_(0, places, entries)
    if flat.data_ptr() != weight.data_ptr():
        weight.copy_(flat.view(weight.shape))


def distillation_gradient(log_p, soft, q, labels, by_label, by_teacher):
    """Return the gradient; as `_gradient` in `ops.distillation`."""
    is_same = soft is log_p
    slope = log_p.exp_().mul_(by_label + by_teacher if is_same else by_label)
    if is_same:
        slope.addcmul_(q, by_teacher, value=-1)
    elif q is not None:
        slope.add_(soft.exp_().sub_(q).mul_(by_teacher))
    return slope.scatter_add_(1, labels.long(), -by_label)
