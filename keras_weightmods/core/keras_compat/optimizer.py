"""Optimizers, and the `fit` that runs them."""

import contextlib
from typing import Any

import keras


def strategy_scope(model: Any) -> Any:
    """Return the scope of the strategy that a model was made in.

    This is for TensorFlow, where `fit` enters it by itself. Variables made
    outside of it exist once for each replica, and drift apart.
    """
    strategy = getattr(model, "distribute_strategy", None)
    return contextlib.nullcontext() if strategy is None else strategy.scope()


def optimizer_variables(optimizer: Any) -> list[Any]:
    """Return the variables that a built optimizer updates.

    Hook: a public `Optimizer.trainable_variables`.
    """
    return optimizer._trainable_variables


def check_known(optimizer: Any, variables: list[Any]) -> None:
    """Raise ValueError unless a built optimizer updates all `variables`.

    Keras checks this only in its first step, when the model has been changed.
    Hook: as in `optimizer_variables`.
    """
    optimizer._check_variables_are_known(variables)


def applied_steps(optimizer: Any) -> keras.Variable:
    """Return the count of `apply`; `iterations` counts what accumulates.

    Hook: a public count of batches beside the one of updates.
    """
    return optimizer._iterations


def given_learning_rate(optimizer: Any) -> Any:
    """Return the schedule, if there is one; `learning_rate` is its value.

    Hook: a public `Optimizer.learning_rate_schedule`.
    """
    return optimizer._learning_rate


def decays(optimizer: Any, variable: Any) -> bool:
    """Return whether an optimizer applies weight decay to a variable.

    Hook: a public `Optimizer.decays(variable)`.
    """
    return optimizer._use_weight_decay(variable)


def exclude_from_decay(optimizer: Any, keys: set[str]) -> None:
    """Exclude more variables, by `_var_key`, from weight decay.

    The public `exclude_from_weight_decay` overwrites the user's choice. Hook:
    one that adds.
    """
    optimizer._exclude_from_weight_decay = keys.union(
        getattr(optimizer, "_exclude_from_weight_decay", ())
    )
    optimizer._exclude_from_weight_decay_cache = {}


def drop_averages(optimizer: Any) -> None:
    """Remove the moving averages from a built optimizer, if it has any.

    The optimizer that wraps it takes them. Hook: a setter of `use_ema`.
    """
    averages = getattr(optimizer, "_model_variables_moving_average", None)
    if averages is not None:
        for average in averages:
            if average is not None:
                optimizer._untrack_variable(average)
        del optimizer._model_variables_moving_average


def set_optimizer(model: Any, optimizer: Any) -> None:
    """Give a compiled model another optimizer, also in what it saves.

    `compile` would reset the model's metrics. Hook: a setter of
    `Model.optimizer` that also sets what is saved.
    """
    model.optimizer = optimizer
    config = getattr(model, "_compile_config", None)
    if config is not None and "optimizer" in config.config:
        config.config["optimizer"] = optimizer
    model.train_function = None


def begin_with_epoch(model: Any, epoch: int | None) -> None:
    """Let the `fit` that is starting begin with an epoch, counted from 0.

    Keras' `BackupAndRestore` does the same: a callback has no public way to set
    `initial_epoch`.
    """
    model._initial_epoch = epoch


def hold_state(model: Any, state: Any) -> None:
    """Let `fit` on JAX put a state into the variables when it ends.

    Hook: `fit` itself keeps the last state if a step raises.
    """
    names = "trainable", "non_trainable", "optimizer", "metrics"
    model._jax_state = {
        f"{name}_variables": values for name, values in zip(names, state)
    }
    model._jax_state_synced = False
