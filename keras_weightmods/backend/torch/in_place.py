"""In-place steps of optimizers and of distillation on torch.

An eager update, op by op, would read and write whole kernels a dozen times, and
each new tensor costs a copy. The results are the same.
"""

import math

import torch
from keras import ops

from keras_weightmods import native
from keras_weightmods.backend.torch.operators import threads
from keras_weightmods.utils.dtypes import restored

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
    before, count = torch.tensor([step, step + 1.0], device=device).unbind()
    rate = float(ops.convert_to_numpy(learning_rate))
    steps = ops.cast(step, "float32")
    ramp = float(rules.ramp_at(optimizer, steps))
    shrink = float(rules.shrink_at(optimizer, steps))
    # 1 - beta**(step + 1), exact even if beta is near 1.
    first, second = (
        -math.expm1((step + 1) * math.log(beta)) if beta else 1.0
        for beta in (optimizer.beta_1, optimizer.beta_2)
    )
    is_published = optimizer.decay == "published"
    shared = {"count": count, "beta2": optimizer.beta_2}
    for gradient, variable in zip(gradients, variables):
        index = optimizer._get_variable_index(variable)
        axes = optimizer._axes[index]
        decay = optimizer._decay_rate_of(variable) or 0.0
        state = {"weight": variable, **optimizer._states[index]}
        state = {name: v.value.data for name, v in state.items()}
        stored, master = state["weight"], state.get("master")
        if master is not None:
            state["weight"] = master.copy_(restored(stored, master))
        gradient = gradient.to(state["weight"].dtype)
        # A weight that is not contiguous is updated in a copy, which is then
        # written back.
        updated = [state[name] for name in ("weight", "momentum", "velocity")]
        flat = [t.contiguous().view(-1) for t in (gradient, *updated)]
        if axes is None:
            g, w, momentum, v = flat
            # Epsilon is added where Keras' Adam does.
            epsilon = optimizer.epsilon * second**-0.5
            options = {"lr": rate, "weight_decay": decay, "eps": epsilon}
            options["beta1"] = optimizer.beta_1
            _fused_adamw((w, g, momentum, v), **shared, **options)
        else:
            bits = rules.new_bits(optimizer, state, before, axes)
            state["mask"].copy_(bits)
            pull = optimizer.l1
            if is_published and optimizer.measures_gradients:
                square = state["gradient_square"]
                new = rules.new_gradient_square(state, gradient, before)
                pull = optimizer.l1_scale * float(square.copy_(new)) ** 0.5
            for part, mask in _pieces(flat[0], bits):
                g, w, momentum, v = (t[part] for t in flat)
                momentum.lerp_(g, 1 - optimizer.beta_1)
                # On a CPU `torch.where` takes about 20 times as long as a
                # product, so the mask is applied as a factor. It is exactly 1
                # for kept weights.
                mask = mask.to(w.dtype)
                mixed = mask.clamp(1 - ramp, 1).mul_(momentum)
                if is_published:
                    dropped = (1 - mask).clamp_(min=0)
                    mixed.addcmul_(torch.sign(w), dropped, value=ramp * pull)
                # The first moment is passed as the gradient, with beta1 = 0.
                # Its bias correction is in the rate, and the weight decay
                # undoes it.
                options = {"lr": rate / first, "weight_decay": decay * first}
                options |= {"eps": optimizer.epsilon, "beta1": 0.0}
                _fused_adamw((w, mixed, mixed, v), **shared, **options)
                if optimizer.decay == "relative":
                    w.mul_(mask.clamp_(shrink, 1))
        for original, new in zip(updated, flat[1:]):
            if not original.is_contiguous():
                original.copy_(new.view(original.shape))
        if master is not None:
            stored.copy_(master)


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


def _fused_adamw(tensors, count, **options):
    """Update a weight, by its gradient, and its two moments.

    Uses the kernel of `torch.optim.AdamW(fused=True)`. The public form would
    count the steps itself.
    """
    weight, gradient, momentum, velocity = ([x] for x in tensors)
    torch._fused_adamw_(
        *(weight, gradient, momentum, velocity, [], [count]),
        amsgrad=False,
        maximize=False,
        **options,
    )


@torch.no_grad()
def adamw(
    optimizer,
    variable,
    gradient,
    state,
    learning_rate,
    epsilon,
    indices=None,
    weight_decay=0.0,
    kept=None,
):
    """Update one variable, and its two moments.

    Args:
        optimizer: A built optimizer, with `beta_1` and `beta_2`.
        variable: `keras.Variable`.
        gradient: Tensor, compact where there are indices.
        state: List of `keras.Variable`, the moments, and the master of a
            weight in 16 bits.
        learning_rate: Scalar.
        epsilon: Float, added after the correction of the moments.
        indices: `keras.Variable` with the entries to update, or None for all.
        weight_decay: Float.
        kept: Boolean tensor of the shape of the gradient, which is set to zero
            elsewhere, or None.
    """
    if kept is not None:
        gradient.mul_(kept)
    weight = variable.value.data
    flat = weight.contiguous().view(-1)
    places = None if indices is None else indices.value.data.long()
    entries = flat if places is None else flat.index_select(0, places)
    momentum, velocity, *master = (own.value.data.view(-1) for own in state)
    # A weight in 16 bits gets the update of its master.
    wide = entries
    for own in master:
        # Most of the time nothing else has changed the weight. To compare them
        # takes a fraction of the time.
        if not torch.equal(own.to(entries.dtype), entries):
            own.copy_(restored(entries, own))
        wide = own
    count = int(optimizer.iterations) + 1.0
    gradient = gradient.to(wide.dtype).reshape(-1)
    _fused_adamw(
        (wide, gradient, momentum, velocity),
        torch.tensor(count, device=weight.device),
        lr=float(learning_rate),
        weight_decay=weight_decay,
        beta1=optimizer.beta_1,
        beta2=optimizer.beta_2,
        eps=epsilon,
    )
    if places is not None:
        flat.index_copy_(0, places, wide.to(flat.dtype))
    elif master:
        flat.copy_(wide)
    if flat.data_ptr() != weight.data_ptr():
        weight.copy_(flat.view(weight.shape))


def distillation_gradient(log_p, soft, q, labels, by_label, by_teacher):
    """Return the gradient, like `_gradient` in `ops.distillation`."""
    is_same = soft is log_p
    slope = log_p.exp_().mul_(by_label + by_teacher if is_same else by_label)
    if is_same:
        slope.addcmul_(q, by_teacher, value=-1)
    elif q is not None:
        slope.add_(soft.exp_().sub_(q).mul_(by_teacher))
    return slope.scatter_add_(1, labels.long(), -by_label)


class _Multiples(torch.autograd.Function):
    """The compiled form of `multiples` in `quantization.grid_weights`."""

    @staticmethod
    def forward(ctx, groups, scales, *limits):
        groups, scales = groups.contiguous(), scales.contiguous()
        # In 16 bits they take half of the memory until the backward pass.
        ctx.save_for_backward(groups, scales)
        ctx.limits = limits
        groups = groups.float()
        values = torch.empty_like(groups)
        stacks, count, *shape = groups.shape
        native.library().kwm_multiples(
            *(groups.data_ptr(), scales.data_ptr(), stacks * count),
            *(*shape, *limits, values.data_ptr(), *threads()),
        )
        return values

    @staticmethod
    def backward(ctx, slope):
        slope = slope.contiguous()
        saved, scales = ctx.saved_tensors
        groups = saved.float()
        gradients = torch.empty_like(groups), torch.empty_like(scales)
        stacks, count, *shape = groups.shape
        native.library().kwm_multiples_gradient(
            *(x.data_ptr() for x in (slope, groups, scales)),
            *(stacks * count, *shape, *ctx.limits),
            *(x.data_ptr() for x in gradients),
            *threads(),
        )
        by_group, by_scale = gradients
        return by_group.to(saved.dtype), by_scale, None, None


def multiples(groups, scales, limits):
    """Return multiples of scales; None where the library cannot.

    Args:
        groups, scales, limits: As in `quantization.grid_weights`.
    """
    if native.library() is None or groups.device.type != "cpu":
        return None
    return _Multiples.apply(groups, scales, *map(float, limits))
