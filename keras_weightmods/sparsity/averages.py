"""Averaged weights, projected onto the patterns of their constraints.

`Optimizer.apply` ends with a call of each constraint, which covers
`ema_overwrite_frequency`. Two places of Keras write averaged weights
afterwards and apply no constraint. Neither offers a hook that a constraint
could use: it knows neither the model nor the optimizer.
"""

import functools

import keras
import numpy as np
from keras import ops

_HOOKS_THAT_SHOW = "on_epoch_end", "on_test_begin", "on_predict_begin"
_HOOKS_THAT_HIDE = "on_epoch_begin", "on_test_end", "on_predict_end"


@functools.cache
def install_projections():
    """Extend the two places of Keras, once in a process."""
    # The common base of the optimizers of all backends; LossScaleOptimizer
    # and MultiOptimizer delegate to inner optimizers.
    optimizer = keras.optimizers.Optimizer
    callback = keras.callbacks.SwapEMAWeights
    finalize = optimizer.finalize_variable_values

    @functools.wraps(finalize)
    def finalize_and_project(self, var_list):
        finalize(self, var_list)
        _project(var_list)

    optimizer.finalize_variable_values = finalize_and_project
    for name in _HOOKS_THAT_SHOW + _HOOKS_THAT_HIDE:
        shows = name in _HOOKS_THAT_SHOW
        setattr(callback, name, _projecting(getattr(callback, name), shows))


def _projecting(hook, shows):
    """Let SwapEMAWeights show a projected average and keep the true one.

    Without it, an evaluation runs on dense weights, and a ModelCheckpoint or
    EarlyStopping beside `swap_on_epoch=True` takes them home.
    """

    @functools.wraps(hook)
    def projecting_hook(self, *args, **kwargs):
        # On JAX, reading `model` brings the state back into the variables.
        model = self.model
        averages = self.__dict__.pop("_keras_weightmods_averages", [])
        for variable, average, projection in averages:
            # Weights written since then stay.
            if np.array_equal(_numpy(variable), _numpy(projection(average))):
                variable.assign(average)
        hook(self, *args, **kwargs)
        # Keras' on_predict_end leaves the average in the model, so what was
        # put back above may still be there. The weights before the first
        # step, which no hook has averaged, are not ours to project.
        if shows or averages:
            shown = _project(model.trainable_variables)
            self._keras_weightmods_averages = shown

    return projecting_hook


def _project(variables):
    """Project the variables that keep a pattern.

    Returns:
        List of triples of such a variable, its former value in NumPy and
        its constraint.
    """
    former = []
    for variable in variables:
        constraint = getattr(variable, "constraint", None)
        if getattr(constraint, "keeps_pattern", False):
            former.append((variable, _numpy(variable), constraint))
            variable.assign(constraint(variable))
    return former


def _numpy(value):
    return ops.convert_to_numpy(value)
