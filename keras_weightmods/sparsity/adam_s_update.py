"""The update of `AdamS`, as pure functions of tensors.

`optimizer` is an `AdamS`. Only its settings are read.
"""

import math

from keras import ops

from keras_weightmods.ops import nm
from keras_weightmods.utils import dtypes
from keras_weightmods.utils.matrix import along

# With l1="auto" the gradient's size is measured over this many first steps.
_AUTO_L1_STEPS = 10


def updated(optimizer, state, gradient, rate, step, axes, decay_rate):
    """Take one step of one variable.

    Args:
        state: Dict of tensors: the weight and what the optimizer has for it.
        gradient: Tensor.
        rate: Scalar float32 tensor, the learning rate.
        step: Scalar float32 tensor, the steps taken.
        axes: Tuple of ints, the contraction axes; None if the variable is
            not sparsified.
        decay_rate: Float or None, for weight decay.

    Returns:
        Dict with the new values.
    """
    stored, velocity = state["weight"], state["velocity"]
    w = stored
    if "master" in state:
        w = dtypes.restored(stored, state["master"])
        state = {**state, "weight": w}
    g, rate = ops.cast(gradient, w.dtype), ops.cast(rate, w.dtype)
    new = {}

    mu = state["momentum"]
    mixed = mu = mu + (g - mu) * (1 - optimizer.beta_1)
    if axes is not None:
        # Masks rank the weights before the decay, which are in memory.
        # Otherwise XLA does not fuse the decay into the update.
        new["mask"] = new_bits(optimizer, state, step, axes)
        mask = nm.unpack_bits(new["mask"], tuple(w.shape))
        ramp = ops.cast(ramp_at(optimizer, step), w.dtype)
        faded = (1 - ramp) * mu
        if optimizer.decay == "published":
            pull = optimizer.l1
            if optimizer.measures_gradients:
                square = new_gradient_square(state, g, step)
                new["gradient_square"] = square
                pull = optimizer.l1_scale * ops.sqrt(square)
                pull = ops.cast(pull, w.dtype)
            faded = faded + ramp * pull * ops.sign(w)
        mixed = ops.where(mask, mu, faded)
    correction_1, correction_2 = (
        ops.cast(_bias_correction(beta, step), w.dtype)
        for beta in (optimizer.beta_1, optimizer.beta_2)
    )
    # Sparsified weights follow equation 8 of CAST. Others have Adam's second
    # moment, with epsilon where Keras has it.
    epsilon, second = optimizer.epsilon, mixed
    if axes is None:
        epsilon, second = epsilon / ops.sqrt(correction_2), g
    v = velocity + (ops.square(second) - velocity) * (1 - optimizer.beta_2)
    if decay_rate is not None:
        w = w - w * (decay_rate * rate)
    root = ops.sqrt(v / correction_2)
    w = w - rate * (mixed / correction_1) / (root + epsilon)
    if axes is not None and optimizer.decay == "relative":
        shrunk = w * ops.cast(shrink_at(optimizer, step), w.dtype)
        w = ops.where(mask, w, shrunk)
    if "master" in state:
        new["master"], w = w, ops.cast(w, stored.dtype)
    return {**new, "weight": w, "momentum": mu, "velocity": v}


def new_bits(optimizer, state, step, axes):
    """Return the packed mask of this step: a new one every `mask_every`."""
    w, bits = state["weight"], state["mask"]

    def refresh():
        scores = w
        if optimizer.criterion == "wanda":
            importance = ops.cast(state["importance"], w.dtype)
            scores = w * along(importance, w.shape, axes)
        return nm.pack_bits(nm.nm_mask(scores, optimizer.pattern, axes))

    is_due = ops.equal(ops.mod(step, optimizer.mask_every), 0)
    return ops.cond(is_due, refresh, lambda: bits)


def new_gradient_square(state, g, step):
    """Return the mean of the gradient's mean square over the first steps."""
    old = state["gradient_square"]

    def measure():
        square = ops.mean(ops.square(ops.cast(g, "float32")))
        return old + (square - old) / (step + 1)

    return ops.cond(step < _AUTO_L1_STEPS, measure, lambda: old)


def ramp_at(optimizer, step):
    """Return a, from 0 to 1."""
    if not optimizer.ramp:
        return ops.ones_like(step)
    return ops.minimum(step / (optimizer.ramp * optimizer.total_steps), 1.0)


def shrink_at(optimizer, step):
    """Return (1 - a_next) / (1 - a); 0 once the ramp is done."""
    left = optimizer.ramp * optimizer.total_steps - step
    return ops.maximum(left - 1, 0.0) / ops.maximum(left, 1.0)


def _bias_correction(beta, step):
    """Return 1 - beta**(step + 1), exact in float32 even if beta is near 1."""
    return -ops.expm1((step + 1) * math.log(beta)) if beta else 1.0
