"""The base of optimizers that wrap another optimizer."""

import warnings
from typing import Any

import keras
from keras import ops

from keras_weightmods.core.restored import RestoredOnError
from keras_weightmods.utils import checks
from keras_weightmods.utils.dtypes import has_16_bits

# Settings that act around an update, not in it: they move to the wrapper.
_MOVED = (
    "use_ema",
    "ema_momentum",
    "ema_overwrite_frequency",
    "loss_scale_factor",
)


class WrappingOptimizer(keras.optimizers.Optimizer):
    """An optimizer around another one, which makes the steps.

    The wrapper has the moving averages and loss scaling, and applies
    constraints after its step. The wrapped optimizer has the learning rate,
    weight decay, clipping and accumulation. Its variables follow the wrapper's
    own.

    Subclasses implement `_backend_update_step` with `_apply_wrapped`.

    Args:
        optimizer: The `keras.optimizers.Optimizer` to wrap.
        name: String.

    Raises:
        ValueError: If `optimizer` is none, wraps another, or is of a type in
            `refused`.
    """

    refused: tuple[type, ...] = ()

    def __init__(self, optimizer: Any, name: str) -> None:
        refused = (
            WrappingOptimizer,
            keras.optimizers.LossScaleOptimizer,
            keras.optimizers.MultiOptimizer,
            *self.refused,
        )
        if not isinstance(optimizer, keras.optimizers.Optimizer) or isinstance(
            optimizer, refused
        ):
            raise checks.error(
                "optimizer",
                "a `keras.optimizers.Optimizer` that has no masks and wraps no "
                "other; a `LossScaleOptimizer` or `MultiOptimizer` goes around "
                f"the `{type(self).__name__}`",
                optimizer,
            )
        moved = {key: getattr(optimizer, key) for key in _MOVED}
        super().__init__(learning_rate=0.0, name=name, **moved)
        # Not named `inner_optimizer`, where SwapEMAWeights looks for averages.
        self.optimizer = optimizer
        with RestoredOnError(optimizer):
            for key in _MOVED:
                setattr(optimizer, key, None)

    def _apply_wrapped(self, grads: Any, variables: Any) -> None:
        """Let the wrapped optimizer step; constraints apply later, once."""
        constraints = [variable.constraint for variable in variables]

        def set_all(constraints: Any) -> None:
            for variable, constraint in zip(variables, constraints):
                variable.constraint = constraint

        try:
            set_all([None] * len(constraints))
            self.optimizer.apply(grads, variables)
            set_all(constraints)
        except BaseException:
            set_all(constraints)
            raise

    @property
    def variables(self) -> list[keras.Variable]:
        """All variables, those of the wrapped optimizer last."""
        return [*self._variables, *self.optimizer.variables]

    @property
    def learning_rate(self) -> Any:
        """The learning rate of the wrapped optimizer."""
        return self.optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate: Any) -> None:
        self.optimizer.learning_rate = learning_rate

    @property
    def iterations(self) -> Any:
        """The updates made so far by this optimizer."""
        # Not the wrapped optimizer's count, which rises before averaging.
        every = self.optimizer.gradient_accumulation_steps
        if every:
            return ops.floor_divide(self._iterations, every)
        return self._iterations

    def exclude_from_weight_decay(self, var_list=None, var_names=None):
        """Exclude variables as the wrapped optimizer does, before it is built.

        Args:
            var_list: List of `keras.Variable`s.
            var_names: List of strings, patterns of their names.
        """
        self.optimizer.exclude_from_weight_decay(var_list, var_names)

    def get_config(self) -> dict[str, Any]:
        wrapped = keras.saving.serialize_keras_object(self.optimizer)
        wrapped["config"].update({key: getattr(self, key) for key in _MOVED})
        return {"optimizer": wrapped, "name": self.name}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        optimizer = keras.saving.deserialize_keras_object(
            config["optimizer"], custom_objects=custom_objects
        )
        return cls(**{**config, "optimizer": optimizer})


def warn_about_16_bits(
    optimizer: Any, variables: Any, way_out: str = ""
) -> None:
    """Warn if weights in 16 bits lose the updates of `optimizer`.

    Keras' optimizers keep moments in the dtype of the weights, and all keep the
    averages of `use_ema` in it. Steps of the usual size are rounded away.
    """
    low = [v.path for v in variables if has_16_bits(v)]
    is_wrapping = isinstance(optimizer, WrappingOptimizer)
    if not low or not (is_wrapping or optimizer.use_ema):
        return
    what = "averages of `use_ema`"
    if is_wrapping:
        what = f"steps of `{type(optimizer.optimizer).__name__}`"
    warnings.warn(
        f"{type(optimizer).__name__}: {len(low)} variables are stored in 16 "
        f"bits, in which the {what} are rounded away: {low[:3]}. Keep them in "
        "float32 and compute in 16 bits: load the model with "
        f'dtype="mixed_bfloat16".{way_out}',
        stacklevel=3,
    )


def inner_optimizer(optimizer: Any) -> Any:
    """Return the optimizer inside of a loss-scaling wrapper, if it is one."""
    return getattr(optimizer, "inner_optimizer", optimizer)
