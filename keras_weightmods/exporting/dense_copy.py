"""A copy of a model without packed weights."""

from typing import Any

from keras_weightmods.core import keras_compat, seam
from keras_weightmods.core.reparameterization import slots
from keras_weightmods.saving.model import copied
from keras_weightmods.utils.progress import Progress


def packed_weights(model: Any) -> list[Any]:
    """Return the packed weights of a model, in the same order in a copy."""
    return [
        item
        for layer in keras_compat.layers_of(model)
        for _, item in sorted(slots(layer).items())
        if not item.keeps_stored
    ]


def dense_copy(model: Any, progress: Progress) -> Any:
    """Return a copy of a model with its packed weights dense.

    The model itself may be in use, in another thread as well.

    Returns:
        Pair of the copy, and a list of the `Target`s in it of what
        `packed_weights` finds in the model.
    """
    try:
        copy = copied(model)
    # What the code of a model's classes raises is not known.
    except Exception as error:
        raise ValueError(
            f"{error} Or call `kwm.unpack(model)` before the export."
        ) from error
    packed = packed_weights(copy)
    progress.total += len(packed)
    for kind in {type(item) for item in packed}:
        seam.fold(copy, kind, progress.add)
    return copy, [item.target for item in packed]
