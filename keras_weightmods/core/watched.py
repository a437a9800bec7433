"""Other code in place of a layer's `call`, in a scope."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from keras_weightmods.core import keras_compat
from keras_weightmods.core.layer_kinds import GENERATED

_WATCHERS = "_watchers"


@contextlib.contextmanager
def called_by(layer: Any, call: Callable[..., Any]) -> Iterator[None]:
    """Run `call(plain, *args, **kwargs)` in place of a layer's `call`.

    Keras has no hooks on calls; so the layer's class is a generated subclass of
    its own in the scope, as that of a reparameterized layer is. Scopes may be
    nested: the inner one comes first.

    Args:
        layer: A layer that is no model.
        call: Callable from the `call` that it stands for, and the arguments, to
            the outputs.
    """
    own = keras_compat.attributes(layer)
    cls: Any = type(layer)
    watchers = own.setdefault(_WATCHERS, [])
    if not watchers:
        layer.__class__ = _watched_class(cls)
    watchers.append(call)
    try:
        yield
    finally:
        watchers.remove(call)
        if not watchers:
            layer.__class__ = cls
            del own[_WATCHERS]


@functools.cache
def _watched_class(cls: Any) -> Any:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        run = functools.partial(cls.call, self)
        for watcher in keras_compat.attributes(self)[_WATCHERS]:
            run = functools.partial(watcher, run)
        return run(*args, **kwargs)

    namespace = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "call": call,
        GENERATED: True,
    }
    return type(cls.__name__, (cls,), namespace)
