"""What exported models with packed kernels need in a process of their own.

A SavedModel of TensorFlow and a `.pt2` of torch hold the packed arrays and call
compiled kernels of this package by name. The import of this module registers
these, without Keras, with TensorFlow and torch where they have been imported
before. If neither has, it imports those that are installed.
"""

import contextlib
import importlib
import importlib.util
import sys

from keras_weightmods import native


def _register_with_tensorflow():
    if not native.is_available() or not native.xla_handler("kwm_xla_matmul"):
        return
    calls = "keras_weightmods.backend.tensorflow.xla_calls"
    # The one who runs the model is told the name of the call that is missing.
    with contextlib.suppress(AttributeError, OSError):
        importlib.import_module(calls).register()


def _register_with_torch():
    importlib.import_module("keras_weightmods.backend.torch.operators")


_REGISTER = {
    "tensorflow": _register_with_tensorflow,
    "torch": _register_with_torch,
}

for _name in [name for name in _REGISTER if name in sys.modules] or [
    name for name in _REGISTER if importlib.util.find_spec(name)
]:
    _REGISTER[_name]()
