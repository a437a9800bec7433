"""Other code in place of a layer's `call`, in a scope."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

from keras_weightmods.core import keras_compat
from keras_weightmods.core.layer_kinds import GENERATED

_WATCHERS = "_watchers"
_LOCK = threading.Lock()


@contextlib.contextmanager
def called_by(layer: Any, call: Callable[..., Any]) -> Iterator[None]:
    """Run `call(plain, *args, **kwargs)` in place of a layer's `call`.

    Keras has no hooks on calls; so the layer's class is a generated subclass of
    its own in the scope, as that of a reparameterized layer is. Scopes may be
    nested: the inner one comes first. Calls by another thread are as before.

    Args:
        layer: A layer that is no model.
        call: Callable from the `call` that it stands for, and the arguments, to
            the outputs.
    """
    watcher = threading.get_ident(), call
    own = keras_compat.attributes(layer)
    with _LOCK:
        cls: Any = type(layer)
        watchers = own.setdefault(_WATCHERS, [])
        if not watchers:
            layer.__class__ = _watched_class(cls)
        watchers.append(watcher)
    try:
        yield
    finally:
        with _LOCK:
            watchers.remove(watcher)
            if not watchers:
                layer.__class__ = type(layer).__bases__[0]
                del own[_WATCHERS]


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
