"""Changes to a Keras model's weights, on JAX, TensorFlow and torch.

To import this package loads neither Keras nor a backend. The public names, all
of `public.py`, are loaded with Keras: once it has been imported, by this
package when the first of them is used, or by anyone else. Keras then finds the
classes that are registered with it.

What exported models need is there as soon as TensorFlow or torch is, see
`exported.py`.
"""

import importlib
import sys
from typing import TYPE_CHECKING

from keras_weightmods import exported
from keras_weightmods.version import __version__ as __version__

if TYPE_CHECKING:
    from keras_weightmods.public import *  # noqa: F403
else:

    def __getattr__(name):
        # Not for what others ask any module for, as `__wrapped__`.
        if name == "__all__" or not name.startswith("_"):
            _load()
        if name not in globals():
            message = f"module {__name__!r} has no attribute {name!r}"
            raise AttributeError(message)
        return globals()[name]

    def __dir__():
        _load()
        return sorted(globals())


def _load():
    public = vars(importlib.import_module(f"{__name__}.public"))
    names = {name: public[name] for name in public if not name.startswith("_")}
    globals().update(names, __all__=[*names])


def _load_with_keras():
    """Load all, unless a module of ours is just what imports Keras.

    That module is not complete yet. `__getattr__` comes later.
    """
    ours = f"{__name__}."
    specs = [m.__spec__ for n, m in sys.modules.items() if n.startswith(ours)]
    if not any(getattr(spec, "_initializing", False) for spec in specs):
        _load()


exported.register()
exported.when_imported("keras", _load_with_keras)
