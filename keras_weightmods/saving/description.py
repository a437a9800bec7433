"""What a file records of a model beside its arrays, and how to build it."""

import collections
import copy
import inspect
import json
import re
import sys
import warnings
from typing import Any

import keras

from keras_weightmods.core import keras_compat, reparameterization, seam
from keras_weightmods.core.execution_order import execution_order
from keras_weightmods.core.reparameterized_layer import (
    AttachedLayer,
    plain_configs,
    plain_view,
)
from keras_weightmods.core.targets import target_of
from keras_weightmods.core.weight_keys import weight_keys
from keras_weightmods.saving import states
from keras_weightmods.saving.container import DTYPES
from keras_weightmods.utils.checks import cut, shown
from keras_weightmods.version import __version__

_KEYS = {
    *("keras_weightmods_version", "keras_version", "config", "compiles"),
    *("parts", "changes", "lora"),
}
# What Keras adds to the names of layers that were given none.
_NUMBER = re.compile(r"_\d+")
_INTS = re.compile(r"^int(32|64)$")


def describe(model, parts, left_out):
    """Return a dict, of JSON, of how to build a model.

    Args:
        model: The model.
        parts: Dict from name to part, from `states.walk`.
        left_out: List, empty or of the preprocessor that is not saved.
    """
    # A loss may be one that Keras cannot serialize.
    changed: dict[str, Any] = {"get_compile_config": lambda: None}
    if left_out:
        changed["_preprocessor"] = None
    with plain_configs(), keras_compat.ObjectSharingScope():
        config = keras.saving.serialize_keras_object(
            keras_compat.view(model, **changed)
        )
    _complete(config, model)
    # A KerasHub task compiles itself when made, and an optimizer needs
    # variables that have values.
    hub = sys.modules.get("keras_hub")
    compiles = hub is not None and isinstance(model, hub.models.Task)
    if compiles:
        config["config"]["compile"] = False
    names = {id(part): name for name, part in parts.items()}
    return {
        "keras_weightmods_version": __version__,
        "keras_version": keras.__version__,
        "config": config,
        "compiles": compiles,
        "parts": _rows(parts),
        "changes": [
            [names[id(x.target.layer)], x.target.attribute, x.name]
            + [x.get_config()]
            for x in reparameterization.reparameterizations(model)
            if not x.is_own
        ],
        "lora": [
            [name, part.lora_rank, part.lora_alpha]
            for name, part in parts.items()
            if reparameterization.slots(part)
            and getattr(part, "lora_enabled", False)
        ],
    }


def check(description):
    """Raise ValueError if a description from a file has another form."""
    if not isinstance(description, dict) or set(description) != _KEYS:
        raise ValueError(f"must have the keys {sorted(_KEYS)}")
    try:
        _kinds(description["parts"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"has parts of another form ({error})") from error
    for each in _objects(description["config"]):
        if each["class_name"] in ("__numpy__", "__tensor__"):
            inner = each.get("config")
            dtype = inner.get("dtype") if isinstance(inner, dict) else None
            # NumPy takes 1 GB for an entry of the dtype `V1000000000`.
            if not isinstance(dtype, str) or dtype not in DTYPES:
                raise ValueError(f"has an array of the dtype {shown(dtype)}")


def _objects(config):
    """Yield the dicts in a config that stand for an object."""
    values = [config]
    while values:
        value = values.pop()
        if isinstance(value, dict):
            if "class_name" in value:
                yield value
            values.extend(value.values())
        elif isinstance(value, (list, tuple)):
            values.extend(value)


def _check_count(description):
    """Raise ValueError for a config of many more layers than were saved.

    To make a thousand takes Keras minutes.
    """
    found = set()
    for each in _objects(description["config"]):
        inner = each.get("config")
        layers = inner.get("layers") if isinstance(inner, dict) else None
        for layer in layers if isinstance(layers, list) else ():
            # One that two models share is written twice.
            config = layer.get("config") if isinstance(layer, dict) else None
            found.add(json.dumps(config, default=str))
    if len(found) > 99 + 2 * len(description["parts"]):
        raise ValueError(
            f"Expected the config of the {len(description['parts'])} layers "
            f"that were saved. It has {len(found)}"
        )


def build(description, entries, custom_objects=None):
    """Build the model, with its changes in place.

    Keras builds it in a `StatelessScope`, where variables get no values and
    take no memory. Where its classes make variables of values, as KerasHub's
    T5Gemma 2 does, it is built as usual.

    Args:
        description: Dict as from `describe`, of JSON.
        entries: Dict from name to `Entry`, of the weights that it must have.
        custom_objects: Dict as for `keras.saving.load_model`.

    Returns:
        Triple of the model, the dict of its parts, and the list of variables
        that have no value yet: `give_values` initializes those of a part,
        `finish` the others.
    """
    try:
        with keras_compat.without_values() as pending:
            model, parts = _build(description, custom_objects)
    except Exception as error:
        if not keras_compat.is_for_want_of_values(error):
            raise
        pending = []
        model, parts = _build(description, custom_objects)
    # What is made as "int" has 64 bits on TensorFlow, and 32 elsewhere.
    saved, built = (
        {
            name: f"{_INTS.sub('int', entry.dtype)} {entry.shape}"
            for name, entry in each.items()
        }
        for each in (entries, states.weight_entries(parts))
    )
    _check_equal("weights", saved, built)
    return model, parts, pending


def give_values(part):
    """Initialize the part's own variables, to be overwritten."""
    if isinstance(part, keras.layers.Layer):
        for variable in keras_compat.own_variables(part):
            if not keras_compat.has_value(variable):
                keras_compat.initialize(variable, keras.initializers.Zeros())


def finish(description, model, pending):
    """Initialize what no part saves, and compile what compiles itself."""
    items = reparameterization.reparameterizations(model)
    released = {id(i.target.variable) for i in items if not i.keeps_stored}
    for variable in pending:
        is_released = id(variable) in released
        if not (keras_compat.has_value(variable) or is_released):
            keras_compat.initialize(variable)
    keras_compat.list_torch_parameters(model)
    if description["compiles"]:
        try:
            model.compile()
        except Exception as error:  # what its class raises is not known
            warnings.warn(
                f"{model.name!r} is loaded without being compiled, as its own "
                f"`compile()` raises {type(error).__name__}: {error}. Call "
                "`compile` with a loss before `fit`.",
                stacklevel=3,
            )


def rehearsed(description, parts, entries):
    """Return a description from which the model is built again as it is.

    Args:
        description: Dict as from `describe`, of JSON.
        parts: Dict from name to part, from `states.walk`.
        entries: Dict from name to `Entry`, of the weights of the parts.

    Raises:
        ValueError: If there is none.
    """
    first: Any = None
    for changed in _variants(description, parts):
        try:
            with keras_compat.without_traces():
                _, built, _ = build(changed, entries, classes_of(parts))
                _check_constants(parts, built)
                states.check_quantizers(parts, built)
        # What the code of a model's classes raises is not known.
        except Exception as error:
            first = first or error
        else:
            _warn_of_constraints(parts, built)
            return changed
    raise ValueError(
        "A model is saved only if it can be built again from what its "
        "`get_config()` returns. Its own classes and functions must be "
        "registered by `keras.saving.register_keras_serializable`, and "
        f"`get_config` must return all arguments. {message(first)}"
    ) from first


def _variants(description, parts):
    """Yield a description as it is, and without the names of some models.

    A model that was made without a name returns the one that Keras gave it,
    and some of KerasHub name their layers by a name that is given.
    """
    yield description
    models = {each for each in parts.values() if isinstance(each, keras.Model)}
    classes = {keras.saving.get_registered_name(type(each)) for each in models}
    for unnamed in (classes, *({each} for each in sorted(classes))):
        changed = copy.deepcopy(description)
        for each in _objects(changed["config"]):
            if each.get("registered_name") in unnamed:
                each["config"]["name"] = None
        yield changed


def _check_constants(parts, built):
    """Raise ValueError if graphs compute with other tensors than before.

    A graph keeps what was made of a variable's value outside of a layer, as
    it was in that moment: it is no weight, and follows none.
    """

    def constants(part):
        graph = keras_compat.graph_of(part)
        found = [] if graph is None else keras_compat.constants_of(graph)
        arrays = map(keras.ops.convert_to_numpy, found)
        # Compare bits: NaN is equal to itself.
        return [(x.dtype.name, x.shape, x.tobytes()) for x in arrays]

    for name, part in parts.items():
        if constants(part) != constants(built.get(name)):
            raise ValueError(
                f"The graph of {part.name!r} computes with a tensor that is "
                "none of its weights, and would have other values. Compute it "
                "in the `call` of a layer"
            )


def _warn_of_constraints(parts, built):
    """Warn of constraints that were set on variables, past the config."""

    def constrained(parts):
        return {
            f"{name}/{i}": variable.path
            for name, part in parts.items()
            if isinstance(part, keras.layers.Layer)
            for i, variable in enumerate(keras_compat.own_variables(part))
            if variable.constraint is not None
        }

    lost = constrained(parts)
    for key in constrained(built):
        lost.pop(key, None)
    if lost:
        warnings.warn(
            f"The file does not hold the constraints of {len(lost)} weights, "
            f"the first {next(iter(lost.values()))!r}: a `fit` after "
            "`load_model` loses what they keep, unless they are set again, as "
            "by `SemiStructuredSparse.attach`.",
            stacklevel=4,
        )


def message(error):
    """Return what an error of Keras says, without the whole config in it."""
    text = str(error).rpartition("Exception encountered: ")[2]
    text = text.partition("Full object config:")[0].strip()
    return cut(text, 1200)


def made(config, custom_objects):
    """Make an object of its config, where no code is in it."""
    with keras_compat.SafeModeScope(True), keras_compat.ObjectSharingScope():
        return keras.saving.deserialize_keras_object(config, custom_objects)


def _build(description, custom_objects):
    _check_count(description)
    # A copy: `from_config` changes the config that it gets.
    config = copy.deepcopy(description["config"])
    config.pop("compile_config", None)
    model = made(config, custom_objects)
    if not isinstance(model, keras.Model) or not model.built:
        raise ValueError(
            "Expected the config of a built keras.Model. It makes: "
            f"{shown(model)}"
        )
    parts = states.walk(model, like=description["parts"])
    _check_equal("layers", _kinds(description["parts"]), _kinds(_rows(parts)))
    saved, named = (
        {name: str(own) for name, _, own, _ in rows}
        for rows in (description["parts"], _rows(parts))
    )
    if sorted(saved.values()) == sorted(named.values()):
        # None was numbered anew, so that none may have changed places.
        _check_equal("names", saved, named)
    for name, _, own, trainable in description["parts"]:
        part = parts[name]
        if isinstance(part, keras.Model) and own is not None:
            part.name = own  # Keras numbers those without a name anew.
        if getattr(part, "trainable", None) != trainable:
            part.trainable = trainable
    _change(model, parts, description["changes"])
    for name, rank, alpha in description["lora"]:
        if name not in parts or not reparameterization.slots(parts[name]):
            # Its arrays are not in the file, which would not bound them.
            raise ValueError(
                f"LoRA in {shown(name)}, of which no weight is changed"
            )
        parts[name].enable_lora(rank, lora_alpha=alpha)
    return model, parts


def classes_of(parts):
    """Return {name: class}: what a user gives `load_model` if need be.

    Keras finds its own by their modules, where a layer may have the name of an
    operation.
    """
    classes = {type(plain_view(part)) for part in parts.values()}
    return {
        keras.saving.get_registered_name(cls): cls
        for cls in classes
        if not cls.__module__.startswith("keras.")
    }


def _rows(parts):
    """Return [name, class, own name, trainable or not] of each part."""
    return [
        [name, type(part).__name__]
        + [getattr(part, key, None) for key in ("name", "trainable")]
        for name, part in parts.items()
        # A preprocessor of KerasHub makes its packer when it is first used.
        if not name.startswith("preprocessor/") or hasattr(part, "save_assets")
    ]


def _kinds(rows):
    """Return {name: class and own name, without the numbers of Keras}."""
    return {
        name: f"{kind} {_NUMBER.sub('', str(own))!r}"
        for name, kind, own, _ in rows
    }


def _check_equal(kind, saved, built):
    """Raise ValueError unless two dicts of strings are equal."""
    different = [
        f"{name} ({saved.get(name, 'none')} saved, "
        f"{built.get(name, 'none')} built)"
        for name in {**saved, **built}
        if saved.get(name) != built.get(name)
    ]
    if different:
        raise ValueError(
            f"Expected the {len(saved)} {kind} that were saved. "
            f"{len(different)} differ: "
            f"{', '.join(cut(each, 200) for each in different[:5])}"
        )


def _change(model, parts, rows):
    kinds = reparameterization.KINDS
    keys = weight_keys(model)
    layers = [parts.get(name) for name, *_ in rows]
    order = execution_order(
        model, [x for x in layers if isinstance(x, keras.layers.Layer)]
    )
    items: dict[Any, Any] = {}
    for layer, (name, attribute, kind, config) in zip(layers, rows):
        if kind not in kinds:
            raise ValueError(
                f"Expected one of the changes {sorted(kinds)} for layer "
                f"{shown(name)}. Received: {shown(kind)}. One of your own has "
                "a `name`, and its module is imported first"
            )
        key = (id(layer), attribute)
        if not isinstance(layer, keras.layers.Layer) or key in items:
            raise ValueError(
                f"Expected one change of a weight {shown(attribute)} in layer "
                f"{shown(name)}"
            )
        depth = order.get(id(layer), len(order))
        target = target_of(layer, attribute, keys=keys, depth=depth)
        reason = seam.reason_to_skip(target)
        if reason is not None:
            raise ValueError(f"Layer {name!r} cannot be changed: {reason}")
        items[key] = kinds[kind].from_config(target, config)
    if items:
        seam.attach(model, list(items.values()))


def _complete(config, model):
    """Give configs the arguments that they forget, and take compilation out.

    `LlamaBackbone.get_config()` forgets `tie_word_embeddings`, for instance.

    Args:
        config: Dict from `keras.saving.serialize_keras_object(model)`; it is
            changed.
        model: The model.
    """
    layers = collections.defaultdict(list)
    for layer in keras_compat.layers_of(model):
        layers[type(layer).__name__, layer.name].append(layer)
    for each in _objects(config):
        each.pop("compile_config", None)
        inner = each.get("config")
        if not isinstance(inner, dict):
            continue
        found = layers[each["class_name"], inner.get("name")]
        wanted = [_completed(layer, inner) for layer in found]
        if any(other != wanted[0] for other in wanted):
            raise ValueError(
                "Expected layers of one class and name to keep the same "
                "arguments that their configs lack. Received: "
                f"{each['class_name']} {inner['name']!r}"
            )
        if wanted:
            each["config"] = wanted[0]
        if found and isinstance(found[0], AttachedLayer):
            # The generated class has no public name.
            plain = keras.saving.serialize_keras_object(plain_view(found[0]))
            each |= {key: plain[key] for key in ("module", "registered_name")}


def _completed(layer, config):
    config = dict(config)
    arguments = inspect.signature(type(layer).__init__).parameters
    for name, argument in arguments.items():
        value = keras_compat.attributes(layer).get(name)
        if (
            name not in config
            and type(value) in (bool, int, float, str)
            and value != argument.default
        ):
            config[name] = value
    if reparameterization.slots(layer):
        # Recorded beside the config, and enabled in its turn.
        config.pop("lora_rank", None)
        config.pop("lora_alpha", None)
    return config
