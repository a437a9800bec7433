"""Weights that are frozen while the masks of a model are trained."""

import weakref
from typing import Any

import keras

from keras_weightmods.core import train_step
from keras_weightmods.core.restored import RestoredOnError
from keras_weightmods.core.wrapping_optimizer import inner_optimizer

# {model: its frozen variables}. They are not in the callback, which may be gone
# after an interrupted training.
_FROZEN: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def freeze(model: Any, variables: Any) -> None:
    """Freeze variables of a model until `unfreeze`."""
    _FROZEN.setdefault(model, []).extend(variables)
    _set_trainable(model, variables, False)


def unfreeze(model: Any) -> None:
    """Restore the flags of all frozen variables of a model."""
    train_step.take_off(model, "frozen weights")
    variables = _FROZEN.get(model, ())
    with RestoredOnError(*variables):
        _set_trainable(model, variables, True)
    _FROZEN.pop(model, None)


def _set_trainable(model: Any, variables: Any, flag: bool) -> None:
    for variable in variables:
        variable.trainable = flag
    if variables and keras.backend.backend() == "tensorflow":
        # The train function was made for the variables trained until now.
        model.train_function = None


def unfreeze_trained_by(optimizer: Any) -> None:
    """Call `unfreeze` for the models that an optimizer trains."""
    for reference in _FROZEN.keyrefs():
        model: Any = reference()
        if model is not None and inner_optimizer(model.optimizer) is optimizer:
            unfreeze(model)


def unfreeze_on_error(model: Any, step: Any, *args: Any) -> Any:
    """Run a step, and restore the flags if it ends with an error.

    On JAX `fit` puts the weights back into the variables only later, and Keras
    then calls `finalize_variable_values` of the optimizer.
    """
    try:
        return step(*args)
    except BaseException as error:
        # TensorFlow signals the end of data of unknown length by this error.
        ends = "StopIteration", "OutOfRangeError"
        if type(error).__name__ not in ends:
            unfreeze(model)
        raise
