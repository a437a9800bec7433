"""CompanderOptimizer: the rule for adaptive optimizers and companders."""

from typing import Any

import keras
from keras import ops

from keras_weightmods import backend
from keras_weightmods.core import keras_compat
from keras_weightmods.core.restored import RestoredOnError
from keras_weightmods.core.wrapping_optimizer import (
    WrappingOptimizer,
    warn_about_16_bits,
)
from keras_weightmods.reparameterize.compander import Compander
from keras_weightmods.utils import checks


@keras.saving.register_keras_serializable(package="keras_weightmods")
class CompanderOptimizer(WrappingOptimizer):
    """Lets an optimizer step on the effective weights of companders.

    This is the rule of Weight Compander (arXiv 2306.16993) for adaptive
    optimizers. For a weight w = Psi(v) the wrapped optimizer sees w and the
    gradient dL/dw. Its step is multiplied by dPsi/dv and taken on v:

        v <- v + Psi'(v) * step(w, dL/dw)

    Adam on v itself divides by the size of its gradient, which cancels Psi'(v),
    the rescaling that the method needs. The wrapped optimizer updates all other
    variables as always. These include the learnable a and b, and weights under
    other reparameterizations.

    Weight decay of the wrapped optimizer acts

    - for fixed pairs on w, as a part of its step:
      `v <- v - Psi'(v) * learning_rate * weight_decay * w`;
    - for learnable pairs on v alone, and not on a and b:
      `v <- v - learning_rate * weight_decay * v`.

    Clipping of gradients acts on dL/dw. Gradient accumulation works as usual. A
    moving average (`use_ema`) is taken of the stored values, and constraints
    apply after the step. With mixed_float16 Keras wraps this optimizer in a
    `LossScaleOptimizer`, which is the right order.

    With plain SGD the rule changes nothing. With momentum it uses the momentum
    of dL/dw.

    Args:
        optimizer: The `keras.optimizers.Optimizer` to wrap, not built.
            It must not be a `LossScaleOptimizer` or `MultiOptimizer`: put these
            around this one.
        name: String. Defaults to `"compander_optimizer"`.

    Raises:
        ValueError: If `optimizer` is not such an optimizer. On build: if no
            variable has a compander.

    Example:

    ```python
    import keras
    import keras_weightmods as kwm

    model = keras.Sequential([keras.Input((8,)), kwm.CompanderDense(4)])
    model.compile(
        kwm.CompanderOptimizer(keras.optimizers.AdamW(1e-3)), "mse"
    )
    model.fit(keras.ops.ones((16, 8)), keras.ops.ones((16, 4)), verbose=0)
    ```
    """

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer,
        name: str = "compander_optimizer",
    ) -> None:
        if getattr(optimizer, "built", False):
            raise checks.error("optimizer", "one not built yet", optimizer)
        super().__init__(optimizer, name)

    def build(self, variables: list[keras.Variable]) -> None:
        """Build the wrapped optimizer, once the companders are found."""
        if self.built:
            return
        found = [getattr(v, "reparameterization", None) for v in variables]
        items = {
            self._var_key(variable): item
            for variable, item in zip(variables, found)
            if isinstance(item, Compander)
        }
        if not items:
            raise ValueError(
                "`CompanderOptimizer` found no weight with a compander "
                f"among the {len(variables)} variables it was built on. Build "
                "it after `attach_compander`, or use "
                f"{type(self.optimizer).__name__} as it is."
            )
        warn_about_16_bits(self, variables)
        with RestoredOnError(self, self.optimizer):
            self._build(variables, items)

    def _build(self, variables: list[keras.Variable], items: Any) -> None:
        super().build(variables)
        inner = self.optimizer
        learnable = {key for key, item in items.items() if item.learnable}
        pairs = {
            self._var_key(parameter)
            for item in items.values()
            for parameter in item.parameters
        }
        # Closures, because Keras would track the layers otherwise.
        self._get_item = items.get
        self._is_decayed = {
            key
            for key in learnable
            if keras_compat.decays(inner, items[key].target.variable)
        }.__contains__
        keras_compat.exclude_from_decay(inner, learnable | pairs)
        inner.build(variables)

    def _backend_update_step(
        self, grads: Any, trainable_variables: Any, learning_rate: Any
    ) -> None:
        """Let the wrapped optimizer step on w in place of v, then restore v."""
        inner = self.optimizer
        decay = self._decay()
        grads, companded = list(grads), []
        for i, variable in enumerate(trainable_variables):
            item = self._get_item(self._var_key(variable))
            if item is None:
                continue
            v = ops.copy(ops.stop_gradient(ops.convert_to_tensor(variable)))
            w = item.effective(v)
            wide = _widened(v)
            slope = item.derivative(wide)
            # If the slope is zero, so is the gradient.
            grads[i] = _widened(grads[i]) / ops.maximum(slope, 1e-30)
            companded.append((variable, w, wide, slope))
        if keras.backend.backend() == "tensorflow":
            # The slopes use a and b from before this step.
            slopes = [t for _, *three in companded for t in three]
            grads = backend.current().after(grads, slopes)
        weight_decay = inner.weight_decay
        try:
            for variable, w, _, _ in companded:
                variable.assign(w)
            # On torch Keras fails on an empty list of variables to decay.
            if not any(
                keras_compat.decays(inner, v) for v in trainable_variables
            ):
                inner.weight_decay = None
            self._apply_wrapped(grads, trainable_variables)
            inner.weight_decay = weight_decay
            for variable, w, v, slope in companded:
                step = _widened(ops.convert_to_tensor(variable)) - _widened(w)
                new = v + slope * step
                is_decayed = self._is_decayed(self._var_key(variable))
                if decay is not None and is_decayed:
                    new = new - decay * v
                variable.assign(ops.cast(new, variable.dtype))
        except BaseException:
            # In eager mode, it has already put w in place of v.
            inner.weight_decay = weight_decay
            for variable, _, v, _ in companded:
                variable.assign(ops.cast(v, variable.dtype))
            raise

    def _decay(self) -> Any:
        """Return the share of v that this step takes off; None for no decay."""
        inner = self.optimizer
        if not inner.weight_decay:
            return None
        decay = ops.cast(inner.learning_rate, "float32") * inner.weight_decay
        every = inner.gradient_accumulation_steps
        if every:
            steps = keras_compat.applied_steps(inner)
            is_update = ops.equal((steps + 1) % every, 0)
            decay = decay * ops.cast(is_update, "float32")
        return decay


def _widened(x: Any) -> Any:
    dtype = keras.backend.standardize_dtype(x.dtype)
    return x if dtype == "float64" else ops.cast(x, "float32")
