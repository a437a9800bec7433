"""The optimizer of a model, which takes masks or is replaced by one."""

from typing import Any

import keras

from keras_weightmods.core import keras_compat
from keras_weightmods.lift.masked_state import MaskedState


def without_loss_scaling(optimizer: Any) -> Any:
    """Return an optimizer without the loss scaling around it."""
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        return optimizer.inner_optimizer
    return optimizer


def check_optimizer(optimizer: Any, variables: Any, specs: Any) -> None:
    """Raise ValueError where the optimizer cannot train these variables."""
    if isinstance(optimizer, keras.optimizers.MultiOptimizer):
        raise ValueError(
            "`PrincipalMaskCallback` works with one optimizer. Received: a "
            "model compiled with a `MultiOptimizer`"
        )
    if not optimizer.built:
        return
    if not isinstance(optimizer, MaskedState):
        keras_compat.check_known(optimizer, variables)
        return
    trained = keras_compat.optimizer_variables(optimizer)
    received = {id(v): s.size for v, s in zip(trained, optimizer.specs)}
    expected = {id(v): s.size for v, s in zip(variables, specs)}
    if expected != received:
        entries, known = (
            f"{sum(filter(None, sizes.values()))} entries of {len(sizes)}"
            for sizes in (expected, received)
        )
        raise ValueError(
            "The model's optimizer has masks of other kernels or sizes: "
            f"{known} variables. Received: a `PrincipalMaskCallback` for "
            f"{entries} variables. Compile the model with a new optimizer."
        )


def install(model: Any, optimizer: Any, variables: Any) -> None:
    """Make an optimizer with masks the model's, for these variables."""
    outer = model.optimizer
    if isinstance(outer, keras.optimizers.LossScaleOptimizer):
        # That one was built for all variables.
        optimizer = keras.optimizers.LossScaleOptimizer(
            optimizer,
            initial_scale=outer.initial_scale,
            dynamic_growth_steps=outer.dynamic_growth_steps,
            name=outer.name,
        )
        optimizer.build(variables)
    keras_compat.set_optimizer(model, optimizer)
