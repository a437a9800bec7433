"""AdamS: Adam with a pull that drives weights into an N:M pattern."""

import functools
import math
import warnings
from collections.abc import Iterable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_weightmods import backend
from keras_weightmods.calibration.walk import check_finite
from keras_weightmods.core import keras_compat
from keras_weightmods.core.restored import RestoredOnError
from keras_weightmods.core.wrapping_optimizer import warn_about_16_bits
from keras_weightmods.ops import nm
from keras_weightmods.sparsity import adam_s_build, adam_s_update
from keras_weightmods.sparsity.report import ChangeReport
from keras_weightmods.utils import checks, dtypes
from keras_weightmods.utils.matrix import contraction_size

_DECAYS = "published", "relative"
_CRITERIA = "magnitude", "wanda"
_MOST = 2**31 - 1
# A prune of less than this share of the sum of all |w| changes almost nothing.
_NO_CUT = 1e-3
_SETTINGS = (
    *("total_steps", "pattern", "l1", "l1_scale", "ramp", "decay", "criterion"),
    *("mask_every", "beta_1", "beta_2", "epsilon"),
)


@keras.saving.register_keras_serializable(package="keras_weightmods")
class AdamS(keras.optimizers.Optimizer):
    r"""Adam that trains kernels into an N:M sparse pattern.

    Implements algorithm 1 of CAST (Continuous Adaptive Sparse Trainer, arXiv
    2509.25996, equations 6-8). The forward pass stays dense; a mask only
    decides which weights are pulled to zero. For a sparsified kernel `w`, at
    step `t = 0, 1, ..., total_steps - 1` with gradient `g`:

    - every `mask_every` steps, before the update, the mask is set: True for the
      `n` largest magnitudes in each group of `m` along the contraction axes;
    - `mu = beta_1 * mu + (1 - beta_1) * g`;
    - `a = min(1, t / (ramp * total_steps))`;
    - `mixed = mu` where kept, `(1 - a) * mu + a * l1 * sign(w)` elsewhere;
    - `v = beta_2 * v + (1 - beta_2) * mixed**2`;
    - `w -= lr * (mixed / (1 - beta_1**(t + 1)))
      / (sqrt(v / (1 - beta_2**(t + 1))) + epsilon)`.

    The paper computes `v` of a sparsified kernel from `mixed`, for kept weights
    too. All other variables take the steps of `keras.optimizers.Adam`, with `v`
    of the gradient. The state is Adam's and one bit for each sparsified weight.
    Weights stored in 16 bits (a model of dtype `"bfloat16"`) have state in
    float32, which includes each weight before it was rounded: 12 bytes a
    weight.

    With `decay="published"` a masked weight travels at most `sum(lr * a)` over
    the run. A short run cannot bring it to zero, and the optimizer warns when
    it is built. With `decay="relative"` the pull is scaled to arrive. A masked
    weight then has `mixed = (1 - a) * mu`. After the step it is multiplied by
    `(1 - a_next) / (1 - a)`, where `a_next` is the ramp one step on. A weight
    that is masked from the start shrinks linearly, whatever the learning rate,
    and is exactly zero when the ramp is done.

    After the last step prune with the last mask: call `AdamS.prune()`, or train
    through `CAST`, whose `finalize()` does it.

    Args:
        learning_rate: A float, a
            `keras.optimizers.schedules.LearningRateSchedule`, or a callable
            without arguments. It should reach about zero at the end, since
            masked weights are left at about the last rate. Sparsified kernels
            take `v` from `mixed`, not from `g`, so their steps are up to 4
            times Adam's: use about a quarter of Adam's rate.
            Defaults to `1e-4`.
        total_steps: Int, the optimizer steps of the whole run. `CAST.fit`
            fills it in; elsewhere it is required when the optimizer is built.
            Steps past it keep the ramp at 1.
        pattern: String `"n:m"` or pair of ints: n weights kept of every m.
            Defaults to `"2:4"`.
        targets: Which kernels are sparsified, along which axes: a
            `keras.Model` or layer, `Targets` or a list of `Target` from
            `find_targets`, or `None` to take the variables named `kernel` of
            rank 2 (contraction axis 0).
            Kernels whose contraction size is no multiple of `m` are skipped,
            with a warning. Defaults to `None`.
        l1: The pull lambda: a float, or `"auto"` for `l1_scale` times the RMS
            gradient of each kernel over the first 10 steps. Used by
            `decay="published"` only. Defaults to `"auto"`.
        l1_scale: Float, the factor of `l1="auto"`. Defaults to `0.5`.
        ramp: Float in [0, 1], the share of the run in which `a` reaches 1. With
            0, for `decay="relative"` only, masked weights are zero from the
            first step on. Zeros rank last, so the mask stays: this trains a
            model that is already sparse under its fixed mask. Defaults to
            `1.0`.
        decay: `"published"` or `"relative"`. Defaults to `"published"`.
        criterion: How to rank the weights of a group: `"magnitude"` by `|w|`,
            or `"wanda"` by `|w|` times the importance of its input. Set the
            importance with `set_importance`; Wanda's score takes the norm of
            that input. Defaults to `"magnitude"`.
        mask_every: Int, steps between two masks. Defaults to `10`.
        beta_1: Float. Defaults to `0.9`.
        beta_2: Float. Defaults to `0.999`.
        epsilon: Float, added to the square root: as in the formula above,
            and as in `keras.optimizers.Adam` for all other variables.
            Defaults to `1e-8`.
        weight_decay: Float or `None`, as in `keras.optimizers.AdamW`.
        name: String. Defaults to `"adam_s"`.
        **kwargs: `clipnorm`, `clipvalue`, `global_clipnorm`, `use_ema`,
            `ema_momentum`, `ema_overwrite_frequency`, `loss_scale_factor`
            and `gradient_accumulation_steps`, as in
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
        pattern: nm.Pattern = "2:4",
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
        checks.check_schedule("learning_rate", learning_rate)
        super().__init__(learning_rate=learning_rate, name=name, **kwargs)
        self.total_steps = total_steps
        self.n, self.m = nm.parse_pattern(pattern)
        self.pattern = f"{self.n}:{self.m}"
        targets = adam_s_build.check_targets(targets)
        # A closure, because Keras would track a model in an attribute.
        self._get_targets = lambda: targets
        is_auto = isinstance(l1, str) and l1 == "auto"
        self.l1 = l1 if is_auto else checks.check_float("l1", l1, above=0)
        self.l1_scale = checks.check_float("l1_scale", l1_scale, above=0)
        self.decay = checks.check_choice("decay", decay, _DECAYS)
        self.ramp = checks.check_float("ramp", ramp, 0, 1)
        if not ramp and decay == "published":
            raise checks.error("ramp", 'above 0 with decay="published"', ramp)
        self.criterion = checks.check_choice("criterion", criterion, _CRITERIA)
        self.mask_every = checks.check_int("mask_every", mask_every, 1, _MOST)
        self.beta_1 = checks.check_float("beta_1", beta_1, 0, below=1)
        self.beta_2 = checks.check_float("beta_2", beta_2, 0, below=1)
        self.epsilon = checks.check_float("epsilon", epsilon, above=0)

    @property
    def total_steps(self) -> Any:
        """The optimizer steps of the whole run, or None if not yet known.

        A compiled train step of a model holds it: clear that one too.
        """
        return self._total_steps

    @total_steps.setter
    def total_steps(self, total_steps: Any) -> None:
        self._total_steps = checks.check_int(
            "total_steps", total_steps, 1, _MOST, optional=True
        )
        # On TensorFlow it is a constant of the compiled update.
        self._compiled_update: Any = None

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
            ops.convert_to_numpy(nm.unpack_bits(bits.value, variable.shape))
            for variable, _, bits in self.sparsified_state
        ]

    @property
    def sparsified_state(self) -> list[tuple[Any, tuple[int, ...], Any]]:
        """Triples (variable, contraction axes, packed mask), in order."""
        if not self.built:
            raise ValueError(
                "The masks of `AdamS` are there once it is built. Train a "
                "step, or call `optimizer.build(model.trainable_variables)`."
            )
        variables = keras_compat.optimizer_variables(self)
        rows = zip(variables, self._axes, self._states)
        return [(v, axes, own["mask"]) for v, axes, own in rows if axes]

    def use_targets(self, targets: Any) -> None:
        """Set `targets` where none were given; only before `build`."""
        if self._get_targets() is None and not self.built:
            targets = adam_s_build.check_targets(targets)
            self._get_targets = lambda: targets

    def build(self, variables: Iterable[Any]) -> None:
        """Create the state: two moments a variable, one bit a weight."""
        if self.built:
            return
        variables = list(variables)
        if self.total_steps is None:
            raise ValueError(
                "`AdamS` needs `total_steps`, for its ramp. Pass `AdamS(..., "
                "total_steps=steps_per_epoch * epochs)`, divided by "
                "`gradient_accumulation_steps` if there are any, or train "
                "through `CAST`, whose `fit` fills it in. Received: "
                "total_steps=None"
            )
        axes = adam_s_build.find_axes(self._get_targets(), variables, self.m)
        found = [pair for pair in zip(variables, axes) if pair[1]]
        warn_about_16_bits(self, variables)
        if self.decay == "published":
            # On TensorFlow `fit` builds it while it traces a step.
            with backend.current().outside_trace():
                adam_s_build.warn_about_travel(self, found)
        with RestoredOnError(self):
            super().build(variables)
            self._axes = axes
            self._states = list(map(self._new_state, variables, axes))

    def _new_state(self, variable: Any, axes: Any) -> dict[str, Any]:
        """What the update keeps of a variable, by name."""
        state: dict[str, Any] = {}

        def add(
            name: str, shape: Any, dtype: str, init: str, layout: Any = None
        ) -> None:
            path = f"{variable.path.replace('/', '_')}_{name}"
            state[name] = self.add_variable(
                shape, init, dtype, layout=layout, name=path
            )

        names = ["momentum", "velocity"]
        if dtypes.has_16_bits(variable):
            # In 16 bits, rounding would cancel the steps and the moments.
            layout = keras_compat.layout_of(variable)
            for name in (*names, "master"):
                add(name, variable.shape, "float32", "zeros", layout)
        else:
            moments = self.add_optimizer_variables([variable], names)
            state |= {name: own for name, (own,) in zip(names, moments)}
        if axes is None:
            return state

        size = nm.packed_size(math.prod(variable.shape))
        add("mask", (size,), "uint8", "zeros")
        if self.measures_gradients:
            add("gradient_square", (), "float32", "zeros")
        if self.criterion == "wanda":
            size = contraction_size(variable.shape, axes)
            add("importance", (size,), "float32", "ones")
        return state

    @property
    def measures_gradients(self) -> bool:
        """Whether the pull is derived from the gradients of the first steps."""
        return self.decay == "published" and self.l1 == "auto"

    def _apply_weight_decay(self, variables: Any) -> None:
        """Do nothing: the update includes the decay, in the same pass.

        Keras decays weights before the update, so it would write each and read
        it again.
        """

    def _decay_rate_of(self, variable: Any) -> Any:
        decays = self.weight_decay and keras_compat.decays(self, variable)
        return self.weight_decay if decays else None

    def _backend_update_step(
        self, grads: Any, trainable_variables: Any, learning_rate: Any
    ) -> None:
        update = super()._backend_update_step
        in_place = backend.current().in_place()
        if in_place is not None:
            update = functools.partial(in_place.adam_s, self, adam_s_update)
        update(grads, trainable_variables, learning_rate)

    def update_step(
        self, gradient: Any, variable: Any, learning_rate: Any
    ) -> None:
        """Update one variable and its state."""
        if self._compiled_update is None:
            update = functools.partial(adam_s_update.updated, self)
            self._compiled_update = backend.current().fused(update)
        index = self._get_variable_index(variable)
        state = {"weight": variable, **self._states[index]}
        values = self._compiled_update(
            {name: ops.convert_to_tensor(v) for name, v in state.items()},
            gradient,
            ops.cast(learning_rate, "float32"),
            ops.cast(self.iterations, "float32"),
            self._axes[index],
            self._decay_rate_of(variable),
        )
        for name, value in values.items():
            self.assign(state[name], value)

    def prune(self) -> ChangeReport:
        """Set the masked weights of the built variables to zero.

        Uses the last mask, as CAST does at the end of training. Call it once
        the training is done. A warning says how much of the weights it cuts, if
        they are not near zero yet. With loss scaling (`mixed_float16`) the
        model's optimizer is a `LossScaleOptimizer` around this one. Call
        `model.optimizer.inner_optimizer.prune()` then.

        Returns:
            A `ChangeReport`; its keys count the variables of the optimizer.

        Raises:
            ValueError: If there is no mask because no step was taken yet, or
                the training gave NaN. The weights are unchanged then.
        """
        state = self.sparsified_state
        if not int(ops.convert_to_numpy(self.iterations)):
            raise ValueError(
                "`AdamS.prune()` needs the mask of a training run. Received: "
                "an optimizer that has taken no step. Call it after `fit`."
            )
        check_finite(
            self.sparsified,
            "The training diverged: load a checkpoint or the weights again, "
            "and train with a lower learning rate or `global_clipnorm`, and "
            "finite data.",
        )
        self._warn_about_a_cut()
        own = [s["importance"] for s in self._states if "importance" in s]
        if own and all(np.all(ops.convert_to_numpy(v) == 1) for v in own):
            warnings.warn(
                'AdamS: with criterion="wanda" the masks were ranked by '
                "magnitude, as the importance of all inputs is 1. Call "
                "`set_importance` before the training, or train through "
                "`CAST`, which measures it.",
                stacklevel=2,
            )
        with RestoredOnError(values=self.sparsified):
            for variable, _, bits in state:
                value = ops.convert_to_tensor(variable)
                mask = nm.unpack_bits(bits.value, variable.shape)
                variable.assign(ops.where(mask, value, ops.zeros_like(value)))
        return ChangeReport.of(
            f"Pruned to {self.pattern}",
            keras_compat.optimizer_variables(self),
            self.sparsified,
        )

    def _warn_about_a_cut(self) -> None:
        taken = int(ops.convert_to_numpy(self.iterations))
        share, largest = kept_share(self)
        if 1 - share < _NO_CUT:
            return
        way_out = (
            'Use `decay="relative"`, a learning rate that ends at zero, and no '
            "`use_ema`, whose averages are of earlier weights."
        )
        if taken < self.total_steps:
            way_out = (
                "Go on to the end by `fit`, with the same `epochs`, and "
                "`initial_epoch` where it stopped. For a shorter run begin "
                "anew, with its `total_steps` (`CAST`: its `epochs`), which "
                "are updates: batches divided by `gradient_accumulation_steps`."
            )
        warnings.warn(
            "AdamS: this cuts weights that the training has not brought to "
            f"zero, after {taken} of {self.total_steps} steps: {1 - share:.1%} "
            f"of the sum of all |w|, the largest being {largest:.2g}. "
            f"{way_out}",
            stacklevel=3,
        )

    def set_importance(self, importance: Any) -> None:
        """Set the importance of the inputs, for `criterion="wanda"`.

        Args:
            importance: A list with one array for each of `sparsified`, of shape
                `(K,)`, where K is the size of its flattened contraction axes.
                Entries must be finite and not negative. The entries of a kernel
                must not all be 0, which ranks nothing.

        Raises:
            ValueError: If the list does not fit, or the optimizer was made
                with another criterion.
        """
        if self.criterion != "wanda" or not self.built:
            raise ValueError(
                '`set_importance` needs a built `AdamS(criterion="wanda")`. '
                "Call `optimizer.build(model.trainable_variables)` first. "
                f"Received: criterion={self.criterion!r}, built={self.built}"
            )
        variables = [s["importance"] for s in self._states if "mask" in s]
        shapes = [tuple(v.shape) for v in variables]
        is_list = isinstance(importance, (list, tuple))
        given = importance if is_list else ()
        arrays = [checks.check_array("importance", a, "float32") for a in given]
        if shapes != [array.shape for array in arrays] or not all(
            np.all((array >= 0) & np.isfinite(array)) and array.any()
            for array in arrays
        ):
            expected = (
                "a list of finite arrays, >= 0 and none of them all 0, of "
                f"shapes {shapes}"
            )
            raise checks.error("importance", expected, importance)
        with RestoredOnError(values=variables):
            for variable, array in zip(variables, arrays):
                variable.assign(array)

    def load_own_variables(self, store: Any) -> None:
        """Restore the state; check all of it before writing any.

        An optimizer that was saved unbuilt restores nothing, with Keras'
        warning.
        """
        stored = {key: np.shape(store[key]) for key in list(store.keys())}
        own = {str(i): tuple(v.shape) for i, v in enumerate(self.variables)}
        # Before it is built it holds the count of steps and the learning rate,
        # unless that is a schedule.
        unbuilt = 1 + isinstance(self._learning_rate, keras.Variable)
        if self.built and stored != own and len(stored) != unbuilt:
            rows = zip(self.variables, own.items())
            misfits = [v.path for v, item in rows if item not in stored.items()]
            raise ValueError(
                "The saved state does not fit this `AdamS`; nothing was "
                "restored. Use the model, `targets`, `pattern`, `l1`, `decay` "
                "and `criterion` that it was saved with. Received: "
                f"{len(stored)} arrays for {len(own)}, of which these have "
                f"none of their shape: {misfits[:5]}"
            )
        super().load_own_variables(store)

    def get_config(self) -> dict[str, Any]:
        targets = self._get_targets()
        if self.built:
            targets = [
                adam_s_build.target_config(v, axes, self._get_variable_index(v))
                for v, axes, _ in self.sparsified_state
            ]
        return {
            **super().get_config(),
            **{name: getattr(self, name) for name in _SETTINGS},
            "targets": adam_s_build.targets_config(targets),
        }


def kept_share(adam_s: AdamS) -> tuple[float, float]:
    """Return the share of the sum of |w| in the masks, and the largest rest.

    The share is 1 if the sum is 0. The rest is |w| outside the masks.
    """
    total = out = largest = 0.0
    for variable, _, bits in adam_s.sparsified_state:
        mask = nm.unpack_bits(bits.value, variable.shape)
        magnitude = ops.abs(ops.cast(variable.value, "float32"))
        outside = ops.where(mask, 0.0, magnitude)
        total += float(ops.convert_to_numpy(ops.sum(magnitude)))
        out += float(ops.convert_to_numpy(ops.sum(outside)))
        most = float(ops.convert_to_numpy(ops.max(outside)))
        largest = max(largest, most)
    return (1 - out / total if total else 1.0), largest
