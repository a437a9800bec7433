"""The structure of Keras objects, to be restored after an error."""

from collections.abc import Iterable
from typing import Any

import keras
from keras.src.backend.common import global_state
from keras.src.utils.tracking import Tracker

from keras_weightmods.core.keras_compat.graph import graph_of
from keras_weightmods.core.keras_compat.layers import layers_of, own_variables

# Classes of torch, for the parameters of a layer, of TensorFlow, and of the
# things that a model was compiled with.
_HOLDERS = "ParameterDict", "ListWrapper", "SerializableDict"


class Structure:
    """The structure of layers, optimizers and variables at one moment.

    It holds classes, attributes, the lists of Keras and torch in them, flags
    and torch's gradients, but no values. It also holds the open scopes of
    Keras. Needless if a layer had a public copy of its state.

    Args:
        objects: Iterable of layers, each with all that is in it and with its
            variables, of optimizers and of variables.
        released: Iterable of those variables of which the value is taken away,
            and so part of what is given back.
    """

    def __init__(
        self, objects: Iterable[Any], released: Iterable[Any] = ()
    ) -> None:
        parts: dict[int, Any] = {}
        for each in objects:
            layers = (
                layers_of(each) if isinstance(each, keras.layers.Layer) else ()
            )
            for layer in layers:
                # The one inside a Sequential is not among its layers.
                own = [layer, graph_of(layer), *own_variables(layer)]
                parts.update({id(x): x for x in own if x is not None})
            parts.setdefault(id(each), each)
        self._classes = [(part, type(part)) for part in parts.values()]
        self._found: dict[int, tuple[Any, Any]] = {}
        # The settings of Keras' scopes in this thread. Ctrl-C at the end of a
        # scope would leave its setting in place.
        self._scopes: dict[int, tuple[Any, Any]] = {}
        _find(vars(global_state.GLOBAL_STATE_TRACKER), self._scopes)
        self._attributes, self._flags = [], []
        kept = set(map(id, released))
        for part in parts.values():
            before = dict(vars(part))
            if isinstance(part, keras.Variable):
                # Do not hold the values that a training replaces.
                if before.get("_value") is not None and id(part) not in kept:
                    del before["_value"]
                if (
                    flag := getattr(part._value, "requires_grad", None)
                ) is not None:
                    self._flags.append((part, flag, part._value.grad))
            else:
                _find(tuple(before.values()), self._found)
            self._attributes.append((part, before))

    def restore_attributes(self) -> None:
        """Restore the attributes and the scopes.

        Another thread may be using the attributes: none is ever missing.
        """
        _give_back(self._scopes)
        for part, before in self._attributes:
            own = vars(part)
            own.update(before)
            for name in own.keys() - before.keys() - {"_value"}:
                del own[name]

    def restore(self) -> None:
        """Restore everything."""
        for part, cls in self._classes:
            # Bypasses Keras' attribute tracking.
            object.__setattr__(part, "__class__", cls)
        self.restore_attributes()
        _give_back(self._found)
        for variable, flag, gradient in self._flags:
            variable._value.requires_grad = flag
            # A training leaves those of its last step, as large as the weights.
            variable._value.grad = gradient


def _find(value: Any, found: dict[int, tuple[Any, Any]]) -> None:
    """Record the lists, dicts and sets in a value, with their contents."""
    if type(value).__name__ == "_DictWrapper":  # of TensorFlow
        value = value.__wrapped__
    if isinstance(value, tuple):
        for each in value:
            _find(each, found)
    elif isinstance(value, Tracker) or type(value).__name__ in _HOLDERS:
        _find(vars(value), found)
    elif id(value) not in found:
        for kind in (list, dict, set):
            if isinstance(value, kind):
                contents: Any = kind(value)
                found[id(value)] = value, contents
                is_dict = isinstance(contents, dict)
                _find(tuple(contents.values() if is_dict else contents), found)


def _give_back(found: dict[int, tuple[Any, Any]]) -> None:
    # Bypasses the methods of Keras' lists and dicts, which track new items.
    for holder, contents in found.values():
        kind = type(contents)
        kind.clear(holder)
        (kind.extend if kind is list else kind.update)(holder, contents)
