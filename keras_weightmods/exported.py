"""What exported models with packed kernels need in a process of their own.

A SavedModel of TensorFlow and a `.pt2` of torch hold the packed arrays and call
compiled kernels of this package by name. The import of the package registers
these, without Keras: at once where TensorFlow or torch is there already, else
when it is imported.
"""

import contextlib
import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable

from keras_weightmods import native


def register() -> None:
    """Register the compiled kernels with TensorFlow and torch."""
    when_imported("tensorflow", _register_with_tensorflow)
    when_imported("torch", _define_operators_of_torch)


def when_imported(name: str, function: Callable[[], None]) -> None:
    """Call `function` once a module is imported; now if it is.

    Args:
        name: String, of a module that is in no package.
        function: Callable without arguments.
    """
    if name in sys.modules:
        function()
    else:
        sys.meta_path.insert(0, _Waiting(name, function))


class _Waiting(importlib.abc.MetaPathFinder):
    """Finds one module as the others would, and has it call a function.

    It stays until the module is imported, as some only ask whether it is there.
    """

    def __init__(self, name, function):
        self.name = name
        self.function = function
        self._is_asking = False

    def find_spec(self, name, path, target=None):
        if name != self.name or self._is_asking:
            return None
        self._is_asking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._is_asking = False
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self.function()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _register_with_tensorflow():
    if not native.is_available() or not native.xla_handler("kwm_xla_matmul"):
        return
    calls = "keras_weightmods.backend.tensorflow.xla_calls"
    # To import TensorFlow is no error. Who packs a model is told why it is
    # multiplied dense, who runs an exported one by the name of the call.
    with contextlib.suppress(AttributeError, OSError):
        importlib.import_module(calls).register()


def _define_operators_of_torch():
    importlib.import_module("keras_weightmods.backend.torch.operators")
