"""ONNX files by torch, with packed weights as ONNX Runtime takes them."""

import warnings
from collections.abc import Callable
from typing import Any

from keras_weightmods import backend
from keras_weightmods.core import seam
from keras_weightmods.exporting.dense_copy import dense_copy, packed_weights
from keras_weightmods.utils import checks
from keras_weightmods.utils.progress import Progress


def writer(
    model: Any,
    input_signature: Any = None,
    activations: str | None = None,
    **kwargs: Any,
) -> Callable[[str, Progress], None]:
    """Return a function that writes a model, packed or not, to a path.

    Args:
        model: A `keras.Model`, on torch.
        input_signature: List of a structure of `keras.InputSpec` for each
            argument of the model.
        activations: String, what the runtime multiplies integers by. Defaults
            to what they were packed with.
        **kwargs: Of `torch.onnx.export`.

    Raises:
        ValueError: If an argument is not as above.
    """
    checks.check_choice("activations", activations, (None, "float32", "int8"))
    if input_signature is None:
        raise ValueError(
            "A model without symbolic inputs needs `input_signature=[...]`, a "
            "`keras.InputSpec` with a shape and a type for each of its "
            f"arguments. Received: {model.name!r}"
        )

    def write(path: str, progress: Progress) -> None:
        packed, copy, targets = packed_weights(model), model, []
        if packed:
            copy, targets = dense_copy(model, progress)
        items = [
            item.for_onnx(target, activations or item.activations)
            for item, target in zip(packed, targets, strict=True)
        ]
        seam.attach(copy, [item for item in items if item is not None])
        if None in items:
            warnings.warn(
                f"{items.count(None)} packed weights hold no integers and are "
                "exported in dense form.",
                # The line that calls `export`.
                stacklevel=3,
            )
        backend.current().onnx().write(copy, input_signature, path, **kwargs)

    return write
