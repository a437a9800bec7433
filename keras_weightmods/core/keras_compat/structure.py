"""How objects of Keras are made up, to be given back after an error."""

from collections.abc import Iterable
from typing import Any

import keras
from keras.src.backend.common import global_state
from keras.src.utils.tracking import Tracker

from keras_weightmods.core.keras_compat.graph import graph_of
from keras_weightmods.core.keras_compat.layers import layers_of, own_variables


class Structure:
    """What layers, optimizers and variables are made of, at one moment.

    Classes, attributes, what Keras and torch list in them, and flags; no
    values. And the scopes of Keras that are open. Needless if a layer had a
    public copy of its state.

    Args:
        objects: Iterable of layers, each with all that is in it and with its
            variables, of optimizers and of variables.
        released: Iterable of those variables of which the value is taken away,
            and so part of what is given back.
    """

    # Of torch, for the parameters of a layer; of TensorFlow; and of what a
    # model was compiled with.
    _HOLDERS = "ParameterDict", "ListWrapper", "SerializableDict"

    def __init__(
        self, objects: Iterable[Any], released: Iterable[Any] = ()
    ) -> None:
        parts: dict[int, Any] = {}
        for each in objects:
            layers = (
                layers_of(each) if isinstance(each, keras.layers.Layer) else ()
            )
            for layer in layers:
                # The one inside of a Sequential is not among its layers.
                own = [layer, graph_of(layer), *own_variables(layer)]
                parts.update({id(x): x for x in own if x is not None})
            parts.setdefault(id(each), each)
        self._classes = [(part, type(part)) for part in parts.values()]
        self._found: dict[int, tuple[Any, Any]] = {}
        self._attributes, self._flags = [], []
        kept = set(map(id, released))
        for part in parts.values():
            before = dict(vars(part))
            if isinstance(part, keras.Variable):
                # Not to hold the values that a training replaces.
                if before.get("_value") is not None and id(part) not in kept:
                    del before["_value"]
                flag = getattr(part._value, "requires_grad", None)
                self._flags.append((part, flag))
            else:
                self._find(tuple(before.values()))
            self._attributes.append((part, before))
        # What Keras' scopes set for this thread. Ctrl-C as one of them ends
        # leaves it as it was within.
        self._find(vars(global_state.GLOBAL_STATE_TRACKER))

    def restore_attributes(self) -> None:
        """Give the attributes back.

        Another thread may be using them: none is gone meanwhile.
        """
        for part, before in self._attributes:
            own = vars(part)
            own.update(before)
            for name in own.keys() - before.keys() - {"_value"}:
                del own[name]

    def restore(self) -> None:
        """Give all back."""
        for part, cls in self._classes:
            # Past Keras' attribute tracking.
            object.__setattr__(part, "__class__", cls)
        self.restore_attributes()
        # Past methods of Keras' lists and dicts, which track what comes in.
        for holder, contents in self._found.values():
            kind = type(contents)
            kind.clear(holder)
            (kind.extend if kind is list else kind.update)(holder, contents)
        for variable, flag in self._flags:
            if flag is not None:
                variable._value.requires_grad = flag

    def _find(self, value: Any) -> None:
        """Note the lists, dicts and sets in a value, and what is in them."""
        if type(value).__name__ == "_DictWrapper":  # of TensorFlow
            value = value.__wrapped__
        if isinstance(value, tuple):
            for each in value:
                self._find(each)
        elif (
            isinstance(value, Tracker) or type(value).__name__ in self._HOLDERS
        ):
            self._find(vars(value))
        elif id(value) not in self._found:
            for kind in (list, dict, set):
                if isinstance(value, kind):
                    contents: Any = kind(value)
                    self._found[id(value)] = value, contents
                    is_dict = isinstance(contents, dict)
                    self._find(
                        tuple(contents.values() if is_dict else contents)
                    )
