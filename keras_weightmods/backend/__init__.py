"""Code for one backend only; imported where it is used."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from keras_weightmods.backend.interface import Backend


def current() -> "Backend":
    """Return what the current backend offers beyond `keras.ops`."""
    # Imported here: exported models use this folder without Keras.
    import keras

    name = keras.backend.backend()
    path = f"keras_weightmods.backend.{name}.implementation"
    return importlib.import_module(path).backend


def processes() -> Any:
    """Return the module for what training processes share, or None."""
    return current().processes()


def whole(value: Any) -> Any:
    """Return a variable, tensor or array as a NumPy array.

    All processes must call it, because each may hold a part. On torch it may
    share the memory of a variable.
    """
    import keras

    group = processes()
    if group is not None:
        return group.whole(keras.ops.convert_to_tensor(value))
    if isinstance(value, keras.Variable):
        # Keras copies a variable twice, through float32 for bfloat16.
        # On TensorFlow a variable of several devices is no array.
        return current().array_of(keras.ops.convert_to_tensor(value))
    return keras.ops.convert_to_numpy(value)
