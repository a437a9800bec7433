"""The weights of models that are frozen while their masks are trained."""

import weakref
from typing import Any

import keras

from keras_weightmods.core import train_step
from keras_weightmods.core.restored import RestoredOnError
from keras_weightmods.core.wrapping_optimizer import inner_optimizer

# By model: a callback may be gone when its training was interrupted.
_FROZEN: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def freeze(model: Any, variables: Any) -> None:
    """Freeze variables of a model until `unfreeze`."""
    _FROZEN.setdefault(model, []).extend(variables)
    _set_trainable(model, variables, False)


def unfreeze(model: Any) -> None:
    """Give the flags of all frozen variables of a model back."""
    train_step.take_off(model, "frozen weights")
    variables = _FROZEN.get(model, ())
    with RestoredOnError(*variables):
        _set_trainable(model, variables, True)
    _FROZEN.pop(model, None)


def _set_trainable(model: Any, variables: Any, flag: bool) -> None:
    for variable in variables:
        variable.trainable = flag
    if variables and keras.backend.backend() == "tensorflow":
        # It was made for what was trained.
        model.train_function = None


def unfreeze_trained_by(optimizer: Any) -> None:
    """As `unfreeze`, of the models that an optimizer trains."""
    for reference in _FROZEN.keyrefs():
        model: Any = reference()
        if model is not None and inner_optimizer(model.optimizer) is optimizer:
            unfreeze(model)


def unfreeze_on_error(model: Any, step: Any, *args: Any) -> Any:
    """Run a step, and give the flags back when it ends with an error.

    On JAX `fit` puts the weights back into the variables only after that, and
    Keras then calls `finalize_variable_values` of the optimizer.
    """
    try:
        return step(*args)
    except BaseException as error:
        # TensorFlow ends data of unknown length in this way.
        ends = "StopIteration", "OutOfRangeError"
        if type(error).__name__ not in ends:
            unfreeze(model)
        raise
