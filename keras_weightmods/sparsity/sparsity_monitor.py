"""A callback that shows the progress of training into the pattern."""

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_weightmods.core.wrapping_optimizer import inner_optimizer
from keras_weightmods.sparsity.adam_s import AdamS, kept_share
from keras_weightmods.utils import checks


class SparsityMonitor(keras.callbacks.Callback):
    """Logs how far the kernels are from their N:M pattern.

    It adds three numbers, which the progress bar and History always show.
    `CSVLogger`, `TensorBoard` and other callbacks see them if they come after
    this one in the list:

    - `kept_share`: `S_t = sum |w * mask| / sum |w|` over the kernels, which
      goes to 1;
    - `largest_masked`: the largest `|w|` outside the masks, which goes to 0;
    - `mask_flips`: the share of the mask's entries that changed, for each mask
      set since the last measurement.

    The masks are those that `AdamS` has set.

    Reading the weights synchronizes the model with the device. So they are read
    at the end of each epoch and, on request, every `every` batches.

    Args:
        every: Int, batches between two measurements within an epoch, or `None`
            for the end of epochs alone. Defaults to `None`.

    Raises:
        ValueError: If `every` is not a positive int. When training starts: if
            the model is compiled with another optimizer.

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
        self._last = None
        optimizer = inner_optimizer(self.model.optimizer)
        if not isinstance(optimizer, AdamS):
            expected = "`AdamS`, whose masks `SparsityMonitor` looks at"
            raise checks.error("optimizer", expected, optimizer)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self.every and (batch + 1) % self.every == 0 and logs is not None:
            logs.update(self.measure())

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if logs is not None:
            logs.update(self.measure())

    def measure(self) -> dict[str, float]:
        """Read the model now; return the three numbers as a dict."""
        # On JAX the property updates the model.
        optimizer = inner_optimizer(self.model.optimizer)
        share, largest = kept_share(optimizer)
        masks = [bits for _, _, bits in optimizer.sparsified_state]
        bits = np.concatenate(list(map(ops.convert_to_numpy, masks)))
        steps = int(ops.convert_to_numpy(optimizer.iterations))
        masks_set = -(-steps // optimizer.mask_every)
        size = sum(math.prod(v.shape) for v in optimizer.sparsified)
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
