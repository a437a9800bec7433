"""Support for exported models with packed kernels in other processes.

A SavedModel of TensorFlow and a `.pt2` of torch hold packed arrays and call
compiled kernels of this package by name. Importing this module registers the
kernels with TensorFlow and torch if they are imported, without Keras. If
neither is, it imports those that are installed.
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
    # The error in running the model names the missing call.
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
