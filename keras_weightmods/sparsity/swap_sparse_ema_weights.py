"""SwapSparseEMAWeights: moving averages that keep their N:M pattern."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_weightmods.utils import checks


class SwapSparseEMAWeights(keras.callbacks.SwapEMAWeights):
    """Swaps in averaged weights, exactly N:M where they are constrained.

    With `use_ema=True` Keras writes the moving average into the model at the
    end of `fit` and applies no constraint to it. The average of N:M kernels
    with different masks is dense. Use this callback in place of
    `keras.callbacks.SwapEMAWeights`, or add it if there is none. It projects
    every variable with a `SemiStructuredSparse` constraint whenever its average
    is in the model. This is in evaluation and prediction, after `fit`, and with
    `swap_on_epoch=True` for the callbacks behind this one. The optimizer's own
    average stays as Keras computes it.

    An exception inside `fit` skips the end of the callbacks, and leaves the
    model with the dense average. Check it with `assert_sparse`.

    Args:
        swap_on_epoch: Bool, whether the average is in the model from the end
            of an epoch to the beginning of the next. Put `ModelCheckpoint`
            and `EarlyStopping` behind this callback then. Defaults to
            `False`.

    Raises:
        ValueError: If `swap_on_epoch` is not a bool. When the weights are first
            swapped: if the optimizer has no `use_ema=True`.

    Example:

    ```python
    import keras
    import numpy as np
    import keras_weightmods as kwm

    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    kwm.SemiStructuredSparse.attach(model, "2:4")
    model.compile(keras.optimizers.Adam(0.1, use_ema=True), "mse")
    x = np.random.normal(size=(64, 8))
    model.fit(
        x, x[:, :4], epochs=2, verbose=0,
        callbacks=[kwm.SwapSparseEMAWeights()],
    )
    kwm.assert_sparse(model, "2:4")
    ```
    """

    def __init__(self, swap_on_epoch: bool = False) -> None:
        checks.check_bool("swap_on_epoch", swap_on_epoch)
        super().__init__(swap_on_epoch=swap_on_epoch)
        # Variables, their averages, and the projections of these in the model.
        self._shown: list[tuple[Any, Any, Any]] = []

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._around(super().on_epoch_begin, epoch)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._around(super().on_epoch_end, epoch, shows=True)

    def on_test_begin(self, logs: Any = None) -> None:
        self._around(super().on_test_begin, shows=True)

    def on_test_end(self, logs: Any = None) -> None:
        self._around(super().on_test_end)

    def on_predict_begin(self, logs: Any = None) -> None:
        self._around(super().on_predict_begin, shows=True)

    def on_predict_end(self, logs: Any = None) -> None:
        self._around(super().on_predict_end)

    def on_train_end(self, logs: Any = None) -> None:
        # `fit` has just written the averages into the model.
        self._around(super().on_train_end, shows=True)

    def _around(self, hook: Any, *args: Any, shows: bool = False) -> None:
        """Run a hook of Keras on true averages, then project them."""
        # On JAX the property brings the state back into the variables.
        model = self.model
        shown, self._shown = self._shown, []
        for variable, average, projected in shown:
            # Weights assigned since then stay.
            if np.array_equal(ops.convert_to_numpy(variable), projected):
                variable.assign(average)
        hook(*args)
        # A model that is dense before its first step stays dense.
        if not (shows or shown):
            return
        for variable in model.trainable_variables:
            constraint = getattr(variable, "constraint", None)
            if getattr(constraint, "keeps_pattern", False):
                average = ops.convert_to_numpy(variable)
                variable.assign(constraint(variable))
                projected = ops.convert_to_numpy(variable)
                self._shown.append((variable, average, projected))
