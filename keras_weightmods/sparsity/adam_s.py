"""AdamS: Adam with a pull that drives weights into an N:M pattern."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_weightmods.core import keras_private
from keras_weightmods.ops.matrix import contraction_size
from keras_weightmods.ops.nm import (
    Pattern,
    packed_size,
    parse_pattern,
    unpack_bits,
)
from keras_weightmods.sparsity import adam_s_targets, adam_s_warnings
from keras_weightmods.sparsity.adam_s_targets import Spec
from keras_weightmods.sparsity.adam_s_update import AdamSUpdate
from keras_weightmods.sparsity.report import ChangeReport
from keras_weightmods.utils import checks


@keras.saving.register_keras_serializable(package="keras_weightmods")
class AdamS(AdamSUpdate, keras.optimizers.Optimizer):
    r"""Adam that trains kernels into an N:M sparse pattern.

    Implements algorithm 1 of CAST (Continuous Adaptive Sparse Trainer,
    arXiv 2509.25996, equations 6-8). The forward pass stays dense; a mask
    only decides which weights are pulled to zero. For a sparsified kernel
    `w`, at step `t = 0, 1, ..., total_steps - 1` with gradient `g`:

    - every `mask_every` steps, before the update, the mask is set: True for
      the `n` largest magnitudes in each group of `m` along the contraction
      axes;
    - `mu = beta_1 * mu + (1 - beta_1) * g`;
    - `a = min(1, t / (ramp * total_steps))`;
    - `mixed = mu` where kept, `(1 - a) * mu + a * l1 * sign(w)` elsewhere;
    - `v = beta_2 * v + (1 - beta_2) * mixed**2`;
    - `w -= lr * (mixed / (1 - beta_1**(t + 1)))
      / (sqrt(v / (1 - beta_2**(t + 1))) + epsilon)`.

    As published, `v` of a sparsified kernel is of `mixed`, for kept weights
    too. All other variables take the steps of `keras.optimizers.Adam`, with
    `v` of the gradient. The state is Adam's and one bit for each sparsified
    weight.

    With `decay="published"` a masked weight travels at most
    `sum(lr * a)` over the run; a short run cannot bring it to zero, and the
    optimizer warns when it is built. With `decay="relative"` the pull is
    scaled to arrive: `mixed = (1 - a) * mu` for a masked weight, and after
    the step the weight is multiplied by `(1 - a_next) / (1 - a)`, where
    `a_next` is the ramp one step on. Whatever the learning rate, what was
    masked from the start shrinks linearly and is exactly zero when the ramp
    is done.

    After the last step prune with the last mask: `AdamS.prune()`, or train
    through `CAST`, whose `finalize()` does it.

    Args:
        learning_rate: A float, a
            `keras.optimizers.schedules.LearningRateSchedule`, or a callable
            without arguments. It should reach about zero at the end, since
            masked weights are left at about the last rate. Of sparsified
            kernels `v` is taken from `mixed`, not from `g`, so their steps
            are up to 4 times Adam's: use about a quarter of Adam's rate.
            Defaults to `1e-4`.
        total_steps: Int, the optimizer steps of the whole run. `CAST.fit`
            fills it in; elsewhere it is required when the optimizer is built.
            Steps past it keep the ramp at 1.
        pattern: String `"n:m"` or pair of ints: n weights kept of every m.
            Defaults to `"2:4"`.
        targets: Which kernels are sparsified, along which axes: a
            `keras.Model` or layer, `Targets` or a list of `Target` from
            `find_targets`, or `None` to take the variables named `kernel` of
            rank 2 (contraction axis 0), also those of recurrent cells, which
            `find_targets` leaves out; a regex takes those of them in whose
            path it is found.
            Kernels whose contraction size is no multiple of `m` are skipped,
            with a warning. Defaults to `None`.
        l1: The pull lambda: a float, or `"auto"` for `l1_scale` times the RMS
            gradient of each kernel over the first 10 steps. Used by
            `decay="published"` only. Defaults to `"auto"`.
        l1_scale: Float, the factor of `l1="auto"`. Defaults to `0.5`.
        ramp: Float in [0, 1], the share of the run in which `a` reaches 1.
            With 0, for `decay="relative"` only, what is masked is zero from
            the first step on, and as zeros rank last the mask stays: a
            training under the fixed mask of a model that is sparse already.
            Defaults to `1.0`.
        decay: `"published"` or `"relative"`. Defaults to `"published"`.
        criterion: What ranks the weights of a group: `"magnitude"` for `|w|`,
            or `"activation"` for `|w|` times the importance of its input, set
            with `set_importance` (Wanda's score, when it is the norm of that
            input's activations). Defaults to `"magnitude"`.
        mask_every: Int, steps between two masks. Defaults to `10`.
        beta_1: Float. Defaults to `0.9`.
        beta_2: Float. Defaults to `0.999`.
        epsilon: Float, added to the square root: as in the formula above,
            and as in `keras.optimizers.Adam` for all other variables.
            Defaults to `1e-8`.
        weight_decay: Float or `None`, as in `keras.optimizers.AdamW`.
        clipnorm, clipvalue, global_clipnorm, use_ema, ema_momentum,
            ema_overwrite_frequency, loss_scale_factor,
            gradient_accumulation_steps, name: As in
            `keras.optimizers.Optimizer`. With accumulation, `total_steps`
            and `mask_every` count updates, not batches.

    Raises:
        ValueError: For an argument outside the ranges above; when built
            without `total_steps`; when `targets=None` meets a kernel whose
            axes cannot be told from its rank; when a restored state does not
            fit.

    Example:

    ```python
    import keras
    import numpy as np
    import keras_weightmods as kwm

    model = keras.Sequential(
        [keras.Input((16,)), keras.layers.Dense(8), keras.layers.Dense(1)]
    )
    x = np.random.normal(size=(64, 16))
    model.compile(kwm.AdamS(1e-3, total_steps=8, decay="relative"), "mse")
    model.fit(x, x[:, :1], batch_size=16, epochs=2, verbose=0)
    model.optimizer.prune()
    kwm.assert_sparse(model, "2:4")
    ```
    """

    def __init__(
        self,
        learning_rate: Any = 1e-4,
        total_steps: int | None = None,
        pattern: Pattern = "2:4",
        *,
        targets: Any = None,
        l1: float | str = "auto",
        l1_scale: float = 0.5,
        ramp: float = 1.0,
        decay: str = "published",
        criterion: str = "magnitude",
        mask_every: int = 10,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        name: str = "adam_s",
        **kwargs: Any,
    ) -> None:
        n, m = parse_pattern(pattern)
        if l1 != "auto":
            checks.check_float("l1", l1, above=0)
        checks.check_float("l1_scale", l1_scale, above=0)
        checks.check_choice("decay", decay, ("published", "relative"))
        checks.check_choice("criterion", criterion, ("magnitude", "activation"))
        checks.check_float("ramp", ramp, 0, 1)
        if not ramp and decay == "published":
            raise checks.error("ramp", 'above 0 with decay="published"', ramp)
        checks.check_int("mask_every", mask_every, 1)
        checks.check_float("beta_1", beta_1, 0, below=1)
        checks.check_float("beta_2", beta_2, 0, below=1)
        checks.check_float("epsilon", epsilon, above=0)
        targets = adam_s_targets.check_targets(targets)
        super().__init__(learning_rate=learning_rate, name=name, **kwargs)
        self.n, self.m = n, m
        self.total_steps = total_steps
        self.l1 = l1
        self.l1_scale = l1_scale
        self.ramp = ramp
        self.decay = decay
        self.criterion = criterion
        self.mask_every = mask_every
        self.beta_1 = beta_1
        self.beta_2 = beta_2
        self.epsilon = epsilon
        # A closure, because Keras would track a model held as an attribute.
        self._get_targets: Callable[[], Any] = lambda: targets
        self._specs: list[Spec | None] = []

    @property
    def pattern(self) -> str:
        """The pattern as a string, `"n:m"`."""
        return f"{self.n}:{self.m}"

    @property
    def total_steps(self) -> Any:
        """The optimizer steps of the whole run, or None if not yet known.

        A compiled train step of a model holds it: clear that one too.
        """
        return self._total_steps

    @total_steps.setter
    def total_steps(self, total_steps: Any) -> None:
        checks.check_int("total_steps", total_steps, 1, optional=True)
        self._total_steps = None if total_steps is None else int(total_steps)
        # On TensorFlow it is a constant of the compiled update.
        self._get_compiled_step: Callable[[], Any] | None = None

    @property
    def sparsified(self) -> list[Any]:
        """The built variables that are sparsified, in order."""
        return [variable for variable, _, _ in self.sparsified_state]

    @property
    def masks(self) -> list[np.ndarray]:
        """The current masks: boolean NumPy arrays, True where kept.

        One for each of `sparsified`, in the same order.
        """
        return [
            ops.convert_to_numpy(unpack_bits(bits.value, spec.shape))
            for _, spec, bits in self.sparsified_state
        ]

    @property
    def sparsified_state(self) -> list[tuple[Any, Spec, Any]]:
        """Triples (variable, its spec, its packed mask), in order.

        A spec has `path`, `shape` and the contraction `axes`.
        """
        if not self.built:
            raise ValueError(
                "The masks of `AdamS` are there once it is built. Train a "
                "step, or call `optimizer.build(model.trainable_variables)`."
            )
        return [
            (spec.variable, spec, bits)
            for spec, bits in zip(self._specs, self._mask_bits)
            if spec is not None
        ]

    def use_targets(self, targets: Any) -> None:
        """Set `targets` where none were given; only before `build`."""
        if self._get_targets() is None and not self.built:
            targets = adam_s_targets.check_targets(targets)
            self._get_targets = lambda: targets

    def build(self, variables: Iterable[Any]) -> None:
        """Create the state: two moments a variable, one bit a weight."""
        if self.built:
            return
        variables = list(variables)
        if self.total_steps is None:
            raise ValueError(
                "`AdamS` needs `total_steps`, for its ramp. Pass `AdamS(..., "
                "total_steps=steps_per_epoch * epochs)`, or train through "
                "`CAST`, whose `fit` fills it in. Received: total_steps=None"
            )
        specs = adam_s_targets.find_specs(
            self._get_targets(), variables, self.m
        )
        found = [spec for spec in specs if spec is not None]
        adam_s_warnings.warn_about_low_precision(found)
        if self.decay == "published":
            adam_s_warnings.warn_about_travel(self, found)
        super().build(variables)
        self._specs = specs
        self._momentums, self._velocities = self.add_optimizer_variables(
            variables, ["momentum", "velocity"]
        )
        self._mask_bits = self._add_states(
            "mask", lambda spec: (packed_size(math.prod(spec.shape)),), "uint8"
        )
        self._gradient_squares: list[Any] = [None] * len(variables)
        self._importance: list[Any] = [None] * len(variables)
        if self._measures_gradients:
            self._gradient_squares = self._add_states(
                "gradient_square", lambda spec: ()
            )
        if self.criterion == "activation":
            self._importance = self._add_states(
                "importance",
                lambda spec: (contraction_size(spec.shape, spec.axes),),
                initializer="ones",
            )

    def _apply_weight_decay(self, variables: Any) -> None:
        """Nothing: the decay is part of the update, in the same pass.

        Keras would write every weight and read it again, as it decays them
        before the update.
        """

    def _decay_rate_of(self, variable: Any) -> Any:
        decays = self.weight_decay and keras_private.decays(self, variable)
        return self.weight_decay if decays else None

    def _backend_update_step(
        self, grads: Any, trainable_variables: Any, learning_rate: Any
    ) -> None:
        if keras.backend.backend() != "torch":
            super()._backend_update_step(
                grads, trainable_variables, learning_rate
            )
            return
        from keras_weightmods.backend.torch import adam_s

        scalars = adam_s.step_scalars(self, learning_rate)
        for gradient, variable in zip(grads, trainable_variables):
            adam_s.update_variable(self, gradient, variable, scalars)

    def update_step(
        self, gradient: Any, variable: Any, learning_rate: Any
    ) -> None:
        """Update one variable and its state."""
        index = self._get_variable_index(variable)
        spec = self._specs[index]
        state = {"weight": variable, **self._state_of(index)}
        stepped = self._compiled_step()(
            {name: ops.convert_to_tensor(v) for name, v in state.items()},
            gradient,
            ops.cast(learning_rate, variable.dtype),
            ops.cast(self.iterations, "float32"),
            None if spec is None else spec.axes,
            self._decay_rate_of(variable),
        )
        for name, value in stepped.items():
            self.assign(state[name], value)

    def _compiled_step(self) -> Any:
        """`_stepped`, which TensorFlow may run outside of a compiled step."""
        if keras.backend.backend() != "tensorflow":
            return self._stepped
        if self._get_compiled_step is None:
            from keras_weightmods.backend.tensorflow.compiled import compiled

            step = compiled(self._stepped)
            # A closure, because Keras would track it for the export.
            self._get_compiled_step = lambda: step
        return self._get_compiled_step()

    def prune(self) -> ChangeReport:
        """Set the masked weights of the built variables to zero.

        Uses the last mask, as CAST does at the end of training. Call it once
        the training is done.

        Returns:
            A `ChangeReport`; its keys count the variables of the optimizer.

        Raises:
            ValueError: If no step was taken yet, so that there is no mask.
        """
        state = self.sparsified_state
        if not int(ops.convert_to_numpy(self.iterations)):
            raise ValueError(
                "`AdamS.prune()` needs the mask of a training run. Received: "
                "an optimizer that has taken no step. Call it after `fit`."
            )
        for variable, spec, bits in state:
            value = ops.convert_to_tensor(variable)
            mask = unpack_bits(bits.value, spec.shape)
            variable.assign(ops.where(mask, value, ops.zeros_like(value)))
        return ChangeReport.of(
            f"Pruned to {self.pattern}",
            keras_private.optimizer_variables(self),
            self.sparsified,
        )

    def set_importance(self, importance: Any) -> None:
        """Set the importance of the inputs, for `criterion="activation"`.

        Args:
            importance: A list with, for each of `sparsified`, an array of
                shape `(K,)`, K being the size of its flattened contraction
                axes. Entries must be finite and not negative.

        Raises:
            ValueError: If the list does not fit, or the optimizer was made
                with another criterion.
        """
        if self.criterion != "activation":
            expected = '"activation" where an importance is set'
            raise checks.error("criterion", expected, self.criterion)
        arrays = [np.asarray(a, "float32") for a in importance]
        indices = map(self._get_variable_index, self.sparsified)
        variables = [self._importance[index] for index in indices]
        shapes = [tuple(v.shape) for v in variables]
        if shapes != [a.shape for a in arrays] or not all(
            np.isfinite(a).all() and (a >= 0).all() for a in arrays
        ):
            raise checks.error(
                "importance",
                f"finite arrays, not negative, of shapes {shapes}",
                arrays,
            )
        for variable, array in zip(variables, arrays):
            variable.assign(array)

    def load_own_variables(self, store: Any) -> None:
        """Restore the state; check all of it before writing any.

        Nothing, with Keras' warning, of an optimizer saved unbuilt.
        """
        keys = [str(i) for i in range(len(store.keys()))]
        # Before it is built there are the count of steps and, if it is no
        # schedule, the learning rate.
        unbuilt = 1 + isinstance(self._learning_rate, keras.Variable)
        if self.built and len(keys) != unbuilt:
            stored = set(store.keys())
            self._check_state([store[k] for k in keys if k in stored])
        super().load_own_variables(store)

    def set_weights(self, weights: Any) -> None:
        """Set the state; check all of it before writing any."""
        if self.built:
            self._check_state(weights)
        super().set_weights(weights)

    def get_config(self) -> dict[str, Any]:
        if self.built:
            targets = [
                spec.to_config(index)
                for index, spec in enumerate(self._specs)
                if spec is not None
            ]
        else:
            targets = adam_s_targets.targets_config(self._get_targets())
        return {
            **super().get_config(),
            "total_steps": self.total_steps,
            "pattern": self.pattern,
            "targets": targets,
            "l1": self.l1,
            "l1_scale": self.l1_scale,
            "ramp": self.ramp,
            "decay": self.decay,
            "criterion": self.criterion,
            "mask_every": self.mask_every,
            "beta_1": self.beta_1,
            "beta_2": self.beta_2,
            "epsilon": self.epsilon,
        }

    def _add_states(
        self, name: Any, shape: Any, dtype: Any = "float32", **kwargs: Any
    ) -> Any:
        return [
            spec
            and self.add_variable(
                shape=shape(spec),
                dtype=dtype,
                name=f"{spec.path.replace('/', '_')}_{name}",
                **kwargs,
            )
            for spec in self._specs
        ]

    def _state_of(self, index: Any) -> Any:
        """The variables of the state of one variable, by name."""
        lists = {
            "momentum": self._momentums,
            "velocity": self._velocities,
            "mask": self._mask_bits,
            "gradient_square": self._gradient_squares,
            "importance": self._importance,
        }
        return {
            name: variables[index]
            for name, variables in lists.items()
            if variables[index] is not None
        }

    def _check_state(self, arrays: Any) -> None:
        shapes = [np.shape(array) for array in arrays]
        misfits = [
            f"{v.path} of shape {tuple(v.shape)}, received {shape}"
            for v, shape in zip(self.variables, shapes)
            if tuple(v.shape) != shape
        ]
        if misfits or len(shapes) != len(self.variables):
            raise ValueError(
                "The saved state does not fit this `AdamS`; nothing was "
                "restored. Use the model, `targets`, `pattern`, `l1`, `decay` "
                "and `criterion` that it was saved with. Expected "
                f"{len(self.variables)} arrays, received {len(shapes)}; first "
                f"misfits: {misfits[:5]}"
            )
