"""Replacing a layer's `call` in a scope."""

import functools
import threading
from collections.abc import Callable
from typing import Any

from keras_weightmods.core import keras_compat
from keras_weightmods.core.layer_kinds import GENERATED

_WATCHERS = "_watchers"
_LOCK = threading.Lock()


class called_by:
    """Run `call(plain, *args, **kwargs)` in place of a layer's `call`.

    Keras has no hooks on calls, so in the scope the layer's class is a
    generated subclass. Scopes may be nested: the inner one comes first. Calls
    by other threads are not affected.

    If Ctrl-C comes as a scope begins or ends, the layer may stay watched.
    `RestoredOnError` around the scope restores it.

    Args:
        layer: A layer that is no model.
        call: Callable from the `call` that it stands for, and the arguments, to
            the outputs.
    """

    def __init__(self, layer: Any, call: Callable[..., Any]) -> None:
        self._layer, self._call = layer, call

    def __enter__(self) -> None:
        layer: Any = self._layer
        self._watcher = threading.get_ident(), self._call
        with _LOCK:
            cls: Any = type(layer)
            own = keras_compat.attributes(layer)
            self._watchers = own.setdefault(_WATCHERS, [])
            if not self._watchers:
                layer.__class__ = _watched_class(cls)
            self._watchers.append(self._watcher)

    def __exit__(self, *error: Any) -> None:
        layer: Any = self._layer
        with _LOCK:
            self._watchers.remove(self._watcher)
            if not self._watchers:
                layer.__class__ = type(layer).__bases__[0]
                del keras_compat.attributes(layer)[_WATCHERS]


@functools.cache
def _watched_class(cls: Any) -> Any:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        run = functools.partial(cls.call, self)
        here = threading.get_ident()
        # Another thread may begin or end a scope meanwhile.
        watchers = tuple(keras_compat.attributes(self).get(_WATCHERS, ()))
        for thread, watcher in watchers:
            if thread == here:
                run = functools.partial(watcher, run)
        return run(*args, **kwargs)

    namespace = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "call": call,
        GENERATED: True,
    }
    return type(cls.__name__, (cls,), namespace)
