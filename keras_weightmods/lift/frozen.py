"""The weights of models that are frozen while their masks are trained."""

import functools
import weakref
from typing import Any

import keras

from keras_weightmods.core.wrapping_optimizer import inner_optimizer

# By model: a callback may be gone when its training was interrupted.
_FROZEN: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def freeze(model: Any, variables: Any) -> None:
    """Freeze variables of a model until `unfreeze`."""
    _FROZEN.setdefault(model, []).extend(variables)
    for variable in variables:
        variable.trainable = False


def unfreeze(model: Any) -> None:
    """Give the flags of all frozen variables of a model back."""
    frozen = _FROZEN.pop(model, [])
    for variable in frozen:
        variable.trainable = True
    if frozen and keras.backend.backend() == "tensorflow":
        # It was made for what was trained.
        model.train_function = None


def unfreeze_trained_by(optimizer: Any) -> None:
    """As `unfreeze`, of the models that an optimizer trains."""
    for reference in _FROZEN.keyrefs():
        model: Any = reference()
        if model is not None and inner_optimizer(model.optimizer) is optimizer:
            unfreeze(model)


def unfreeze_on_error(model: Any) -> None:
    """Have a running `fit` give the flags back on an error in a step.

    On JAX its weights are put into the variables only then, and Keras has the
    optimizer finalize them after it.
    """
    step = model.train_function
    is_done = step is None or hasattr(step, "unfreezes")
    if is_done or keras.backend.backend() == "jax":
        return

    @functools.wraps(step)
    def train_function(*args: Any) -> Any:
        try:
            return step(*args)
        except BaseException as error:
            # So data end on TensorFlow whose length is not known.
            ends = "StopIteration", "OutOfRangeError"
            if type(error).__name__ not in ends:
                unfreeze(model)
            raise

    marked: Any = train_function
    marked.unfreezes = True
    model.train_function = marked
