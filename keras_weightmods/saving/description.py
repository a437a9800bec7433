"""What a file tells of a model beside its arrays, and the model built of it."""

import collections
import contextlib
import functools
import inspect
import itertools
import json
import sys
from typing import Any

import keras

from keras_weightmods.core import keras_private, seam
from keras_weightmods.core.keras_private import (
    ObjectSharingScope,
    SafeModeScope,
)
from keras_weightmods.core.targets import Target
from keras_weightmods.saving import states
from keras_weightmods.version import __version__


def describe(model, parts, left_out):
    """Describes a model whose layers have their plain classes, as JSON.

    Args:
        model: The model.
        parts: Dict from name to part, from `states.walk`.
        left_out: List, empty or of the preprocessor that is not saved.
    """
    with _complete_configs(model, left_out), ObjectSharingScope():
        config = keras.saving.serialize_keras_object(model)
    if left_out:
        config["config"]["preprocessor"] = None
    # A KerasHub task compiles itself when made, and an optimizer cannot be
    # made where variables get no value.
    hub = sys.modules.get("keras_hub")
    compiles = hub is not None and isinstance(model, hub.models.Task)
    if compiles:
        config["config"]["compile"] = False
    return {
        "keras_weightmods_version": __version__,
        "keras_version": keras.__version__,
        "config": config,
        "compiles": compiles,
        "parts": _rows(parts),
        "changes": _changes(model, parts),
        "lora": [
            [name, part.lora_rank, part.lora_alpha, _lora_is_first(part)]
            for name, part in parts.items()
            if _is_changed(part) and getattr(part, "lora_enabled", False)
        ],
    }


def check(description):
    """Raises ValueError if a description from a file has another form."""
    forms: dict[str, Any] = {
        "keras_weightmods_version": str,
        "keras_version": str,
        "config": dict,
        "compiles": bool,
        "parts": [str, str, (str, type(None)), (bool, type(None))],
        "changes": [str, str, str, dict],
        "lora": [str, int, (int, float), bool],
    }
    if not isinstance(description, dict) or set(description) != set(forms):
        raise ValueError(f"must tell {sorted(forms)}")
    for key, form in forms.items():
        value = description[key]
        if not isinstance(form, list):
            valid = isinstance(value, form)
        else:
            valid = isinstance(value, list) and all(
                isinstance(row, list)
                and len(row) == len(form)
                and all(map(isinstance, row, form))
                for row in value
            )
        if not valid:
            raise ValueError(f"must tell {key!r} in another form")


def build(description, custom_objects=None):
    """Builds the model, with its changes in place, mostly without values.

    Args:
        description: Dict as from `describe`, of JSON.
        custom_objects: Dict as for `keras.saving.load_model`.

    Returns:
        Triple of the model, the dict of its parts, and the list of variables
        that have no value yet: those of the parts, which `give_values` gives
        some, and others, which `finish` does.
    """
    pending: list[keras.Variable] = []
    try:
        with keras_private.without_values(pending):
            return (*_build(description, custom_objects), pending)
    except Exception as error:
        # Keras' words where a class makes a variable of a value, and not by
        # an initializer.
        if "stateless scope" not in str(error):
            raise
    return (*_build(description, custom_objects), [])


def give_values(part):
    """Initializes the part's own variables, to be overwritten."""
    if isinstance(part, keras.layers.Layer):
        for variable in keras_private.own_variables(part):
            if not keras_private.has_value(variable):
                keras_private.initialize(variable, keras.initializers.Zeros())


def finish(description, model, pending):
    """Initializes what no part saves, and compiles what compiles itself."""
    released = {
        id(item.target.variable)
        for item in seam.reparameterizations(model)
        if not item.keeps_stored
    }
    for variable in pending:
        if (
            not keras_private.has_value(variable)
            and id(variable) not in released
        ):
            keras_private.initialize(variable)
    if description["compiles"]:
        model.compile()


def check_same(entries, parts):
    """Raises ValueError unless `entries` is what the parts would save."""
    built = states.weight_entries(parts)
    differing = [
        f"{name} ({entries[name].dtype} {entries[name].shape}, not "
        f"{built[name].dtype} {built[name].shape})"
        for name in entries
        if name in built and entries[name] != built[name]
    ]
    _raise_difference("weight", entries, built, differing)


def rehearse(description, parts, entries):
    """Raises ValueError if the model would not be built again as it is.

    Args:
        description: Dict as from `describe`, of JSON.
        parts: Dict from name to part, from `states.walk`.
        entries: Dict from name to `Entry`, of the weights of the parts.
    """
    with keras_private.without_traces():
        try:
            _, built, _ = build(description, _classes(parts))
            check_same(entries, built)
        # What the code of a model's classes raises is not known.
        except Exception as error:
            raise ValueError(
                "A model is saved only if it can be built again from what its "
                "`get_config()` returns. Its own classes and functions must be "
                "registered by `keras.saving.register_keras_serializable`, and "
                f"`get_config` must tell all arguments. {reason(error)}"
            ) from error


def reason(error):
    """What an error of Keras says, without the whole config in it."""
    text = str(error).rpartition("Exception encountered: ")[2]
    text = text.partition("Full object config:")[0].strip()
    return text if len(text) <= 2000 else f"{text[:2000]}..."


def obstacle_of_preprocessor(preprocessor):
    """Says why a preprocessor cannot be brought back; None if it can."""
    try:
        with keras_private.without_traces():
            parts = states.walk(preprocessor)
            config = keras.saving.serialize_keras_object(preprocessor)
            config = json.loads(json.dumps(config))
            with SafeModeScope(True):
                built = keras.saving.deserialize_keras_object(
                    config, _classes(parts)
                )
            states.copy_assets(parts, states.walk(built))
    # What the code of its class raises is not known.
    except Exception as error:
        return f"{type(error).__name__}: {reason(error)}"
    return None


def _build(description, custom_objects):
    # A copy: `from_config` changes the config that it gets.
    config = _without_compile_config(description["config"])
    with SafeModeScope(True), ObjectSharingScope():
        model = keras.saving.deserialize_keras_object(config, custom_objects)
    if not isinstance(model, keras.Model) or not model.built:
        raise ValueError(
            f"Expected the config of a built keras.Model. It makes: {model!r}"
        )
    parts = states.walk(model)
    _check_parts(description["parts"], parts)
    for name, _, _, trainable in description["parts"]:
        if getattr(parts[name], "trainable", None) != trainable:
            parts[name].trainable = trainable
    # In the order in which they came, so that the weights are in order too.
    _enable_lora(parts, description["lora"], first=True)
    _change(model, parts, description["changes"])
    _enable_lora(parts, description["lora"], first=False)
    return model, parts


def _enable_lora(parts, rows, first):
    for name, rank, alpha, is_first in rows:
        if is_first == first:
            parts[name].enable_lora(rank, lora_alpha=alpha)


def _lora_is_first(layer):
    """Whether LoRA was enabled before the weight was changed in place."""
    own = [id(variable) for variable in layer.weights]
    lora = min(
        own.index(id(variable))
        for name, variable in keras_private.attributes(layer).items()
        if name.startswith("lora_") and isinstance(variable, keras.Variable)
    )
    return all(
        lora < own.index(id(parameter))
        for item in seam.reparameterizations(layer)
        for parameter in item.parameters
    )


def _is_changed(part):
    return isinstance(part, keras.layers.Layer) and seam.is_reparameterized(
        part
    )


def _classes(parts):
    """{name: class}: the user gives `load_model` those not registered."""
    classes = {type(part) for part in parts.values()}
    return {keras.saving.get_registered_name(cls): cls for cls in classes}


def _rows(parts):
    """[name, class, own name, whether it is trainable] of each part."""
    return [
        [
            name,
            type(part).__name__,
            getattr(part, "name", None),
            getattr(part, "trainable", None),
        ]
        for name, part in parts.items()
        if not _is_made_at_use(name, part)
    ]


def _is_made_at_use(name, part):
    # A preprocessor of KerasHub makes its packer when it is first used.
    return name.startswith("preprocessor/") and not hasattr(part, "save_assets")


def _check_parts(rows, parts):
    """Raises ValueError if the parts are not those of `rows`.

    Their own names may differ in the numbers that Keras gives to layers
    without a name; then the order must be the same, so that two layers of one
    kind cannot have changed places.
    """
    expected = {row[0]: row[1:] for row in rows}
    received = {row[0]: row[1:] for row in _rows(parts)}
    differing = [
        f"{name} ({expected[name][0]}, not {received[name][0]})"
        for name in expected
        if name in received and expected[name][0] != received[name][0]
    ]
    _raise_difference("layer", expected, received, differing)
    numbers: dict[str, list[Any]] = collections.defaultdict(list)
    for name, (_, own, _) in expected.items():
        other = received[name][1]
        if own != other:
            before, after = _numbered(own), _numbered(other)
            if before[0] != after[0]:
                raise ValueError(
                    f"Layer {name!r} must be called {own!r}, and would be "
                    f"called {other!r}"
                )
            numbers[before[0]].append((before[1], after[1], own))
    for base in numbers.values():
        base.sort()
        for (_, first, _), (_, second, own) in itertools.pairwise(base):
            if first > second:
                raise ValueError(f"Layer {own!r} would have changed places")


def _numbered(name):
    base, _, number = str(name).rpartition("_")
    return (base, int(number)) if number.isdecimal() else (name, 0)


def _raise_difference(kind, expected, received, differing):
    missing = [name for name in expected if name not in received]
    more = [name for name in received if name not in expected]
    found = {
        "not built": missing,
        "built in addition": more,
        "built differently": differing,
    }
    if any(found.values()):
        raise ValueError(
            f"Expected the {len(expected)} {kind}s that were saved. "
            + "; ".join(
                f"{what}: {', '.join(names[:5])}"
                + (f" and {len(names) - 5} more" if len(names) > 5 else "")
                for what, names in found.items()
                if names
            )
        )


def _changes(model, parts):
    """[part, attribute, kind, config] of each weight changed in place."""
    names = {id(part): name for name, part in parts.items()}
    rows = []
    for item in seam.reparameterizations(model):
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
    kinds = seam.kinds()
    targets: dict[Any, dict[Any, Target]] = {}
    items: list[Any] = []
    changed = set()
    for name, attribute, kind, config in rows:
        if kind not in kinds:
            raise ValueError(
                f"Expected one of the changes {sorted(kinds)} for layer "
                f"{name!r}. Received: {kind!r}. If it is of your own, import "
                "its module first"
            )
        cls = kinds[kind]
        # Of the function, as most kinds share it.
        find = cls.find_targets.__func__
        if find not in targets:
            targets[find] = {
                (id(target.layer), target.attribute): target
                for target in cls.find_targets(model)
            }
        target = targets[find].get((id(parts.get(name)), attribute))
        if target is None or (name, attribute) in changed:
            raise ValueError(
                f"Expected one change of a weight {attribute!r} in layer "
                f"{name!r}"
            )
        obstacle = seam.obstacle(target)
        if obstacle is not None:
            raise ValueError(f"Layer {name!r} cannot be changed: {obstacle}")
        items.append(cls.from_config(target, config))
        changed.add((name, attribute))
    if items:
        seam.attach(model, items)


@contextlib.contextmanager
def _complete_configs(model, left_out):
    """Makes configs tell the arguments that they forget, and no compilation.

    `LlamaBackbone.get_config()` forgets `tie_word_embeddings`, for instance.
    """
    with contextlib.ExitStack() as stack:
        for layer in [*keras_private.layers_of(model), *left_out]:
            complete = functools.partial(
                _complete_config, layer, layer.get_config
            )
            stack.enter_context(
                keras_private.replaced_attributes(
                    layer,
                    get_config=dict if layer in left_out else complete,
                    get_compile_config=lambda: None,
                )
            )
        yield


def _complete_config(layer, get_config):
    config = get_config()
    arguments = inspect.signature(type(layer).__init__).parameters
    for name, argument in arguments.items():
        value = keras_private.attributes(layer).get(name)
        if (
            name not in config
            and type(value) in (bool, int, float, str)
            and value != argument.default
        ):
            config[name] = value
    if _is_changed(layer):
        # It is told beside the config, and enabled in its turn.
        config.pop("lora_rank", None)
        config.pop("lora_alpha", None)
    return config


def _without_compile_config(config):
    if isinstance(config, dict):
        return {
            key: _without_compile_config(value)
            for key, value in config.items()
            if key != "compile_config" or "class_name" not in config
        }
    if isinstance(config, (list, tuple)):
        return [_without_compile_config(value) for value in config]
    return config
