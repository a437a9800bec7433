"""AdamS: Adam with a pull that drives weights into an N:M pattern."""

import dataclasses
import math
import warnings

import keras
import numpy as np
from keras import ops

from keras_weightmods.core.targets import Target, Targets, find_targets
from keras_weightmods.ops.matrix import along, contraction_size, to_matrix
from keras_weightmods.ops.nm import (
    nm_mask,
    pack_bits,
    packed_size,
    parse_pattern,
    unpack_bits,
)

# With l1="auto" the gradient's size is measured over this many first steps.
_AUTO_L1_STEPS = 10

# Travel that masked weights need, in units of their mean magnitude: below
# about 3 the largest of them do not arrive (see `AdamS.travel`).
_TRAVEL_NEEDED = 3.0


@keras.saving.register_keras_serializable(package="keras_weightmods")
class AdamS(keras.optimizers.Optimizer):
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
            `keras.Model`, a list from `find_targets`, or `None` to take the
            variables named `kernel` of rank 2 (contraction axis 0), also
            those of recurrent cells, which `find_targets` leaves out.
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
        learning_rate=1e-4,
        total_steps=None,
        pattern="2:4",
        targets=None,
        l1="auto",
        l1_scale=0.5,
        ramp=1.0,
        decay="published",
        criterion="magnitude",
        mask_every=10,
        beta_1=0.9,
        beta_2=0.999,
        epsilon=1e-8,
        weight_decay=None,
        clipnorm=None,
        clipvalue=None,
        global_clipnorm=None,
        use_ema=False,
        ema_momentum=0.99,
        ema_overwrite_frequency=None,
        loss_scale_factor=None,
        gradient_accumulation_steps=None,
        name="adam_s",
        **kwargs,
    ):
        n, m = parse_pattern(pattern)
        _check_total_steps(total_steps)
        _check_positive("l1_scale", l1_scale)
        if l1 != "auto":
            _check_positive("l1", l1, 'a positive float or "auto"')
        if not (_is_number(ramp) and 0 <= ramp <= 1) or (
            not ramp and decay == "published"
        ):
            raise ValueError(
                "`ramp` is the share of the run in which the pull reaches its "
                'full strength, in (0, 1], or in [0, 1] with decay="relative". '
                f"Received: ramp={ramp!r}, decay={decay!r}"
            )
        for name, beta in (("beta_1", beta_1), ("beta_2", beta_2)):
            if not (_is_number(beta) and 0 <= beta < 1):
                raise ValueError(
                    f"`{name}` must be in [0, 1). Received: {name}={beta!r}"
                )
        _check_positive("epsilon", epsilon)
        _check_choice("decay", decay, ("published", "relative"))
        _check_choice("criterion", criterion, ("magnitude", "activation"))
        if type(mask_every) is not int or mask_every < 1:
            raise ValueError(
                "`mask_every` must be an int of at least 1. "
                f"Received: mask_every={mask_every!r}"
            )
        targets = _checked_targets(targets)
        super().__init__(
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            clipnorm=clipnorm,
            clipvalue=clipvalue,
            global_clipnorm=global_clipnorm,
            use_ema=use_ema,
            ema_momentum=ema_momentum,
            ema_overwrite_frequency=ema_overwrite_frequency,
            loss_scale_factor=loss_scale_factor,
            gradient_accumulation_steps=gradient_accumulation_steps,
            name=name,
            **kwargs,
        )
        self.n, self.m = n, m
        self._get_compiled_step = None
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
        self._get_targets = lambda: targets
        self._specs: list[_Spec | None] = []

    @property
    def pattern(self):
        """The pattern as a string, `"n:m"`."""
        return f"{self.n}:{self.m}"

    @property
    def total_steps(self):
        """The optimizer steps of the whole run, or None if not yet known.

        A compiled train step of a model holds it: clear that one too.
        """
        return self._total_steps

    @total_steps.setter
    def total_steps(self, total_steps):
        _check_total_steps(total_steps)
        self._total_steps = None if total_steps is None else int(total_steps)
        # On TensorFlow it is a constant of the compiled update.
        self._get_compiled_step = None

    @property
    def sparsified(self):
        """The built variables that are sparsified, in order."""
        return [variable for variable, _, _ in self.sparsified_state]

    @property
    def masks(self):
        """The current masks: boolean NumPy arrays, True where kept.

        One for each of `sparsified`, in the same order.
        """
        return [
            ops.convert_to_numpy(unpack_bits(bits.value, spec.shape))
            for _, spec, bits in self.sparsified_state
        ]

    @property
    def sparsified_state(self):
        """Triples (variable, its spec, its packed mask), in order.

        A spec has `path`, `shape` and the contraction `axes`.
        """
        if not self.built:
            raise ValueError(
                "The masks of `AdamS` are there once it is built. Train a "
                "step, or call `optimizer.build(model.trainable_variables)`."
            )
        return [
            (variable, spec, bits)
            for variable, spec, bits in zip(
                self._trainable_variables, self._specs, self._mask_bits
            )
            if spec is not None
        ]

    def use_targets(self, targets):
        """Sets `targets` where none were given; only before `build`."""
        if self._get_targets() is None and not self.built:
            targets = _checked_targets(targets)
            self._get_targets = lambda: targets

    def build(self, variables):
        """Creates the state: two moments a variable, one bit a weight."""
        if self.built:
            return
        variables = list(variables)
        if self.total_steps is None:
            raise ValueError(
                "`AdamS` needs `total_steps`, the number of optimizer steps "
                "of the whole run, for its ramp. Pass "
                "`AdamS(..., total_steps=steps_per_epoch * epochs)`, or train "
                "through `CAST`, whose `fit` fills it in. "
                "Received: total_steps=None"
            )
        specs = _find_specs(self._get_targets(), variables, self.m)
        _warn_about_low_precision(specs)
        if self.decay == "published":
            self._warn_about_travel(specs)
        super().build(variables)
        self._specs = specs
        self._momentums, self._velocities = self.add_optimizer_variables(
            variables, ["momentum", "velocity"]
        )
        self._mask_bits = self._add_states(
            "mask", lambda spec: packed_size(math.prod(spec.shape)), "uint8"
        )
        self._gradient_squares: list = [None] * len(variables)
        self._importance: list = [None] * len(variables)
        if self._measures_gradients:
            self._gradient_squares = self._add_states("gradient_square")
        if self.criterion == "activation":
            self._importance = self._add_states(
                "importance",
                lambda spec: contraction_size(spec.shape, spec.axes),
                initializer="ones",
            )

    def _apply_weight_decay(self, variables):
        """Nothing: the decay is part of the update, in the same pass.

        Keras would write every weight and read it again, as it decays them
        before the update.
        """

    def _decay_rate_of(self, variable):
        if self.weight_decay is None or not self._use_weight_decay(variable):
            return None
        return self.weight_decay

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        if keras.backend.backend() != "torch":
            super()._backend_update_step(
                grads, trainable_variables, learning_rate
            )
            return
        from keras_weightmods.backend.torch import adam_s

        scalars = adam_s.step_scalars(self, learning_rate)
        for gradient, variable in zip(grads, trainable_variables):
            adam_s.update_variable(self, gradient, variable, scalars)

    def update_step(self, gradient, variable, learning_rate):
        """Updates one variable and its state."""
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

    def _compiled_step(self):
        """`_stepped`, which TensorFlow may run outside of a compiled step."""
        if keras.backend.backend() != "tensorflow":
            return self._stepped
        if self._get_compiled_step is None:
            from keras_weightmods.backend.tensorflow.compiled import compiled

            step = compiled(self._stepped)
            # A closure, because Keras would track it for the export.
            self._get_compiled_step = lambda: step
        return self._get_compiled_step()

    def _stepped(self, state, gradient, rate, step, axes, decay_rate):
        """One step of one variable, as a pure function of tensors.

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

    def prune(self):
        """Sets the masked weights of the built variables to zero.

        Uses the last mask, as CAST does at the end of training. Call it once
        the training is done.

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

    def set_importance(self, importance):
        """Sets the importance of the inputs, for `criterion="activation"`.

        Args:
            importance: A list with, for each of `sparsified`, an array of
                shape `(K,)`, K being the size of its flattened contraction
                axes. Entries must be finite and not negative.

        Raises:
            ValueError: If the list does not fit, or the optimizer was made
                with another criterion.
        """
        if self.criterion != "activation":
            raise ValueError(
                '`set_importance` is for AdamS(criterion="activation"). '
                f"Received: criterion={self.criterion!r}"
            )
        if not self.built:
            raise ValueError(
                "`set_importance` needs a built optimizer. Call "
                "`optimizer.build(model.trainable_variables)` first."
            )
        variables = [v for v in self._importance if v is not None]
        arrays = [np.asarray(a, "float32") for a in importance]
        expected = [tuple(v.shape) for v in variables]
        received = [a.shape for a in arrays]
        if expected != received:
            raise ValueError(
                "`importance` must hold one vector for each sparsified "
                f"kernel. Expected shapes: {expected}. Received: {received}"
            )
        if not all(np.isfinite(a).all() and (a >= 0).all() for a in arrays):
            raise ValueError(
                "`importance` must be finite and not negative. Received: "
                "an array with other values."
            )
        for variable, array in zip(variables, arrays):
            variable.assign(array)

    def load_own_variables(self, store):
        """Restores the state; checks all of it before writing any.

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

    def set_weights(self, weights):
        """Sets the state; checks all of it before writing any."""
        if self.built:
            self._check_state(weights)
        super().set_weights(weights)

    def get_config(self):
        config = super().get_config()
        config.update(
            {
                "total_steps": self.total_steps,
                "pattern": self.pattern,
                "targets": self._targets_config(),
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
        )
        return config

    def _targets_config(self):
        if self.built:
            return [
                {"index": index, **spec.to_config()}
                for index, spec in enumerate(self._specs)
                if spec is not None
            ]
        targets = self._get_targets()
        if isinstance(targets, keras.Model):
            targets = find_targets(targets)
        if targets is None or _is_config(targets):
            return targets
        return [
            {"index": None, **_Spec.from_target(target).to_config()}
            for target in targets
        ]

    def _add_states(self, name, size=None, dtype="float32", **kwargs):
        return [
            None
            if spec is None
            else self.add_variable(
                shape=() if size is None else (size(spec),),
                dtype=dtype,
                name=f"{spec.path.replace('/', '_')}_{name}",
                **kwargs,
            )
            for spec in self._specs
        ]

    def _state_of(self, index):
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

    def _new_bits(self, state, step, axes):
        w, bits = state["weight"], state["mask"]

        def refresh():
            scores = w
            if self.criterion == "activation":
                importance = ops.cast(state["importance"], w.dtype)
                scores = w * along(importance, w.shape, axes)
            return pack_bits(nm_mask(scores, (self.n, self.m), axes))

        is_due = ops.equal(ops.mod(step, self.mask_every), 0)
        return ops.cond(is_due, refresh, lambda: bits)

    @property
    def _measures_gradients(self):
        return self.decay == "published" and self.l1 == "auto"

    def _new_gradient_square(self, state, g, step):
        """Mean over the first steps of the mean square of the gradient."""
        old = state["gradient_square"]

        def measure():
            square = ops.mean(ops.square(ops.cast(g, "float32")))
            return old + (square - old) / (step + 1)

        return ops.cond(step < _AUTO_L1_STEPS, measure, lambda: old)

    def _ramp_at(self, step):
        if not self.ramp:
            return ops.ones_like(step)
        return ops.minimum(step / (self.ramp * self.total_steps), 1.0)

    def _shrink_at(self, step):
        """(1 - a_next) / (1 - a); 0 once the ramp is done."""
        left = self.ramp * self.total_steps - step
        return ops.maximum(left - 1, 0.0) / ops.maximum(left, 1.0)

    def _warn_about_travel(self, specs):
        if any(_is_symbolic(s.variable) for s in specs if s is not None):
            return
        allowed = self._travel_allowed()
        magnitudes = [
            _mean_masked_magnitude(spec, self.n, self.m)
            for spec in specs
            if spec is not None
        ]
        needed = _TRAVEL_NEEDED * max(magnitudes, default=0.0)
        if allowed < needed:
            warnings.warn(
                "AdamS: this schedule is too short to reach zero. Over "
                f"{self.total_steps} steps it lets a masked weight travel "
                f"sum(learning rate x ramp) = {allowed:.3g}, and the masked "
                f"weights need about {needed:.3g} ({_TRAVEL_NEEDED:g} times "
                "their mean magnitude). The prune at the end will then cost "
                'quality. Use decay="relative", which is scaled to arrive, '
                "or more steps, or a higher learning rate.",
                stacklevel=2,
            )

    def _travel_allowed(self):
        """Integrates lr * a over the run, by the trapezoid rule."""
        steps = np.unique(
            np.linspace(0, self.total_steps - 1, 200).round().astype("int64")
        )
        batches = self.gradient_accumulation_steps or 1
        rate = self._learning_rate
        if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
            rates = [_to_float(rate(int(t) * batches)) for t in steps]
        else:
            rates = [_to_float(self.learning_rate)] * len(steps)
        pull = np.minimum(steps / (self.ramp * self.total_steps), 1.0)
        if len(steps) == 1:
            return float(rates[0] * pull[0])
        heights = np.asarray(rates) * pull
        means = (heights[1:] + heights[:-1]) / 2
        return float(np.sum(means * np.diff(steps)))

    def _check_state(self, arrays):
        expected = [tuple(v.shape) for v in self.variables]
        received = [tuple(np.shape(a)) for a in arrays]
        if expected != received:
            misfits = [
                f"{v.path}: expected {e}, received {r}"
                for v, e, r in zip(self.variables, expected, received)
                if e != r
            ]
            raise ValueError(
                "The saved state does not fit this `AdamS`; nothing was "
                f"restored. Expected {len(expected)} arrays, received "
                f"{len(received)}. First misfits: {misfits[:5]}. Use the "
                "model, `targets`, `pattern`, `l1`, `decay` and `criterion` "
                "that the state was saved with."
            )


@dataclasses.dataclass(frozen=True, eq=False)
class _Spec:
    """What the optimizer knows of one sparsified variable."""

    path: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    variable: keras.Variable | None = None

    @classmethod
    def from_target(cls, target):
        return cls(
            target.path,
            tuple(target.shape),
            tuple(target.contraction_axes),
            target.variable,
        )

    def to_config(self):
        return {
            "path": self.path,
            "shape": list(self.shape),
            "contraction_axes": list(self.axes),
        }


def _find_specs(targets, variables, m):
    """One `_Spec` or None for each of `variables`, in their order."""
    if targets is None:
        specs = _inferred_specs(variables)
    elif _is_config(targets):
        specs = _configured_specs(targets, variables)
    else:
        specs = _target_specs(targets, variables)
    usable = [
        spec
        if spec and contraction_size(spec.shape, spec.axes) % m == 0
        else None
        for spec in specs
    ]
    unusable = [s for s, u in zip(specs, usable) if s is not None and not u]
    if unusable:
        warnings.warn(
            f"AdamS leaves {len(unusable)} kernels dense, because the size of "
            f"their contraction axes is no multiple of m={m}: "
            f"{[(s.path, s.shape) for s in unusable[:5]]}",
            stacklevel=3,
        )
    if not any(usable):
        raise ValueError(
            "`AdamS` found no kernel to sparsify among the "
            f"{len(variables)} variables it was built on. Pass "
            "`targets=model` or a list from `find_targets(model)`, or use "
            "Adam."
        )
    return usable


def _inferred_specs(variables):
    specs = []
    for variable in variables:
        shape = tuple(variable.shape)
        is_kernel = variable.name == "kernel" and len(shape) >= 2
        if is_kernel and len(shape) > 2:
            raise ValueError(
                "`AdamS(targets=None)` takes kernels of rank 2; the "
                f"contraction axes of {variable.path!r} with shape {shape} "
                "cannot be told from its rank. Pass `targets=model`, or "
                "`targets=find_targets(model, include=..., exclude=...)`."
            )
        specs.append(
            _Spec(variable.path, shape, (0,), variable) if is_kernel else None
        )
    return specs


def _target_specs(targets, variables):
    if isinstance(targets, keras.Model):
        targets = find_targets(targets)
    by_id = {id(t.variable): _Spec.from_target(t) for t in targets}
    specs = [by_id.pop(id(variable), None) for variable in variables]
    if by_id:
        missing = [spec.path for spec in by_id.values()]
        warnings.warn(
            f"AdamS leaves {len(missing)} targets as they are, because they "
            "are not among the variables it was built on (frozen, or of "
            f"another model): {missing[:5]}",
            stacklevel=4,
        )
    return specs


def _configured_specs(configs, variables):
    specs: list[_Spec | None] = [None] * len(variables)
    found = [
        (_places(config, variables), tuple(config["contraction_axes"]))
        for config in configs
    ]
    for config, (places, axes) in zip(configs, found):
        # Variables that cannot be told apart must all be targets.
        if not places or found.count((places, axes)) != len(places):
            index = config["index"]
            raise ValueError(
                f"The restored target {config['path']!r} of shape "
                f"{tuple(config['shape'])} must name exactly one of the "
                "variables that `AdamS` is built on"
                f"{'' if index is None else f', at position {index}'}. "
                f"Received: {len(places)} such variables. Build it on the "
                "model it was saved with, or pass new `targets`."
            )
        for place in places:
            variable = variables[place]
            specs[place] = _Spec(
                variable.path, tuple(variable.shape), axes, variable
            )
    return specs


def _places(config, variables):
    """Where among `variables` the restored target may be."""
    index, path = config["index"], config["path"]
    fitting = [
        i
        for i, v in enumerate(variables)
        if tuple(v.shape) == tuple(config["shape"])
    ]
    # A path can change when a model is rebuilt, by the name of what it was
    # built in; its place and shape among the variables do not.
    if index is not None:
        return [i for i in fitting if i == index]
    equal = [i for i in fitting if variables[i].path == path]
    return equal or [
        i
        for i in fitting
        if path.endswith(f"/{variables[i].path}")
        or variables[i].path.endswith(f"/{path}")
    ]


def _is_config(targets):
    return isinstance(targets, (list, tuple)) and all(
        isinstance(t, dict) for t in targets
    )


def _checked_targets(targets):
    if targets is None or isinstance(targets, (keras.Model, Targets)):
        return targets
    are_targets = isinstance(targets, (list, tuple)) and all(
        isinstance(t, Target) for t in targets
    )
    if targets and (are_targets or _is_config(targets)):
        return tuple(targets)
    raise ValueError(
        "`targets` must be a `keras.Model`, a non-empty list from "
        "`find_targets(model)`, or None. "
        f"Received: targets={targets!r} of type {type(targets).__name__}"
    )


def _mean_masked_magnitude(spec, n, m):
    """Mean |w| of the entries outside the mask, over a sample of columns."""
    w = np.abs(ops.convert_to_numpy(to_matrix(spec.variable, spec.axes)))
    w = w[:, :: max(1, w.size // 2**18)].astype("float32")
    groups = np.sort(w.reshape(w.shape[0] // m, m, w.shape[1]), axis=1)
    return float(groups[:, : m - n].mean()) if m > n else 0.0


def _warn_about_low_precision(specs):
    low = [
        spec.path
        for spec in specs
        if spec is not None
        and keras.backend.standardize_dtype(spec.variable.dtype)
        in ("bfloat16", "float16")
    ]
    if low:
        warnings.warn(
            f"AdamS: {len(low)} kernels are stored in 16 bits, which rounds "
            "the pull to zero away as weights get small: "
            f"{low[:3]}. Keep the variables in float32 and compute in 16 "
            'bits: load the model with dtype="mixed_bfloat16".',
            stacklevel=3,
        )


def _bias_correction(beta, step):
    """1 - beta**(step + 1), exact in float32 also where beta is near 1."""
    return -ops.expm1((step + 1) * math.log(beta)) if beta else 1.0


def _is_symbolic(variable):
    """Whether the value cannot be read now, while a graph is traced."""
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    return not tf.executing_eagerly()


def _to_float(x):
    return float(ops.convert_to_numpy(x))


def _is_number(x):
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def _check_total_steps(total_steps):
    is_int = isinstance(total_steps, (int, np.integer)) and not isinstance(
        total_steps, bool
    )
    if total_steps is not None and not (is_int and total_steps > 0):
        raise ValueError(
            "`total_steps` must be a positive int, the optimizer steps of the "
            f"whole run. Received: total_steps={total_steps!r}"
        )


def _check_positive(name, value, expected="a positive float"):
    if not (_is_number(value) and 0 < value < math.inf):
        raise ValueError(
            f"`{name}` must be {expected}. Received: {name}={value!r}"
        )


def _check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(
            f"`{name}` must be one of {choices}. Received: {name}={value!r}"
        )
