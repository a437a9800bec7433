"""Code for one backend only; imported where it is used."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keras_weightmods.backend.interface import Backend


def current() -> "Backend":
    """Return what the backend that runs does beyond `keras.ops`."""
    # Here, as exported models take what is in this folder without Keras.
    import keras

    name = keras.backend.backend()
    path = f"keras_weightmods.backend.{name}.implementation"
    return importlib.import_module(path).backend


def processes() -> Any:
    """Return the module of what the processes of a training share, or None."""
    return current().processes()
