"""SparseAdamW: AdamW with state for the entries that it trains alone."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_weightmods import backend
from keras_weightmods.core import keras_compat
from keras_weightmods.core.wrapping_optimizer import warn_about_16_bits
from keras_weightmods.lift.masked_state import MaskedState, put, split_of, taken
from keras_weightmods.utils import checks, dtypes

# The state of a variable. The last is its value before rounding to 16 bits.
_STATE = "momentum", "velocity", "master"


@keras.saving.register_keras_serializable(package="keras_weightmods")
class SparseAdamW(MaskedState):
    r"""AdamW that keeps moments for the principal weights alone.

    The optimizer of LIFT (arXiv 2506.00772, algorithm 1). For a kernel W with a
    mask M of k entries, at step t = 1, 2, ...:

        g = G[M]
        m = beta_1 m + (1 - beta_1) g,   v = beta_2 v + (1 - beta_2) g^2
        W[M] -= lr (m / (1 - beta_1^t) / (sqrt(v / (1 - beta_2^t)) + epsilon)
                    + weight_decay W[M])

    The state holds the two moments and the places of the entries, 4 bytes each:
    at a density of 5 %, 0.075 times AdamW's. For kernels stored in 16 bits (a
    model of dtype `"bfloat16"`) the moments are still in float32. Another 4
    bytes then hold each entry before it was rounded. All other entries of W
    stay as they are bit for bit. Gradients are accumulated and clipped as
    vectors of length k too, so a norm is that of the masked entries.

    The masks come from `PrincipalMaskCallback`, which moves the state when it
    moves a mask. Entries in both masks keep their moments, and new ones start
    at zero. All of them count steps from the beginning, as in the paper. So the
    first step of a new entry is larger by sqrt((1 - beta_1)^2 / (1 - beta_2)).
    Keep `beta_2` at 0.95, where that is 0.45, rather than 0.999, where it is
    3.2.

    Variables without a mask (`also_train`) take AdamW steps.

    With `use_ema=True` the average is as large as the kernels, as in Keras.

    Args:
        learning_rate: A float, a
            `keras.optimizers.schedules.LearningRateSchedule`, or a callable
            without arguments. Defaults to `1e-4`.
        weight_decay: Float or `None`, the weight decay of masked entries.
            Defaults to `None`.
        beta_1: Float in [0, 1). Defaults to `0.9`.
        beta_2: Float in [0, 1). Defaults to `0.95`.
        epsilon: Float, added to the square root. Defaults to `1e-6`.
        name: String. Defaults to `"sparse_adamw"`.
        **kwargs: As in `keras.optimizers.Optimizer`: `clipnorm`, `use_ema`,
            `gradient_accumulation_steps` and others.

    Raises:
        ValueError: If an argument is outside of its range. When it is to step
            without masks.

    Example:

    ```python
    import keras
    import numpy as np
    import keras_weightmods as kwm

    model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(8)])
    model.compile(kwm.SparseAdamW(1e-3), "mse")
    x = np.random.normal(size=(32, 16))
    model.fit(
        x, x[:, :8], verbose=0, callbacks=[kwm.PrincipalMaskCallback(0.25)]
    )
    (kernel,) = model.optimizer.masked_variables
    assert len(model.optimizer.indices_of(kernel)) == 32
    ```
    """

    def __init__(
        self,
        learning_rate: Any = 1e-4,
        weight_decay: float | None = None,
        beta_1: float = 0.9,
        beta_2: float = 0.95,
        epsilon: float = 1e-6,
        *,
        name: str = "sparse_adamw",
        **kwargs: Any,
    ) -> None:
        checks.check_schedule("learning_rate", learning_rate)
        super().__init__(
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            name=name,
            **kwargs,
        )
        checks.check_float("weight_decay", weight_decay, 0, optional=True)
        self.beta_1 = checks.check_float("beta_1", beta_1, 0, below=1)
        self.beta_2 = checks.check_float("beta_2", beta_2, 0, below=1)
        self.epsilon = checks.check_float("epsilon", epsilon, above=0)

    def _create_state(self, variables: Any, known: Any) -> None:
        new = self.add_variable_from_reference
        self._moments = [
            tuple(
                new(variable, name)
                for name in _STATE[: 2 + dtypes.has_16_bits(variable)]
            )
            for variable in variables
        ]
        if self.use_ema:
            warn_about_16_bits(self, variables)

    def add_variable_from_reference(
        self,
        reference_variable: Any,
        name: Any = None,
        initializer: Any = "zeros",
    ) -> Any:
        variable, place = reference_variable, len(self.variables)
        dtype = variable.dtype
        # Accumulated gradients have the gradients' dtype, as Keras on JAX
        # needs.
        if dtypes.has_16_bits(variable) and name in _STATE:
            dtype = "float32"
        # The average of a kernel is as large as the kernel.
        if name != "average":
            spec = self.specs[self._get_variable_index(variable)]
            if spec.size is not None:
                # The name has no path: a layout map for kernels must not match
                # it.
                name = f"{name}_{place}"
                return self._add_vector(variable, dtype, name, initializer)
        if dtype == variable.dtype:
            new = super().add_variable_from_reference
            return new(variable, name, initializer)
        name = f"{variable.path.replace('/', '_')}_{name}"
        layout = keras_compat.layout_of(variable)
        return self.add_variable(
            variable.shape, initializer, dtype, layout=layout, name=name
        )

    def _set_places(self, variable: Any, indices: Any) -> None:
        if self.mask_step >= 0:
            _, before, after = np.intersect1d(
                self._places_of(variable),
                indices,
                assume_unique=True,
                return_indices=True,
            )
            for moment in self._moments[self._get_variable_index(variable)]:
                values = ops.convert_to_numpy(moment)
                moved = np.zeros_like(values)
                moved[after] = values[before]
                moment.assign(moved)
        super()._set_places(variable, indices)

    def _backend_apply_gradients(self, grads: Any, variables: Any) -> None:
        compact = []
        for gradient, variable in zip(grads, variables):
            indices = self._indices[self._get_variable_index(variable)]
            if indices is not None:
                gradient = taken(gradient, indices, split_of(variable))
            compact.append(gradient)
        if keras.backend.backend() == "jax":
            # A weight must not change while a gradient still needs it.
            compact = backend.current().after(compact, compact)
        super()._backend_apply_gradients(compact, variables)

    def _apply_weight_decay(self, variables: Any) -> None:
        """Do nothing: the update of masked entries includes the decay."""

    def update_step(
        self, gradient: Any, variable: Any, learning_rate: Any
    ) -> None:
        """Update one variable and its state; the gradient is compact."""
        place = self._get_variable_index(variable)
        indices, state = self._indices[place], self._moments[place]
        known = self._trainable_variables[place]
        decay = (self._use_weight_decay(known) and self.weight_decay) or 0.0
        in_place = backend.current().in_place()
        if in_place is not None:
            rest = learning_rate, self.epsilon, indices, decay
            in_place.adamw(self, known, gradient, state, *rest)
            return
        whole = ops.convert_to_tensor(variable)
        if keras.backend.backend() == "jax" and indices is not None:
            (whole,) = backend.current().after([whole], [gradient])
        split = split_of(known)
        weight = whole if indices is None else taken(whole, indices, split)
        moments, master = state[:2], state[2:]
        for own in master:
            weight = dtypes.restored(weight, ops.convert_to_tensor(own))
        dtype = weight.dtype
        rate = ops.cast(learning_rate, dtype)
        gradient = ops.cast(gradient, dtype)
        count = ops.cast(self.iterations + 1, "float32")
        corrected = []
        betas = self.beta_1, self.beta_2
        targets = gradient, ops.square(gradient)
        for moment, beta, target in zip(moments, betas, targets):
            old = ops.convert_to_tensor(moment)
            new = old + (target - old) * (1 - beta)
            self.assign(moment, new)
            share = 1 - ops.power(ops.cast(beta, "float32"), count)
            corrected.append(new / ops.cast(share, dtype))
        if decay:
            weight = weight - weight * (rate * ops.cast(decay, dtype))
        mean, square = corrected
        weight = weight - rate * mean / (ops.sqrt(square) + self.epsilon)
        for own in master:
            self.assign(own, weight)
            weight = ops.cast(weight, whole.dtype)
        if indices is not None:
            weight = put(whole, indices, weight, split)
        self.assign(variable, weight)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "beta_1": self.beta_1,
            "beta_2": self.beta_2,
            "epsilon": self.epsilon,
        }
