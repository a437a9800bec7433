"""Shows how far the training is on its way to the pattern."""

import math
from collections.abc import Iterable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_weightmods.core.targets import resolve_targets
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
    are the n largest magnitudes of each group at the time of the look, one
    set by each update: of the kernels that a `SemiStructuredSparse`
    constrains, or, where `pattern` is given, of those of `targets`.

    Reading the weights synchronizes the model with the device, so they are
    read at the end of each epoch and, where asked, every `every` batches.

    Args:
        every: Int, batches between two looks within an epoch, or `None` for
            the end of epochs alone. Defaults to `None`.
        pattern: String `"n:m"` or pair of ints, to watch how far kernels are
            in a pattern whatever they are trained with: with plain
            optimizers, or beside the masks of `AdamS`. Defaults to `None`.
        targets: With `pattern`, the kernels, as `find_targets(model)` returns
            them or in a form that its `include` takes; those that do not
            divide into groups of m are left out. Defaults to all.

    Raises:
        ValueError: If `every` is no positive int, `pattern` is malformed or
            `targets` come without one; or when training starts, if there is
            no mask, constraint or pattern to look at.

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

    def __init__(
        self,
        every: int | None = None,
        pattern: nm.Pattern | None = None,
        targets: Any = None,
    ) -> None:
        super().__init__()
        self.every = checks.check_int("every", every, 1, optional=True)
        self.pattern = None
        if pattern is not None:
            self.pattern = "{}:{}".format(*nm.parse_pattern(pattern))
        elif targets is not None:
            expected = "None where there is no `pattern` to find in them"
            raise checks.error("targets", expected, targets)
        self._targets = targets
        # Variable, pattern and contraction axes of what has no mask of AdamS.
        self._kernels: list[tuple[Any, str, tuple[int, ...]]] = []
        self._last: tuple[np.ndarray, int] | None = None

    def on_train_begin(self, logs: Any = None) -> None:
        self._last = None
        self._kernels = []
        if self._reads_adam_s():
            return
        model = self.model
        if self.pattern is None:
            self._kernels = [
                (v, v.constraint.pattern, v.constraint.axes_of(v.shape))
                for v in model.trainable_variables
                if isinstance(v.constraint, SemiStructuredSparse)
            ]
        else:
            m = nm.parse_pattern(self.pattern)[1]
            self._kernels = [
                (each.variable, self.pattern, each.contraction_axes)
                for each in resolve_targets(model, self._targets)
                if each.reason_not_nm(m) is None
            ]
        if not self._kernels:
            raise ValueError(
                "`SparsityMonitor` needs masks to look at: those of an `AdamS` "
                "optimizer, kernels that a `SemiStructuredSparse` constrains, "
                'or `pattern="2:4"` to take those of the magnitudes. Received: '
                f"pattern={self.pattern!r}, and a model compiled with "
                f"{self._optimizer()!r} that has no such kernel"
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
        updates = int(ops.convert_to_numpy(optimizer.iterations))
        if self._reads_adam_s():
            masked = masked_weights(optimizer)
            masks_set = -(-updates // optimizer.mask_every)
        else:
            masked = [
                (v, nm.pack_bits(nm.nm_mask(v.value, pattern, axes)))
                for v, pattern, axes in self._kernels
            ]
            masks_set = updates
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

    def _reads_adam_s(self) -> bool:
        return self.pattern is None and isinstance(self._optimizer(), AdamS)

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
        parts = ops.sum(magnitude), ops.sum(outside), ops.max(outside)
        one, other, most = (float(ops.convert_to_numpy(p)) for p in parts)
        total, out, largest = total + one, out + other, max(largest, most)
    return (1 - out / total if total else 1.0), largest


def masked_weights(adam_s: Any) -> list[tuple[Any, Any]]:
    """Return pairs of a variable and its mask, in bits, of a built `AdamS`."""
    return [(v, bits.value) for v, _, bits in adam_s.sparsified_state]
