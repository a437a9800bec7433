"""All that this package touches of Keras beyond its public API.

Written for Keras 3.15; each function says why it is needed. No other file
reads `keras.src`, a private attribute of a Keras object, or what lies behind
Keras' attribute tracking: `tests/core/test_keras_private.py` checks that.
Overriding a hook of a base class (`_backend_update_step`) is subclassing and
stays in the subclass. Longer than other files, as whoever moves to another
Keras needs one place to look.
"""

import contextlib
import copy
import functools
import inspect
import itertools
import random
import threading
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
from keras.src.layers.layer import Layer

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
from keras.src.trainers.epoch_iterator import EpochIterator
from keras.src.utils.naming import to_snake_case as to_snake_case

SafeModeScope = serialization_lib.SafeModeScope
ObjectSharingScope = serialization_lib.ObjectSharingScope
# Yields the attributes of a part that Keras looks into when it saves.
walk_saveable = saving_lib._walk_saveable

# Layers and their attributes.


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


@contextlib.contextmanager
def policy_of_its_own(layer: Any) -> Iterator[None]:
    """Have a layer whose policy is in a map see its own in a scope.

    Keras' embeddings look at the map's default when they are saved, and leave
    out the scale of what is quantized.
    """
    policy: Any = getattr(layer, "dtype_policy", None)
    is_map = isinstance(policy, keras.dtype_policies.DTypePolicyMap)
    if not is_map or not layer.path:
        yield
        return
    with replaced_attributes(layer, _dtype_policy=policy[layer.path]):
        yield


@contextlib.contextmanager
def replaced_attributes(obj: Any, **replacements: Any) -> Iterator[None]:
    """Set attributes of an instance in a scope, past attribute tracking."""
    own = vars(obj)
    before = {name: own[name] for name in replacements if name in own}
    own.update(replacements)
    try:
        yield
    finally:
        for name in replacements:
            del own[name]
        own.update(before)


def without_preprocessor(model: Any) -> Any:
    """Take the preprocessor of a KerasHub 0.32 task off it in a scope.

    Past its property, whose setter would take the preprocessor, when it is put
    back, for one more layer of the model.
    """
    return replaced_attributes(model, _preprocessor=None)


def see_calls(layer: Any, see: Callable[..., Any]) -> None:
    """Have `see(*args, **kwargs)` called before each `layer.call`.

    On the instance, as Keras has no hooks on calls; ends with
    `replaced_attributes` or `restored_attributes`.
    """
    call = layer.call

    def seen_call(*args, **kwargs):
        see(*args, **kwargs)
        return call(*args, **kwargs)

    vars(layer)["call"] = seen_call


@contextlib.contextmanager
def calls_seen(layer: Any, see: Callable[..., Any]) -> Iterator[None]:
    """Call `see(*args, **kwargs)` before each `layer.call` in a scope."""
    with replaced_attributes(layer, call=layer.call):
        see_calls(layer, see)
        yield


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


# Variables of built layers.


@contextlib.contextmanager
def unlocked(layer: Any) -> Iterator[None]:
    """Let a built layer take new variables, as LoRA in Keras does."""
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
    takes minutes on an LLM.

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
    """Free the memory of a variable; reads raise ValueError(`message`)."""

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
def without_values(pending: list[Any]) -> Iterator[None]:
    """Give new variables no value in a scope, and add them to `pending`.

    A `StatelessScope` does so, but lists them where its end gives them one,
    and knows only variables that are made by an initializer: those made of a
    value are here made by one that returns it.
    """
    attribute = "uninitialized_variables"
    earlier = global_state.get_global_attribute(attribute, [])
    owner = next(c for c in keras.Variable.__mro__ if "__init__" in vars(c))
    plain = owner.__init__

    def init(self, initializer, shape=None, dtype=None, *args, **kwargs):
        if in_stateless_scope() and not (
            callable(initializer) or isinstance(initializer, str)
        ):
            value = initializer
            tensor = backend.convert_to_tensor(value, dtype)
            shape = tuple(map(int, tensor.shape))
            dtype = keras.backend.standardize_dtype(dtype or tensor.dtype)

            def initializer(shape, dtype=None):
                return backend.convert_to_tensor(value, dtype)

        plain(self, initializer, shape, dtype, *args, **kwargs)

    global_state.set_global_attribute(attribute, pending)
    owner.__init__ = init
    try:
        with keras.StatelessScope(initialize_variables=False):
            yield
    finally:
        owner.__init__ = plain
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

    It has a layout of our choice, unless that is None: `add_weight` takes
    none. Set before there is a value, it is never whole on a device.
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


@contextlib.contextmanager
def at_most_layers(count: int) -> Iterator[None]:
    """Raise ValueError in a scope once more layers than `count` are made.

    Each layer of Keras is made by `Layer.__new__`.
    """
    plain, thread, left = Layer.__new__, threading.get_ident(), count

    def new(cls, *args, **kwargs):
        nonlocal left
        left -= threading.get_ident() == thread
        if left < 0:
            raise ValueError(f"More than {count} layers are made")
        return plain(cls, *args, **kwargs)

    Layer.__new__ = new
    try:
        yield
    finally:
        Layer.__new__ = plain


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


# Calls and graphs.


def is_training_call() -> bool:
    """Return whether a layer is being called with `training=True`.

    What is not a layer's `call` gets no `training` argument.
    """
    context = global_state.get_global_attribute("current_call_ctx")
    return context is not None and context.get_value("training") is True


def takes_training(layer: Any) -> bool:
    """Return whether a layer's `call` has an argument `training`.

    A call of the layer drops one that it has not; `stateless_call` does not.
    """
    return bool(layer._call_has_training_arg)


def producer(tensor: Any) -> tuple[Any, list[Any]]:
    """Return the operation that made a symbolic tensor, and its inputs."""
    operation, index, _ = tensor._keras_history
    return operation, operation._inbound_nodes[index].input_tensors


def graph_of(operation: Any) -> Any:
    """Return the functional graph that calling `operation` runs, or None."""
    if isinstance(operation, keras.Sequential):
        return operation._functional
    is_plain = (
        isinstance(operation, Functional)
        and type(operation).call is Functional.call
        and "call" not in vars(operation)
    )
    return operation if is_plain else None


def nodes_of(graph: Any) -> list[Any]:
    """Return the calls of a graph that compute something, in order."""
    known = {id(x) for x in graph.inputs}
    nodes = []
    for depth in sorted(graph._nodes_by_depth, reverse=True):
        for node in graph._nodes_by_depth[depth]:
            if node.is_input or any(
                id(x) not in known for x in node.input_tensors
            ):
                continue
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
    """Return `operation` as a functional model calls it.

    With `training` for those that take it.
    """
    return operation_fn(operation, training=training)


def strategy_scope(model: Any) -> Any:
    """Return the scope of the strategy that a model was made in.

    On TensorFlow, where `fit` of Keras runs in it by itself. Variables made
    outside of it are one for each replica, and drift apart.
    """
    strategy = getattr(model, "distribute_strategy", None)
    return contextlib.nullcontext() if strategy is None else strategy.scope()


# Optimizers of others.


def optimizer_variables(optimizer: Any) -> list[Any]:
    """Return the variables that a built optimizer updates."""
    return optimizer._trainable_variables


def check_known(optimizer: Any, variables: list[Any]) -> None:
    """Raise ValueError unless a built optimizer updates all `variables`."""
    optimizer._check_variables_are_known(variables)


def applied_steps(optimizer: Any) -> keras.Variable:
    """Return the count of `apply`; `iterations` counts what accumulates."""
    return optimizer._iterations


def given_learning_rate(optimizer: Any) -> Any:
    """Return the schedule, if there is one; `learning_rate` is its value."""
    return optimizer._learning_rate


def decays(optimizer: Any, variable: Any) -> bool:
    """Return whether an optimizer applies weight decay to a variable."""
    return optimizer._use_weight_decay(variable)


def exclude_from_decay(optimizer: Any, keys: set[str]) -> None:
    """Leave more variables, by `_var_key`, out of weight decay.

    The public `exclude_from_weight_decay` forgets what the user has said.
    """
    optimizer._exclude_from_weight_decay = keys.union(
        getattr(optimizer, "_exclude_from_weight_decay", ())
    )
    optimizer._exclude_from_weight_decay_cache = {}


def drop_averages(optimizer: Any) -> None:
    """Take the moving averages out of a built optimizer, if it has any."""
    averages = getattr(optimizer, "_model_variables_moving_average", None)
    if averages is not None:
        for average in averages:
            if average is not None:
                optimizer._untrack_variable(average)
        del optimizer._model_variables_moving_average


def set_optimizer(model: Any, optimizer: Any) -> None:
    """Give a compiled model another optimizer, also in what it saves.

    `compile` would drop the model's state of metrics.
    """
    model.optimizer = optimizer
    config = getattr(model, "_compile_config", None)
    if config is not None and "optimizer" in config.config:
        config.config["optimizer"] = optimizer
    model.train_function = None


# A running `fit`.


class FitData:
    """What a running `fit` of Keras draws its batches from.

    Keras hands it to no callback: it is a local variable of `fit`, and its
    order and place cannot be set from outside.

    Args:
        model: The model whose `fit` calls us, through a callback.

    Raises:
        ValueError: If there is no such `fit`.
    """

    def __init__(self, model: Any) -> None:
        frame = inspect.currentframe()
        while frame is not None:
            own = frame.f_locals
            iterator = own.get("epoch_iterator")
            if own.get("self") is model and isinstance(iterator, EpochIterator):
                break
            frame = frame.f_back
        else:
            raise ValueError(
                "The data of this `fit` cannot be found, which works with "
                f"Keras' own `fit` alone. Received: {type(model).__name__}"
            )
        # Batches go on while callbacks run in another thread, where `fit` is
        # given no list of callbacks but a single one.
        if hasattr(own["callbacks"], "_async_train"):
            own["callbacks"]._async_train = False
        self._iterator: Any = iterator
        self._new = iterator._get_iterator
        self._steps = iterator._enumerate_iterator
        self.adapter = iterator.data_adapter
        self.kind = type(self.adapter).__name__
        self.is_arrays = self.kind == "ArrayDataAdapter"
        # What is shuffled only when an epoch begins draws nothing later.
        self.draws_at_start = (
            self.is_arrays and self.adapter._shuffle != "batch"
        )
        self.steps_per_execution = iterator.steps_per_execution
        self.steps_per_epoch = iterator.steps_per_epoch

    def install(self, new: Any, steps: Any) -> None:
        """Have `fit` take iterators from `new()`, and its steps from `steps()`.

        Each step is a triple (first, last, iterator to draw the batches of).
        """
        self._iterator._get_iterator = new
        self._iterator._enumerate_iterator = steps

    def new_batches(self) -> Any:
        """Return a new iterator of batches, as `fit` would without us.

        But on TensorFlow Keras draws from Python's data ahead, in a thread,
        when random numbers may be any. Here it happens when asked for.
        """
        is_python = not self.is_arrays and self.kind != "TFDatasetAdapter"
        if keras.backend.backend() != "tensorflow" or not is_python:
            return iter(self._new())
        import tensorflow as tf

        def tensor(leaf):
            return None if leaf is None else tf.convert_to_tensor(leaf)

        return (
            keras.tree.map_structure(tensor, batch)
            for batch in self.adapter.get_numpy_iterator()
        )

    def steps(self) -> Any:
        """Return the iterator of the steps of an epoch, as `fit` would."""
        return self._steps()

    @property
    def steps_of_epoch(self) -> int | None:
        """The steps of an epoch; None where they are not known yet."""
        return self._iterator.num_batches

    @property
    def num_batches(self) -> int | None:
        """The batches of a pass; None where they are not known yet."""
        return self._iterator._num_batches

    @num_batches.setter
    def num_batches(self, count: int | None) -> None:
        if self._iterator._num_batches is None:
            self._iterator._num_batches = count

    @property
    def steps_seen(self) -> int:
        """The steps made with the iterator that is in use."""
        return int(self._iterator._steps_seen)

    def go_on_with(self, batches: Any, steps_seen: int) -> None:
        """Put an iterator into use, where it outlives an epoch."""
        self._iterator._current_iterator = batches
        self._iterator._steps_seen = steps_seen

    def shuffle_by_seed(self) -> Any:
        """Return a variable of two ints that sets the order, on TensorFlow.

        Keras shuffles arrays there with `tf.random.shuffle` within `tf.data`,
        whose state cannot be read or set. None where nothing is shuffled.
        """
        is_tensorflow = keras.backend.backend() == "tensorflow"
        if not (is_tensorflow and self.is_arrays and self.adapter._shuffle):
            return None
        import tensorflow as tf

        seed = tf.Variable([0, 0], dtype="int64", trainable=False)

        def shuffle(indices):
            # The batch too, of which with `shuffle="batch"` there are many.
            words = seed + tf.stack([0, indices[0]])
            return tf.random.experimental.stateless_shuffle(indices, words)

        plain, tf.random.shuffle = tf.random.shuffle, shuffle
        try:
            dataset = self.adapter.get_tf_dataset()
        finally:
            tf.random.shuffle = plain
        self._iterator._distributed_dataset = dataset
        return seed


def begin_with_epoch(model: Any, epoch: int | None) -> None:
    """Have the `fit` that is starting begin with an epoch, counted from 0."""
    model._initial_epoch = epoch


class _EpochLogs:
    """Stands in for the method that makes the logs of an epoch."""

    def __init__(self, model):
        self.plain = model._get_metrics_result_or_logs
        self.sources: list[Callable[[], dict[str, Any]]] = []

    def __call__(self, logs):
        more = [source() for source in self.sources]
        return {
            k: v for each in (self.plain(logs), *more) for k, v in each.items()
        }


def add_to_epoch_logs(model: Any, source: Callable[[], dict[str, Any]]) -> None:
    """Have `fit` put what `source` returns into the logs that it makes.

    So does `evaluate`. There is no public way to add to them before the first
    of the callbacks gets them.
    """
    own = attributes(model)
    name = "_get_metrics_result_or_logs"
    if not isinstance(own.get(name), _EpochLogs):
        own[name] = _EpochLogs(model)
    if source not in own[name].sources:
        own[name].sources.append(source)


def leave_epoch_logs(model: Any, source: Callable[[], dict[str, Any]]) -> None:
    """Undo `add_to_epoch_logs`."""
    own = attributes(model)
    name = "_get_metrics_result_or_logs"
    if isinstance(own.get(name), _EpochLogs):
        own[name].sources = [s for s in own[name].sources if s != source]
        if not own[name].sources:
            del own[name]


def hold_state(model: Any, state: Any) -> None:
    """Have `fit` on JAX put a state into the variables when it ends."""
    names = "trainable", "non_trainable", "optimizer", "metrics"
    model._jax_state = {
        f"{name}_variables": values for name, values in zip(names, state)
    }
    model._jax_state_synced = False


def keep_weights(model: Any) -> None:
    """Have a running `fit` keep the weights on an error, on JAX.

    Its step has taken them out of the variables. The other backends change
    them in place.
    """
    if keras.backend.backend() == "jax" and model.train_function is not None:
        from keras_weightmods.backend.jax.kept_step import kept

        hold = functools.partial(hold_state, model)
        model.train_function = kept(model.train_function, hold)


def build_metrics(model: Any, batch: Any) -> None:
    """Build metrics and loss; TensorFlow's trainer does it in the first step.

    Args:
        model: A compiled model.
        batch: What `fit` draws from its data.
    """
    model._symbolic_build(data_batch=batch)


def global_seed(create: bool = False) -> Any:
    """Return the state of Keras' seed generator for where none is given.

    Args:
        create: Bool, whether to make it where there is none yet; else `None`
            is returned then.
    """
    found = global_state.get_global_attribute(GLOBAL_SEED_GENERATOR)
    if found is None and create:
        found = global_seed_generator()
    return None if found is None else found.state


# The ops of the backend.


@contextlib.contextmanager
def rotations_by(model: Any, make: Callable[..., Any]) -> Iterator[None]:
    """Compute the rotary embeddings of a model by another function in a scope.

    KerasHub's layers make their cosines and sines in a method of their own,
    from the first place and the shape of what is turned.

    Args:
        model: A built model.
        make: Callable, gets the method of a layer and returns what stands in
            for it.
    """
    name = "_compute_cos_sin_embedding"
    with contextlib.ExitStack() as stack:
        for layer in layers_of(model):
            if plain := getattr(layer, name, None):
                replaced = replaced_attributes(layer, **{name: make(plain)})
                stack.enter_context(replaced)
        yield


@contextlib.contextmanager
def functions_by(**makers: Any) -> Iterator[None]:
    """Run some of `keras.ops` by other functions in a scope.

    What KerasHub asks `keras.ops` for cannot always be compiled well: on torch
    `slice` reads its start out of a tensor, and before an attention keys and
    values are repeated for each group of heads.

    Args:
        **makers: Callables by the name of the function, as `core_slice` for
            `slice` in the backend's module `core`; each gets the backend's
            own function and returns what stands in for it.
    """
    places = []
    for name in makers:
        module, _, function = name.partition("_")
        places.append((getattr(backend, module), function))
    before = [getattr(*place) for place in places]
    try:
        for place, plain, make in zip(places, before, makers.values()):
            setattr(*place, make(plain))
        yield
    finally:
        for place, plain in zip(places, before):
            setattr(*place, plain)
