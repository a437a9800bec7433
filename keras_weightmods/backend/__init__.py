"""Code for one backend only; imported where it is used."""

import importlib
from typing import Any


def backend_module(name: str) -> Any:
    """Return the module `name` of the folder of the backend that runs.

    Args:
        name: String, such as `"compand"`, a module in the folder of every
            backend that may ask for it.
    """
    # Here, as exported models take what is in this folder without Keras.
    import keras

    return importlib.import_module(
        f"keras_weightmods.backend.{keras.backend.backend()}.{name}"
    )


def processes() -> Any:
    """Return the module of what the processes of a training share.

    None where there is one process, as on all backends but JAX.
    """
    import keras

    if keras.backend.backend() != "jax":
        return None
    module = backend_module("processes")
    return module if module.count() > 1 else None
