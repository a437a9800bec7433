"""Variables: their values, dtypes and layouts."""

import contextlib
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import keras

# The autocast scope of a mixed-precision layer. The public `autocast=False` is
# for a single variable.
from keras.src.backend import AutocastScope as AutocastScope
from keras.src.backend import get_autocast_scope as get_autocast_scope

# The mask of predictions, where Keras' losses look for it.
from keras.src.backend import get_keras_mask as get_keras_mask

# Keras initializes variables differently in a stateless scope.
from keras.src.backend import in_stateless_scope as in_stateless_scope
from keras.src.backend import set_keras_mask as set_keras_mask
from keras.src.backend.common import global_state
from keras.src.random.seed_generator import (
    GLOBAL_SEED_GENERATOR,
    global_seed_generator,
)

from keras_weightmods import backend


@contextlib.contextmanager
def unlocked(layer: Any) -> Iterator[None]:
    """Let a built layer take new variables, as LoRA in Keras does.

    Needless if `add_weight` could be called on a built layer.
    """
    locked = layer._tracker.locked
    layer._tracker.unlock()
    try:
        yield
    finally:
        if locked:
            layer._tracker.lock()


def remove_variable(layer: Any, variable: Any, name: str | None = None) -> Any:
    """Take a variable out of a layer.

    Keras' public way, `del layer.name`, collects garbage each time, which
    takes minutes on an LLM, and forgets the place. Needless with a
    `Layer.remove_weight` that returns what `add_weight` can put back.

    Args:
        layer: The layer.
        variable: The variable.
        name: String, the attribute that holds it; `None` if none does.

    Returns:
        Its place, for `put_variable_back`; `None` if the layer does not
        hold it as trainable or not.
    """
    place = None
    for store in ("trainable_variables", "non_trainable_variables"):
        if layer._tracker.is_in_store(store, variable):
            own = layer._tracker.config[store][1]
            index = next(i for i, each in enumerate(own) if each is variable)
            place = name, store, [weakref.ref(v) for v in own[index + 1 :]]
    layer._untrack_variable(variable)
    if name is not None:
        super(keras.layers.Layer, layer).__delattr__(name)
    return place


def put_variable_back(layer: Any, variable: Any, place: Any) -> None:
    """Undo `remove_variable`, and restore the order of the weights.

    This works even if others were removed or put back since.
    """
    name, store, followers = place
    with unlocked(layer):
        layer._tracker.add_to_store(store, variable)
        own = layer._tracker.config[store][1]
        places = {id(each): i for i, each in enumerate(own)}
        known = [places[id(v())] for v in followers if id(v()) in places]
        own.insert(min(known, default=len(own) - 1), own.pop())
        if name is not None:
            setattr(layer, name, variable)


def release_value(variable: Any, message: str) -> None:
    """Free the memory of a variable; reads raise ValueError(`message`).

    Needless, with the three functions below, if a `Variable` had a public
    `release` and `initialize`.
    """

    def absent(shape, dtype=None):
        raise ValueError(message)

    variable._value = None
    # Keras calls this to read a variable that has no value yet.
    variable._initializer = absent


def restore_value(variable: Any, value: Any) -> None:
    """Give a variable without one a value; `assign` reads the old one."""
    variable._initializer = None
    variable._initialize(variable._convert_to_tensor(value, variable.dtype))


def has_value(variable: Any) -> bool:
    """Return whether a variable has a value; Keras does not say."""
    return variable._value is not None


def held_value(variable: Any) -> Any:
    """Return the value of a variable as an array, inside of a trace too.

    It is None within `fit` on JAX, which has taken the value out. Needless with
    a public `Variable.is_initialized`.
    """
    if variable._value is None:
        return None
    with backend.current().outside_trace():
        return keras.ops.convert_to_numpy(variable._value)


def initialize(variable: Any, initializer: Any = None) -> None:
    """Give a variable made in `without_values` its value."""
    if initializer is not None:
        variable._initializer = initializer
    variable._deferred_initialize()


@contextlib.contextmanager
def without_values() -> Iterator[list[Any]]:
    """Leave new variables without a value in a scope; yield their list.

    The public `StatelessScope` keeps the list to itself, and gives them values
    at the end of the next such scope. Needless if the scope had the list.
    """
    attribute = "uninitialized_variables"
    earlier = global_state.get_global_attribute(attribute, [])
    pending: list[Any] = []
    global_state.set_global_attribute(attribute, pending)
    try:
        with keras.StatelessScope(initialize_variables=False):
            yield pending
    finally:
        global_state.set_global_attribute(attribute, earlier)


def is_for_want_of_values(error: BaseException | None) -> bool:
    """Return whether code in `without_values` made a variable from a value.

    Keras has no class for that error. So one is provoked here, and its
    arguments are compared, however the error was wrapped. Needless if it had a
    class.
    """
    expected = None
    try:
        with keras.StatelessScope():
            keras.Variable(0.0, name="probe")
    except ValueError as own:
        expected = own.args
    while error is not None and error.args != expected:
        error = error.__cause__ or error.__context__
    return error is not None


def layout_of(variable: Any) -> Any:
    """Return the layout of a variable over devices; None where it has none.

    Keras keeps it private, and looks it up by the path of a variable. What
    stands for a weight has another path.
    """
    distribution = keras.distribution.distribution()
    if variable._layout is None and distribution is not None:
        return distribution.get_variable_layout(variable)
    return variable._layout


def add_laid_out(add: Callable[..., Any], layout: Any, **arguments: Any) -> Any:
    """Return the new variable of `add`, a layer's `add_weight` or similar.

    It gets the given layout, unless that is None. The layout is set before the
    value, so no device ever holds the whole. Needless if `add_weight` took a
    layout, as `Variable` does.
    """
    if layout is None:
        return add(**arguments)
    before = keras.distribution.distribution()
    ours = types.SimpleNamespace(get_variable_layout=lambda variable: layout)
    keras.distribution.set_distribution(ours)
    try:
        variable = add(**arguments)
    finally:
        keras.distribution.set_distribution(before)
    # A variable without a value has not asked for it yet.
    variable._layout = layout
    return variable


def global_seed(create: bool = False) -> Any:
    """Return the state of Keras' default seed generator.

    Needless if `keras.random` made it public. If there is none yet, `create`
    makes one; otherwise `None` is returned.
    """
    found = global_state.get_global_attribute(GLOBAL_SEED_GENERATOR)
    return global_seed_generator().state if found or create else None
