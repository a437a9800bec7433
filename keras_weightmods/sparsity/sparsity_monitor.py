"""Shows how far the training is on its way to the pattern."""

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_weightmods.sparsity.adam_s import AdamS
from keras_weightmods.sparsity.kept_share import kept_share
from keras_weightmods.utils import checks


class SparsityMonitor(keras.callbacks.Callback):
    """Puts the progress of `AdamS` into the logs.

    The progress bar, History, CSVLogger and TensorBoard show them then (put
    it before those in `callbacks`):

    - `kept_share`: `S_t = sum |w * mask| / sum |w|` over the sparsified
      kernels, which goes to 1;
    - `largest_masked`: the largest `|w|` outside the masks, which goes to 0;
    - `mask_flips`: share of the mask's entries that changed, for each mask
      set since the last look.

    Reading the weights synchronizes the model with the device, so they are
    read at the end of each epoch and, where asked, every `every` batches.

    Args:
        every: Int, batches between two looks within an epoch, or `None` for
            the end of epochs alone. Defaults to `None`.

    Raises:
        ValueError: If `every` is no positive int, or when training starts
            with another optimizer than `AdamS`.

    Example:

    ```python
    import keras
    import numpy as np
    import keras_weightmods as kwm

    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    model.compile(kwm.AdamS(0.05, total_steps=20, decay="relative"), "mse")
    x = np.random.normal(size=(64, 8))
    history = model.fit(
        x, x[:, :4], batch_size=16, epochs=5, verbose=0,
        callbacks=[kwm.SparsityMonitor()],
    )
    assert history.history["kept_share"][-1] > 0.99
    ```
    """

    def __init__(self, every: int | None = None) -> None:
        super().__init__()
        self.every = checks.check_int("every", every, 1, optional=True)
        self._last: tuple[np.ndarray, int] | None = None

    def on_train_begin(self, logs: Any = None) -> None:
        if not isinstance(self._adam_s(), AdamS):
            raise ValueError(
                "`SparsityMonitor` reads the masks of an `AdamS` optimizer. "
                f"Received: a model compiled with {self._adam_s()!r}"
            )
        self._last = None

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self.every and (batch + 1) % self.every == 0 and logs is not None:
            logs.update(self.measure())

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if logs is not None:
            logs.update(self.measure())

    def measure(self) -> dict[str, float]:
        """Read the model now; return the three numbers as a dict."""
        optimizer = self._adam_s()
        share, largest = kept_share(optimizer)
        bits = np.concatenate(
            [
                ops.convert_to_numpy(packed.value)
                for _, _, packed in optimizer.sparsified_state
            ]
        )
        size = sum(math.prod(v.shape) for v in optimizer.sparsified)
        steps = int(ops.convert_to_numpy(optimizer.iterations))
        masks_set = -(-steps // optimizer.mask_every)
        flips = 0.0
        if self._last is not None:
            last_bits, last_set = self._last
            changed = np.unpackbits(bits ^ last_bits).sum()
            flips = float(changed) / size / max(1, masks_set - last_set)
        self._last = (bits, masks_set)
        return {
            "kept_share": share,
            "largest_masked": largest,
            "mask_flips": flips,
        }

    def _adam_s(self) -> Any:
        # On JAX the property brings the model up to date.
        optimizer = self.model.optimizer
        return getattr(optimizer, "inner_optimizer", optimizer)
