"""The update of `AdamS`, as pure functions of tensors."""

import math
from typing import Any

from keras import ops

from keras_weightmods.ops.matrix import along
from keras_weightmods.ops.nm import nm_mask, pack_bits, unpack_bits

# With l1="auto" the gradient's size is measured over this many first steps.
_AUTO_L1_STEPS = 10


class AdamSUpdate:
    """What `AdamS` computes in a step; the optimizer has the settings."""

    n: int
    m: int
    total_steps: Any
    l1: Any
    l1_scale: float
    ramp: float
    decay: str
    criterion: str
    mask_every: int
    beta_1: float
    beta_2: float
    epsilon: float

    def _stepped(
        self,
        state: Any,
        gradient: Any,
        rate: Any,
        step: Any,
        axes: Any,
        decay_rate: Any,
    ) -> Any:
        """Take one step of one variable, as a pure function of tensors.

        Args:
            state: Dict with the weight and what `_state_of` has for it.
            gradient: Tensor.
            rate: Scalar tensor, the learning rate.
            step: Scalar float32 tensor, the steps taken.
            axes: Tuple of ints, the contraction axes; None if the variable is
                not sparsified.
            decay_rate: Float or None, for weight decay.

        Returns:
            Dict with the new values.
        """
        w, momentum, velocity = (
            state[name] for name in ("weight", "momentum", "velocity")
        )
        g = ops.cast(gradient, w.dtype)
        new = {}

        mu = momentum + (g - momentum) * (1 - self.beta_1)
        mixed = mu
        if axes is not None:
            # Masks are ranked by the weight before its decay, which is in
            # memory; only so does XLA fuse the decay into the update.
            new["mask"] = self._new_bits(state, step, axes)
            mask = unpack_bits(new["mask"], tuple(w.shape))
            ramp = ops.cast(self._ramp_at(step), w.dtype)
            faded = (1 - ramp) * mu
            if self.decay == "published":
                pull = self.l1
                if self._measures_gradients:
                    square = self._new_gradient_square(state, g, step)
                    new["gradient_square"] = square
                    pull = ops.cast(self.l1_scale * ops.sqrt(square), w.dtype)
                faded = faded + ramp * pull * ops.sign(w)
            mixed = ops.where(mask, mu, faded)
        correction_1, correction_2 = (
            ops.cast(_bias_correction(beta, step), w.dtype)
            for beta in (self.beta_1, self.beta_2)
        )
        # CAST, equation 8, where sparsified. Elsewhere the second moment of
        # Adam, and epsilon where Keras has it.
        epsilon, second = self.epsilon, mixed
        if axes is None:
            epsilon, second = self.epsilon / ops.sqrt(correction_2), g
        v = velocity + (ops.square(second) - velocity) * (1 - self.beta_2)
        if decay_rate is not None:
            w = w - w * (decay_rate * rate)
        w = w - rate * (mixed / correction_1) / (
            ops.sqrt(v / correction_2) + epsilon
        )
        if axes is not None and self.decay == "relative":
            shrunk = w * ops.cast(self._shrink_at(step), w.dtype)
            w = ops.where(mask, w, shrunk)
        return {**new, "weight": w, "momentum": mu, "velocity": v}

    def _new_bits(self, state: Any, step: Any, axes: Any) -> Any:
        w, bits = state["weight"], state["mask"]

        def refresh() -> Any:
            scores = w
            if self.criterion == "activation":
                importance = ops.cast(state["importance"], w.dtype)
                scores = w * along(importance, w.shape, axes)
            return pack_bits(nm_mask(scores, (self.n, self.m), axes))

        is_due = ops.equal(ops.mod(step, self.mask_every), 0)
        return ops.cond(is_due, refresh, lambda: bits)

    @property
    def _measures_gradients(self) -> Any:
        return self.decay == "published" and self.l1 == "auto"

    def _new_gradient_square(self, state: Any, g: Any, step: Any) -> Any:
        """Mean over the first steps of the mean square of the gradient."""
        old = state["gradient_square"]

        def measure() -> Any:
            square = ops.mean(ops.square(ops.cast(g, "float32")))
            return old + (square - old) / (step + 1)

        return ops.cond(step < _AUTO_L1_STEPS, measure, lambda: old)

    def _ramp_at(self, step: Any) -> Any:
        if not self.ramp:
            return ops.ones_like(step)
        return ops.minimum(step / (self.ramp * self.total_steps), 1.0)

    def _shrink_at(self, step: Any) -> Any:
        """(1 - a_next) / (1 - a); 0 once the ramp is done."""
        left = self.ramp * self.total_steps - step
        return ops.maximum(left - 1, 0.0) / ops.maximum(left, 1.0)


def _bias_correction(beta: Any, step: Any) -> Any:
    """1 - beta**(step + 1), exact in float32 also where beta is near 1."""
    return -ops.expm1((step + 1) * math.log(beta)) if beta else 1.0
