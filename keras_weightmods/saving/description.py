"""What a file records of a model beside its arrays, and how to build it."""

import collections
import contextlib
import copy
import inspect
import itertools
import json
import re
import sys
import warnings
from typing import Any

import keras

from keras_weightmods.core import keras_compat, reparameterization, seam
from keras_weightmods.core.execution_order import execution_order
from keras_weightmods.core.targets import target_of
from keras_weightmods.core.weight_keys import weight_keys
from keras_weightmods.saving import states
from keras_weightmods.saving.container import DTYPES
from keras_weightmods.version import __version__


def describe(model, parts, left_out):
    """Describe a model whose layers have their plain classes.

    Args:
        model: The model.
        parts: Dict from name to part, from `states.walk`.
        left_out: List, empty or of the preprocessor that is not saved.

    Returns:
        Dict, of JSON.
    """
    # A loss may be one that Keras cannot serialize.
    changed: dict[str, Any] = {"get_compile_config": lambda: None}
    if left_out:
        changed["_preprocessor"] = None
    with keras_compat.ObjectSharingScope():
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
    return {
        "keras_weightmods_version": __version__,
        "keras_version": keras.__version__,
        "config": config,
        "compiles": compiles,
        "with_values": False,
        "parts": _rows(parts),
        "changes": _changes(model, parts),
        "lora": [
            [name, part.lora_rank, part.lora_alpha, _lora_is_first(part)]
            for name, part in parts.items()
            if reparameterization.slots(part)
            and getattr(part, "lora_enabled", False)
        ],
    }


def check(description):
    """Raise ValueError if a description from a file has another form."""
    if isinstance(description, dict):
        # Files from before it was recorded are built without values.
        description.setdefault("with_values", False)
    if not isinstance(description, dict) or set(description) != set(_FORMS):
        raise ValueError(f"must have the keys {sorted(_FORMS)}")
    for key, form in _FORMS.items():
        value = description[key]
        valid = isinstance(value, list if isinstance(form, list) else form)
        if isinstance(form, list) and valid:
            valid = all(
                isinstance(row, list)
                and len(row) == len(form)
                and all(map(isinstance, row, form))
                for row in value
            )
        if not valid:
            raise ValueError(f"has a {key!r} of another form")
    _check_arrays(description["config"])


def _check_arrays(config):
    """Raise ValueError for an array that is none of numbers.

    NumPy reads a dtype as `V1000000000` from a string.
    """
    for each in _objects(config):
        if each["class_name"] in ("__numpy__", "__tensor__"):
            inner = each.get("config")
            dtype = inner.get("dtype") if isinstance(inner, dict) else None
            if not isinstance(dtype, str) or dtype not in DTYPES:
                raise ValueError(f"has an array of the dtype {dtype!r}")


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


# Types of the values; those in a list are of the columns of a table.
_FORMS: dict[str, Any] = {
    "keras_weightmods_version": str,
    "keras_version": str,
    "config": dict,
    "compiles": bool,
    "with_values": bool,
    "parts": [str, str, (str, type(None)), (bool, type(None))],
    "changes": [str, str, str, dict],
    "lora": [str, int, (int, float), bool],
}


def build(description, custom_objects=None):
    """Build the model, with its changes in place.

    Keras builds it in a `StatelessScope`, where variables get no values and
    take no memory. Where its classes make variables of values, as KerasHub's
    T5Gemma 2 does, it is built as usual.

    Args:
        description: Dict as from `describe`, of JSON.
        custom_objects: Dict as for `keras.saving.load_model`.

    Returns:
        Triple of the model, the dict of its parts, and the list of variables
        that have no value yet: `give_values` initializes those of a part,
        `finish` the others.
    """
    if description["with_values"]:
        return (*_build(description, custom_objects), [])
    with keras_compat.without_values() as pending:
        return (*_build(description, custom_objects), pending)


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
        # What the code of its class raises is not known.
        except Exception as error:
            warnings.warn(
                f"{model.name!r} is loaded without being compiled, as its own "
                f"`compile()` raises {type(error).__name__}: {message(error)}. "
                "Call `compile` with a loss before `fit`.",
                stacklevel=3,
            )


def check_same(entries, parts):
    """Raise ValueError unless `entries` is what the parts would save."""
    saved, built = (
        {name: f"{entry.dtype} {entry.shape}" for name, entry in each.items()}
        for each in (entries, states.weight_entries(parts))
    )
    _check_equal("weights", saved, built)


def rehearsed(description, parts, entries):
    """Return a description from which the model is built again as it is.

    Args:
        description: Dict as from `describe`, of JSON.
        parts: Dict from name to part, from `states.walk`.
        entries: Dict from name to `Entry`, of the weights of the parts.

    Raises:
        ValueError: If there is none.
    """
    try:
        _rehearse(description, parts, entries)
        return description
    except ValueError as error:
        first = error
    if "stateless scope" in str(first):
        # Some class makes a variable of a value.
        return rehearsed({**description, "with_values": True}, parts, entries)
    # A model that was made without a name returns the one that Keras gave it,
    # and some of KerasHub name their layers by a name that is given.
    classes = {
        keras.saving.get_registered_name(type(part))
        for part in parts.values()
        if isinstance(part, keras.Model)
    }
    for unnamed in (classes, *({each} for each in sorted(classes))):
        config = _without_names(description["config"], unnamed)
        changed = {**description, "config": config}
        with contextlib.suppress(ValueError):
            _rehearse(changed, parts, entries)
            return changed
    raise first


def _without_names(config, classes):
    """Return a config without the names of objects of these classes."""
    config = copy.deepcopy(config)
    for each in _objects(config):
        if each.get("registered_name") in classes:
            each["config"] = {**each["config"], "name": None}
    return config


def _rehearse(description, parts, entries):
    with keras_compat.without_traces():
        try:
            _, built, _ = build(description, _classes(parts))
            check_same(entries, built)
            _check_constants(parts, built)
            states.check_quantizers(parts, built)
        # What the code of a model's classes raises is not known.
        except Exception as error:
            raise ValueError(
                "A model is saved only if it can be built again from what its "
                "`get_config()` returns. Its own classes and functions must be "
                "registered by `keras.saving.register_keras_serializable`, and "
                f"`get_config` must return all arguments. {message(error)}"
            ) from error


def _check_constants(parts, built):
    """Raise ValueError if graphs compute with other tensors than before.

    A graph keeps what was made of a variable's value outside of a layer, as
    it was in that moment: it is no weight, and follows none.
    """
    for name, part in parts.items():
        if _constants(part) != _constants(built.get(name)):
            raise ValueError(
                f"The graph of {part.name!r} computes with a tensor that is "
                "none of its weights, such as what an operation outside of a "
                "layer makes of a variable: it would have other values. "
                "Compute it in the `call` of a layer"
            )


def _constants(part):
    graph = keras_compat.graph_of(part)
    if graph is None:
        return []
    arrays = map(keras.ops.convert_to_numpy, keras_compat.constants_of(graph))
    # As bits: NaN is equal to itself.
    return [(x.dtype.name, x.shape, x.tobytes()) for x in arrays]


def message(error):
    """Return what an error of Keras says, without the whole config in it."""
    text = str(error).rpartition("Exception encountered: ")[2]
    text = text.partition("Full object config:")[0].strip()
    return text if len(text) <= 2000 else f"{text[:2000]}..."


def reason_against(preprocessor):
    """Return why a preprocessor cannot be restored, or None."""
    try:
        with keras_compat.without_traces():
            parts = states.walk(preprocessor)
            config = keras.saving.serialize_keras_object(preprocessor)
            config = json.loads(json.dumps(config))
            with keras_compat.SafeModeScope(True):
                built = keras.saving.deserialize_keras_object(
                    config, _classes(parts)
                )
            states.copy_assets(parts, states.walk(built))
    # What the code of its class raises is not known.
    except Exception as error:
        return f"{type(error).__name__}: {message(error)}"
    return None


def _build(description, custom_objects):
    # A copy: `from_config` changes the config that it gets.
    config = copy.deepcopy(description["config"])
    config.pop("compile_config", None)
    with keras_compat.SafeModeScope(True), keras_compat.ObjectSharingScope():
        model = keras.saving.deserialize_keras_object(config, custom_objects)
    if not isinstance(model, keras.Model) or not model.built:
        raise ValueError(
            f"Expected the config of a built keras.Model. It makes: {model!r}"
        )
    parts = states.walk(model)
    _check_parts(description["parts"], parts)
    for name, _, own, trainable in description["parts"]:
        part = parts[name]
        if isinstance(part, keras.Model) and own is not None:
            part.name = own  # Keras numbers those without a name anew.
        if getattr(part, "trainable", None) != trainable:
            part.trainable = trainable
    # In the order in which they came, so that the weights are in order too.
    _enable_lora(parts, description, first=True)
    _change(model, parts, description["changes"])
    _enable_lora(parts, description, first=False)
    return model, parts


def _enable_lora(parts, description, first):
    changed = {name for name, *_ in description["changes"]}
    changed |= {name for name in parts if reparameterization.slots(parts[name])}
    for name, rank, alpha, is_first in description["lora"]:
        if name not in parts.keys() & changed:
            # Its arrays are not in the file, which would not bound them.
            raise ValueError(f"LoRA in {name!r}, of which no weight is changed")
        if is_first == first:
            parts[name].enable_lora(rank, lora_alpha=alpha)


def _lora_is_first(layer):
    """Return whether LoRA came before the change of the weight in place."""
    own = [id(variable) for variable in layer.weights]
    lora = min(
        own.index(id(variable))
        for name, variable in keras_compat.attributes(layer).items()
        if name.startswith("lora_") and isinstance(variable, keras.Variable)
    )
    return all(
        lora < own.index(id(parameter))
        for item in reparameterization.reparameterizations(layer)
        for parameter in item.parameters
    )


def _classes(parts):
    """Return {name: class}: what a user gives `load_model` if need be."""
    classes = {type(part) for part in parts.values()}
    return {keras.saving.get_registered_name(cls): cls for cls in classes}


def _rows(parts):
    """Return [name, class, own name, trainable or not] of each part."""
    return [
        [name, type(part).__name__]
        + [getattr(part, key, None) for key in ("name", "trainable")]
        for name, part in parts.items()
        # A preprocessor of KerasHub makes its packer when it is first used.
        if not name.startswith("preprocessor/") or hasattr(part, "save_assets")
    ]


def _check_parts(rows, parts):
    """Raise ValueError if the parts are not those of `rows`.

    Their own names may differ in the numbers that Keras gives to layers
    without a name; then the order must be the same, so that two layers of one
    kind cannot have changed places.
    """
    built = _rows(parts)
    _check_equal(
        "layers", *({r[0]: r[1] for r in each} for each in (rows, built))
    )
    names = {name: own for name, _, own, _ in built}
    renamed = [
        (_numbered(own), _numbered(names[name]))
        for name, _, own, _ in rows
        if own != names[name]
    ]
    for (base, _), (other, _) in renamed:
        if base != other:
            raise ValueError(f"A layer {base!r} would be named {other!r}")
    for first, second in itertools.pairwise(sorted(renamed)):
        if first[0][0] == second[0][0] and first[1] > second[1]:
            raise ValueError(
                f"Two layers {first[0][0]!r} would have changed places"
            )


def _numbered(name):
    # Keras clones an input to "keras_tensor_7CLONE".
    found = re.fullmatch(r"(.*)_(\d+)((?:CLONE)*)", str(name), re.DOTALL)
    return (found[1] + found[3], int(found[2])) if found else (str(name), 0)


def _check_equal(kind, saved, built):
    """Raise ValueError unless two dicts of strings are equal."""
    problems = {
        "not built": [name for name in saved if name not in built],
        "built in addition": [name for name in built if name not in saved],
        "built differently": [
            f"{name} ({value}, not {built[name]})"
            for name, value in saved.items()
            if built.get(name, value) != value
        ],
    }
    if any(problems.values()):
        lists = "; ".join(
            f"{len(names)} {problem}: {', '.join(names[:5])}"
            for problem, names in problems.items()
            if names
        )
        raise ValueError(
            f"Expected the {len(saved)} {kind} that were saved. {lists}"
        )


def _changes(model, parts):
    """Return [part, attribute, kind, config] of each change in place."""
    names = {id(part): name for name, part in parts.items()}
    rows = []
    for item in reparameterization.reparameterizations(model):
        if item.is_own:
            continue
        if item.name is None:
            raise ValueError(
                f"Expected only changes of weights that have a `name`, by "
                f"which `load_model` makes them again. Call `{item.finish}` "
                f"first. Received: {type(item).__name__} on "
                f"{item.target.path!r}"
            )
        layer, attribute = item.target.layer, item.target.attribute
        rows.append([names[id(layer)], attribute, item.name, item.get_config()])
    return rows


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
                f"{name!r}. Received: {kind!r}. If it is of your own, import "
                "its module first"
            )
        key = (id(layer), attribute)
        if not isinstance(layer, keras.layers.Layer) or key in items:
            raise ValueError(
                f"Expected one change of a weight {attribute!r} in layer "
                f"{name!r}"
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
