"""MaskedOptimizer: any optimizer, on single entries of kernels."""

from typing import Any

import keras
from keras import ops

from keras_weightmods.core import keras_compat
from keras_weightmods.core.wrapping_optimizer import (
    WrappingOptimizer,
    warn_about_16_bits,
)
from keras_weightmods.lift.masked_state import MaskedState


@keras.saving.register_keras_serializable(package="keras_weightmods")
class MaskedOptimizer(MaskedState, WrappingOptimizer):
    """Restrict an optimizer to the masked entries of kernels.

    The wrapped optimizer sees gradients that are zero outside of the mask.
    After its step, all entries outside are what they were before, bit for bit:
    neither momentum nor weight decay moves them. The moments of an entry that
    leaves the mask fade. An entry that joins starts with its present moments,
    which are zero if it was never in the mask.

    The state is that of the wrapped optimizer, for all weights that the model
    would train without masks. It also has 4 bytes for each masked entry, its
    place. For state as small as the masks, use `SparseAdamW`.

    `PrincipalMaskCallback` wraps the optimizer of the model by itself. It
    refuses kernels with constraints, which act on whole variables. Constraints
    of variables without a mask apply after the step.

    Args:
        optimizer: The `keras.optimizers.Optimizer` to wrap. It must not be a
            `LossScaleOptimizer` or `MultiOptimizer`: put these around this one.
        name: String. Defaults to `"masked_optimizer"`.

    Raises:
        ValueError: If `optimizer` is not such an optimizer. When it is to step
            without masks.

    Example:

    ```python
    import keras
    import numpy as np
    import keras_weightmods as kwm

    model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(8)])
    model.compile(kwm.MaskedOptimizer(keras.optimizers.Lion(1e-3)), "mse")
    before = np.array(model.layers[0].kernel)
    x = np.random.normal(size=(32, 16))
    model.fit(
        x, x[:, :8], verbose=0, callbacks=[kwm.PrincipalMaskCallback(0.25)]
    )
    changed = np.array(model.layers[0].kernel) != before
    assert changed.sum() == 32
    ```
    """

    refused = (MaskedState,)

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer,
        name: str = "masked_optimizer",
    ) -> None:
        super().__init__(optimizer, name=name)

    def _create_state(self, variables: Any, known: Any) -> None:
        way_out = " Or take `SparseAdamW`, whose state is in float32."
        warn_about_16_bits(self, variables, way_out)
        if self.optimizer.built:
            # Keras built it, before the masks were known.
            keras_compat.drop_averages(self.optimizer)
        else:
            # Keras does the same in `fit`, so a checkpoint fits.
            self.optimizer.build(known)

    def _backend_update_step(self, grads: Any, variables: Any, _: Any) -> None:
        """Let the wrapped optimizer step, then restore unmasked entries."""
        grads, masked = list(grads), []
        for i, variable in enumerate(variables):
            if self._indices[self._get_variable_index(variable)] is None:
                continue
            zeros = ops.zeros_like(grads[i])
            grads[i] = self._only_masked(variable, grads[i], zeros)
            before = ops.stop_gradient(ops.convert_to_tensor(variable))
            masked.append((variable, ops.copy(before)))
        try:
            self._apply_wrapped(grads, variables)
            for variable, before in masked:
                after = ops.convert_to_tensor(variable)
                variable.assign(self._only_masked(variable, after, before))
        except BaseException:
            # In eager mode, it has already moved unmasked entries.
            for variable, before in masked:
                variable.assign(before)
            raise
