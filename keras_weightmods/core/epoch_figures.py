"""Figures of a callback in the logs of each epoch, for all other callbacks."""

from typing import Any

import keras

from keras_weightmods.core import keras_compat


class EpochFigures(keras.callbacks.Callback):
    """A callback that puts figures into the logs of each epoch.

    `fit` makes the logs of an epoch and gives them to one callback after
    another: what one of them adds is seen by those behind it alone. Here the
    figures are in the logs when `fit` makes them, so that `CSVLogger` and
    others find them in any order. Subclasses implement `figures`.
    """

    _is_open = False
    _history: Any = None

    def figures(self) -> dict[str, float]:
        """Return the figures of the epoch that ends."""
        raise NotImplementedError

    def on_train_begin(self, logs: Any = None) -> None:
        # `fit` makes one each time.
        self._history = getattr(self._model, "history", None)
        keras_compat.add_to_epoch_logs(self._model, self._take)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._is_open = True

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        # For a loop that makes its logs in another way.
        if logs is not None:
            logs.update(self._take())

    def on_train_end(self, logs: Any = None) -> None:
        keras_compat.leave_epoch_logs(self._model, self._take)

    def _take(self) -> dict[str, float]:
        """Return the figures once an epoch: `evaluate` makes logs as well."""
        if getattr(self._model, "history", None) is not self._history:
            # Left here by a `fit` that was interrupted.
            self._is_open = False
            keras_compat.leave_epoch_logs(self._model, self._take)
        if not self._is_open:
            return {}
        self._is_open = False
        return self.figures()
