"""Shows how far the training is on its way to the pattern."""

import math
from collections.abc import Iterable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_weightmods.core.wrapping_optimizer import inner_optimizer
from keras_weightmods.ops import nm
from keras_weightmods.sparsity.adam_s import AdamS
from keras_weightmods.sparsity.semi_structured_sparse import (
    SemiStructuredSparse,
)
from keras_weightmods.utils import checks


class SparsityMonitor(keras.callbacks.Callback):
    """Puts how far the kernels are in their N:M pattern into the logs.

    It adds three numbers, which the progress bar and History always show.
    `CSVLogger`, `TensorBoard` and other callbacks see them where they come
    after this one in the list:

    - `kept_share`: `S_t = sum |w * mask| / sum |w|` over the kernels, which
      goes to 1;
    - `largest_masked`: the largest `|w|` outside the masks, which goes to 0;
    - `mask_flips`: share of the mask's entries that changed, for each mask
      set since the last look.

    The masks are those that `AdamS` has set. With any other optimizer they
    are the n largest magnitudes of each group, at the time of the look, of the
    kernels that a `SemiStructuredSparse` constrains: one set by each update.

    Reading the weights synchronizes the model with the device, so they are
    read at the end of each epoch and, where asked, every `every` batches.

    Args:
        every: Int, batches between two looks within an epoch, or `None` for
            the end of epochs alone. Defaults to `None`.

    Raises:
        ValueError: If `every` is no positive int; or when training starts, if
            there is no mask or constraint to look at.

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
        adam_s = isinstance(self._optimizer(), AdamS)
        if not adam_s and not self._constrained():
            raise ValueError(
                "`SparsityMonitor` needs masks to look at: those of an `AdamS` "
                "optimizer, or kernels that a `SemiStructuredSparse` "
                "constrains. Received: a model without such kernels, compiled "
                f"with {self._optimizer()!r}"
            )

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self.every and (batch + 1) % self.every == 0 and logs is not None:
            logs.update(self.measure())

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if logs is not None:
            logs.update(self.measure())

    def measure(self) -> dict[str, float]:
        """Read the model now; return the three numbers as a dict."""
        optimizer = self._optimizer()
        masks_set = int(ops.convert_to_numpy(optimizer.iterations))
        if isinstance(optimizer, AdamS):
            state = optimizer.sparsified_state
            masked = [(v, bits.value) for v, _, bits in state]
            masks_set = -(-masks_set // optimizer.mask_every)
        else:
            found = [(v, v.constraint) for v in self._constrained()]
            masked = [
                (
                    v,
                    nm.pack_bits(
                        nm.nm_mask(v.value, c.pattern, c.axes_of(v.shape))
                    ),
                )
                for v, c in found
            ]
        share, largest = kept_share(masked)
        bits = np.concatenate([ops.convert_to_numpy(b) for _, b in masked])
        size = sum(math.prod(v.shape) for v, _ in masked)
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

    def _constrained(self) -> list[Any]:
        return [
            variable
            for variable in self.model.trainable_variables
            if isinstance(variable.constraint, SemiStructuredSparse)
        ]

    def _optimizer(self) -> Any:
        # On JAX the property brings the model up to date.
        return inner_optimizer(self.model.optimizer)


def kept_share(masked: Iterable[tuple[Any, Any]]) -> tuple[float, float]:
    """Return what masks keep, and the largest weight that they do not.

    Args:
        masked: Pairs of a variable and its mask, in bits.

    Returns:
        The share of the sum of all |w| that is within the masks, 1 where there
        is none, and the largest |w| outside of them.
    """
    total = out = largest = 0.0
    for variable, bits in masked:
        mask = nm.unpack_bits(bits, variable.shape)
        magnitude = ops.abs(ops.cast(variable.value, "float32"))
        outside = ops.where(mask, 0.0, magnitude)
        total += float(ops.convert_to_numpy(ops.sum(magnitude)))
        out += float(ops.convert_to_numpy(ops.sum(outside)))
        most = float(ops.convert_to_numpy(ops.max(outside)))
        largest = max(largest, most)
    return (1 - out / total if total else 1.0), largest
