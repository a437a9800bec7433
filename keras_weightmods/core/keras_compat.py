"""All that this package touches of Keras beyond its public API.

Written for Keras 3.15; each function says why it is needed. No other file
reads `keras.src`, a private attribute of a Keras object, or what lies behind
Keras' attribute tracking: `tests/core/test_keras_compat.py` checks that.
Overriding a hook of a base class (`_backend_update_step`) is subclassing and
stays in the subclass. `docs/upstream.md` lists what Keras could offer instead.
"""

import contextlib
import copy
import itertools
import random
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import keras

# The module of the backend that `keras.ops` calls.
from keras.src import backend

# The autocast scope of a mixed-precision layer; `autocast=False` of a variable
# is the public way, but for one variable alone.
from keras.src.backend import AutocastScope as AutocastScope
from keras.src.backend import get_autocast_scope as get_autocast_scope

# The mask of predictions, where the losses of Keras find it.
from keras.src.backend import get_keras_mask as get_keras_mask

# Whether Keras is in a stateless scope decides how it initializes variables.
from keras.src.backend import in_stateless_scope as in_stateless_scope
from keras.src.backend import set_keras_mask as set_keras_mask
from keras.src.backend.common import global_state

# The cell of ConvLSTM1D to ConvLSTM3D, which Keras does not export.
from keras.src.layers.rnn.conv_lstm import ConvLSTMCell as ConvLSTMCell

# How a functional model calls its layers.
from keras.src.models.functional import Functional, operation_fn
from keras.src.random.seed_generator import (
    GLOBAL_SEED_GENERATOR,
    global_seed_generator,
)

# How Keras finds and names the parts of a model for its own files.
from keras.src.saving import saving_lib, serialization_lib
from keras.src.saving.keras_saveable import KerasSaveable as KerasSaveable
from keras.src.utils.naming import to_snake_case as to_snake_case

SafeModeScope = serialization_lib.SafeModeScope
ObjectSharingScope = serialization_lib.ObjectSharingScope
# Yields the attributes of a part that Keras looks into when it saves.
walk_saveable = saving_lib._walk_saveable

# Layers, and the models made of them.


def layers_of(layer: Any) -> list[Any]:
    """Return a layer and all layers in it; `Model.layers` are one level."""
    return layer._flatten_layers()


def parts_of(layer: Any) -> list[Any]:
    """Return the layers that a layer holds itself."""
    return layer._flatten_layers(include_self=False, recursive=False)


def own_variables(layer: Any) -> list[keras.Variable]:
    """Return the variables of `layer`; `weights` adds those of its layers."""
    return layer._trainable_variables + layer._non_trainable_variables


def attributes(obj: Any) -> dict[str, Any]:
    """Return the attributes of an instance, to be read and written.

    Past properties, which may compute an effective weight, and past Keras'
    attribute tracking, which is locked on a built layer.
    """
    return vars(obj)


def stored_variable(layer: Any, attribute: str) -> Any:
    """Return the variable behind the property `attribute`, such as `kernel`.

    Keras' layers keep it under the same name with an underscore in front.
    """
    name = stored_name(layer, attribute)
    return None if name is None else vars(layer)[name]


def stored_name(layer: Any, attribute: str) -> Any:
    """Return the name under which `stored_variable` is kept, or None."""
    for name in (f"_{attribute}", attribute):
        if isinstance(vars(layer).get(name), keras.Variable):
            return name
    return None


def view(obj: Any, cls: Any = None, /, **attributes: Any) -> Any:
    """Return what is `obj` but for its class, if given, and some attributes.

    `obj` is not changed. The view shares all else with it, variables too. To
    be read and dropped.
    """
    other = object.__new__(cls or type(obj))
    vars(other).update(vars(obj), **attributes)
    return other


@contextlib.contextmanager
def restored_attributes(layers: list[Any]) -> Iterator[None]:
    """Restore the attributes of `layers` after a scope without warnings.

    Keras notes in layers that they were called, and a model's own code may
    keep symbols.
    """
    saved = [(vars(layer), dict(vars(layer))) for layer in layers]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for own, before in saved:
            own.clear()
            own.update(before)


@contextlib.contextmanager
def without_traces() -> Iterator[None]:
    """Restore what making layers uses up: seeds, and numbers for names."""
    names = global_state.get_global_attribute("object_name_uids")
    names, state = copy.copy(names), random.getstate()
    try:
        yield
    finally:
        random.setstate(state)
        if names is not None:
            global_state.set_global_attribute("object_name_uids", names)


def track_torch_parameters(model: Any) -> None:
    """List the variables of a changed model as torch parameters anew.

    A container lists those of its layers when built. `zero_grad` would miss a
    later one, so that its gradients add up over the steps, and one taken out
    would live on. Keras does the same after `quantize`, but not for the
    functional model inside of a Sequential.
    """
    if keras.backend.backend() != "torch":
        return
    modules = (each.modules() for each in layers_of(model))
    for module in dict.fromkeys(itertools.chain(*modules)):
        if "_torch_params" in module._modules:
            module._track_variables()
    if "_torch_params" in model._modules:
        list_hidden_parameters(model)


def list_hidden_parameters(model: Any) -> None:
    """List the variables of a model that Keras hides from torch.

    It lists them by path, so that of two with one path, as KerasHub's SmolLM3
    and T5 have, the first is not there: no `zero_grad` reaches it, and its
    gradients add up over all steps of a `fit`. Here it gets a key of its own.
    """
    if keras.backend.backend() != "torch":
        return
    listed = {id(parameter) for parameter in model.parameters()}
    for number, variable in enumerate(model.trainable_variables):
        parameter = variable._value  # None in a build without values
        if parameter is not None and id(parameter) not in listed:
            model.torch_params[f"{variable.path}:{number}"] = parameter


def list_torch_parameters(model: Any) -> None:
    """List the variables of a model built in `without_values`, on torch.

    A layer lists them when it is built, but not in a stateless scope: what
    traces the module would find none, and its `state_dict` would be empty.
    """
    if keras.backend.backend() == "torch":
        for layer in layers_of(model):
            layer._track_variables()


def takes_training(layer: Any) -> bool:
    """Return whether a layer's `call` has an argument `training`.

    A call of the layer drops one that it has not; `stateless_call` does not.
    """
    return bool(layer._call_has_training_arg)


# Variables.


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
    """Undo `remove_variable`: the order of the weights is the former one.

    Also where others have been removed since, or put back.
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
    # What Keras calls to read a variable that has no value yet.
    variable._initializer = absent


def restore_value(variable: Any, value: Any) -> None:
    """Give a variable without one a value; `assign` reads the old one."""
    variable._initializer = None
    variable._initialize(variable._convert_to_tensor(value, variable.dtype))


def has_value(variable: Any) -> bool:
    """Return whether a variable has got a value; Keras does not say."""
    return variable._value is not None


def initialize(variable: Any, initializer: Any = None) -> None:
    """Give a variable made in `without_values` its value."""
    if initializer is not None:
        variable._initializer = initializer
    variable._deferred_initialize()


@contextlib.contextmanager
def without_values() -> Iterator[list[Any]]:
    """Give new variables no value in a scope; yield the list of them.

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


def layout_of(variable: Any) -> Any:
    """Return the layout of a variable over devices; None where it has none.

    Keras keeps it to itself, and finds that of a variable by its path: what
    stands for a weight has another path.
    """
    distribution = keras.distribution.distribution()
    if variable._layout is None and distribution is not None:
        return distribution.get_variable_layout(variable)
    return variable._layout


def add_laid_out(add: Callable[..., Any], layout: Any, **arguments: Any) -> Any:
    """Return the new variable of `add`, a layer's `add_weight` or alike.

    It has a layout of our choice, unless that is None. Set before there is a
    value, it is never whole on a device. Needless if `add_weight` took a
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
    # One without a value yet has not asked for it.
    variable._layout = layout
    return variable


def global_seed(create: bool = False) -> Any:
    """Return the state of Keras' seed generator for where none is given.

    Needless if `keras.random` had it in public. Where there is none yet,
    `create` makes one; without it, `None` is returned.
    """
    found = global_state.get_global_attribute(GLOBAL_SEED_GENERATOR)
    return global_seed_generator().state if found or create else None


# Functional models, and the ops that they call.


def producer(tensor: Any) -> tuple[Any, list[Any]]:
    """Return the operation that made a symbolic tensor, and its inputs."""
    operation, index, _ = tensor._keras_history
    return operation, operation._inbound_nodes[index].input_tensors


def graph_of(operation: Any) -> Any:
    """Return the functional graph that calling `operation` runs, or None."""
    if isinstance(operation, keras.Sequential):
        return operation._functional
    is_plain = getattr(type(operation), "call", None) is Functional.call
    return operation if is_plain and "call" not in vars(operation) else None


def nodes_of(graph: Any) -> list[Any]:
    """Return the calls of a graph that compute something, in order."""
    known = {id(x) for x in graph.inputs}
    nodes = []
    for _, nodes_there in sorted(graph._nodes_by_depth.items(), reverse=True):
        for node in nodes_there:
            inputs = set(map(id, node.input_tensors))
            if not node.is_input and inputs <= known:
                known.update(map(id, node.outputs))
                nodes.append(node)
    return nodes


def constants_of(graph: Any) -> list[Any]:
    """Return the tensors of values that the calls of a graph are given."""
    given = [
        (node.arguments.args, node.arguments.kwargs) for node in nodes_of(graph)
    ]
    return [x for x in keras.tree.flatten(given) if backend.is_tensor(x)]


def graph_inputs(graph: Any, inputs: Any) -> list[Any]:
    """Return `inputs` as the flat list that `graph.inputs` stand for."""
    return graph._standardize_inputs(inputs)


def graph_outputs(graph: Any, flat: list[Any]) -> Any:
    """Return flat outputs in the structure that the graph returns."""
    return keras.tree.pack_sequence_as(graph._outputs_struct, flat)


def graph_call(operation: Any, training: bool = False) -> Callable[..., Any]:
    """Return `operation` as a functional model calls it."""
    return operation_fn(operation, training=training)


# Optimizers, and the `fit` that runs them.


def strategy_scope(model: Any) -> Any:
    """Return the scope of the strategy that a model was made in.

    On TensorFlow, where `fit` of Keras runs in it by itself. Variables made
    outside of it are one for each replica, and drift apart.
    """
    strategy = getattr(model, "distribute_strategy", None)
    return contextlib.nullcontext() if strategy is None else strategy.scope()


def optimizer_variables(optimizer: Any) -> list[Any]:
    """Return the variables that a built optimizer updates.

    Hook: a public `Optimizer.trainable_variables`.
    """
    return optimizer._trainable_variables


def check_known(optimizer: Any, variables: list[Any]) -> None:
    """Raise ValueError unless a built optimizer updates all `variables`.

    Keras asks so in its first step, when the model has been changed. Hook: as
    of `optimizer_variables`.
    """
    optimizer._check_variables_are_known(variables)


def applied_steps(optimizer: Any) -> keras.Variable:
    """Return the count of `apply`; `iterations` counts what accumulates.

    Hook: a public count of batches beside the one of updates.
    """
    return optimizer._iterations


def given_learning_rate(optimizer: Any) -> Any:
    """Return the schedule, if there is one; `learning_rate` is its value.

    Hook: a public `Optimizer.learning_rate_schedule`.
    """
    return optimizer._learning_rate


def decays(optimizer: Any, variable: Any) -> bool:
    """Return whether an optimizer applies weight decay to a variable.

    Hook: a public `Optimizer.decays(variable)`.
    """
    return optimizer._use_weight_decay(variable)


def exclude_from_decay(optimizer: Any, keys: set[str]) -> None:
    """Leave more variables, by `_var_key`, out of weight decay.

    The public `exclude_from_weight_decay` forgets what the user has said.
    Hook: one that adds.
    """
    optimizer._exclude_from_weight_decay = keys.union(
        getattr(optimizer, "_exclude_from_weight_decay", ())
    )
    optimizer._exclude_from_weight_decay_cache = {}


def drop_averages(optimizer: Any) -> None:
    """Take the moving averages out of a built optimizer, if it has any.

    An optimizer around it takes them then. Hook: a setter of `use_ema`.
    """
    averages = getattr(optimizer, "_model_variables_moving_average", None)
    if averages is not None:
        for average in averages:
            if average is not None:
                optimizer._untrack_variable(average)
        del optimizer._model_variables_moving_average


def set_optimizer(model: Any, optimizer: Any) -> None:
    """Give a compiled model another optimizer, also in what it saves.

    `compile` would drop the model's state of metrics. Hook: a setter of
    `Model.optimizer` that also sets what is saved.
    """
    model.optimizer = optimizer
    config = getattr(model, "_compile_config", None)
    if config is not None and "optimizer" in config.config:
        config.config["optimizer"] = optimizer
    model.train_function = None


def begin_with_epoch(model: Any, epoch: int | None) -> None:
    """Have the `fit` that is starting begin with an epoch, counted from 0.

    As Keras' own `BackupAndRestore` does: no public way leads from a callback
    to `initial_epoch`.
    """
    model._initial_epoch = epoch


def hold_state(model: Any, state: Any) -> None:
    """Have `fit` on JAX put a state into the variables when it ends.

    Hook: `fit` itself keeps the last state where a step raises.
    """
    names = "trainable", "non_trainable", "optimizer", "metrics"
    model._jax_state = {
        f"{name}_variables": values for name, values in zip(names, state)
    }
    model._jax_state_synced = False
