"""Shows how far the training is on its way to the pattern."""

import math

import keras
import numpy as np
from keras import ops

from keras_weightmods.ops.nm import unpack_bits
from keras_weightmods.sparsity.adam_s import AdamS


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

    def __init__(self, every=None):
        super().__init__()
        if every is not None and (type(every) is not int or every < 1):
            raise ValueError(
                "`every` must be a positive int, the batches between two "
                f"looks, or None. Received: every={every!r}"
            )
        self.every = every
        self._last_bits = None

    def on_train_begin(self, logs=None):
        if not isinstance(self._adam_s, AdamS):
            raise ValueError(
                "`SparsityMonitor` reads the masks of an `AdamS` optimizer. "
                f"Received: a model compiled with {self._adam_s!r}"
            )
        self._last_bits = None

    def on_train_batch_end(self, batch, logs=None):
        if self.every and (batch + 1) % self.every == 0 and logs is not None:
            logs.update(self.measure())

    def on_epoch_end(self, epoch, logs=None):
        if logs is not None:
            logs.update(self.measure())

    def measure(self):
        """Reads the model now; returns the three numbers as a dict."""
        # The property brings the model up to date, on JAX.
        optimizer = self.model.optimizer
        optimizer = getattr(optimizer, "inner_optimizer", optimizer)
        total = kept = largest = 0.0
        all_bits = []
        for variable, spec, bits in optimizer.sparsified_state:
            magnitude = ops.abs(ops.cast(variable.value, "float32"))
            mask = unpack_bits(bits.value, spec.shape)
            masked = ops.where(mask, 0.0, magnitude)
            whole = _to_float(ops.sum(magnitude))
            total += whole
            kept += whole - _to_float(ops.sum(masked))
            largest = max(largest, _to_float(ops.max(masked)))
            all_bits.append(ops.convert_to_numpy(bits.value))
        bits = np.concatenate(all_bits)
        size = sum(math.prod(v.shape) for v in optimizer.sparsified)
        refreshes = -(
            -int(ops.convert_to_numpy(optimizer.iterations))
            // optimizer.mask_every
        )
        flips = 0.0
        if self._last_bits is not None:
            changed = np.unpackbits(bits ^ self._last_bits[0]).sum()
            since = max(1, refreshes - self._last_bits[1])
            flips = float(changed) / size / since
        self._last_bits = (bits, refreshes)
        return {
            "kept_share": kept / total if total else 1.0,
            "largest_masked": largest,
            "mask_flips": flips,
        }

    @property
    def _adam_s(self):
        # `_model`, since the property would synchronize the state for JAX.
        optimizer = self._model.optimizer
        return getattr(optimizer, "inner_optimizer", optimizer)


def _to_float(x):
    return float(ops.convert_to_numpy(x))
