"""Changes to a Keras model's weights, on JAX, TensorFlow and torch.

To import this package loads neither Keras nor a backend. All public names are
loaded with Keras: once it has been imported, by this package when the first of
them is used, or by anyone else. Keras then finds the classes that are
registered with it.

What exported models need is there as soon as TensorFlow or torch is, see
`exported.py`.
"""

import sys

import lazy_loader

from keras_weightmods import exported
from keras_weightmods.version import __version__ as __version__

_get, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

# What no public name needs to be complete.
_APART = {"backend", "cli", "exported", "native", "utils", "version"}


def __getattr__(name):
    if name in __all__:
        import keras  # noqa: F401

        _load()
    return _get(name)


def _load():
    for name in __all__:
        globals()[name] = _get(name)


def _load_with_keras():
    """Load all, unless a module of ours is just what imports Keras.

    That module is not complete yet. `__getattr__` comes later.
    """
    begun = [
        name.split(".")[1:]
        for name in sys.modules
        if name.startswith(f"{__name__}.")
    ]
    if ["native", "packed"] in begun or {name for name, *_ in begun} - _APART:
        return
    _load()


exported.register()
exported.when_imported("keras", _load_with_keras)
