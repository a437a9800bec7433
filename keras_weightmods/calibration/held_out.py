"""How far a changed model is from the original, on rows held out."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_weightmods.calibration import inputs as calibration
from keras_weightmods.calibration.block_reconstruction import is_float
from keras_weightmods.core import keras_compat
from keras_weightmods.core.head import find_head

# The most logits held at once.
_LOGITS = 2**24


class HeldOut:
    """Measure how far changes of its weights move the outputs of a model.

    The measure is `|Y' - Y|^2 / |Y|^2`: Y are the outputs of the model when
    this is made, Y' those when it is called. For a language model it is the
    mean of KL(Y || Y') over positions. Like the text, this does not change with
    a constant added to all logits. With a large vocabulary only some positions
    are measured, far apart.

    Args:
        model: A built Keras model or layer.
        batches: List of pairs (inputs, sample weights or None).
    """

    def __init__(self, model: Any, batches: Any) -> None:
        self._batches = batches
        self._head = find_head(model)
        body = self._head.body if self._head else model
        self._call = keras_compat.graph_call(body)
        self._before = self._outputs()

    def __call__(self) -> float:
        """Return the measure; NaN where no position counts."""
        change = size = 0.0
        for pair in zip(self._outputs(), self._before):
            y, before = (ops.cast(each, "float32") for each in pair)
            if self._head:
                y, before = map(ops.log_softmax, (y, before))
                change += float(ops.sum(ops.exp(before) * (before - y)))
                size += len(before)
            else:
                change += float(ops.sum(ops.square(y - before)))
                size += float(ops.sum(ops.square(before)))
        return change / size if size else float("nan")

    def _outputs(self) -> list[Any]:
        """Return the outputs of each batch, a row for each position."""
        found = []
        with calibration.eager_forward():
            for x, weights in self._batches:
                x = keras.tree.map_structure(ops.convert_to_tensor, x)
                used = calibration.used_positions(weights)
                for y in keras.tree.flatten(self._call(x)):
                    if not is_float(y):
                        continue
                    mask = calibration.mask_of(used, tuple(y.shape[:-1]))
                    places = np.flatnonzero(mask)
                    if self._head:
                        share = _LOGITS // self._head.classes
                        most = max(1, share // len(self._batches))
                        places = places[:: -(-len(places) // most) or 1]
                    y = ops.reshape(y, (-1, y.shape[-1]))
                    y = ops.take(y, places.astype("int32"), axis=0)
                    if self._head:
                        y = self._head(y[None])[0]
                    found.append(y)
        return found
