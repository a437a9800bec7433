"""What the parts of a model keep: their variables and their assets.

The parts have the names that they have in Keras' own files, made of the
attributes that hold them: "layers/dense_1", "layers/llama_backbone/layers/...".
These are unique, where the paths of variables are not, and the same on every
backend, where the order of `model.weights` is not.
"""

import collections
import os
import pathlib
import re
from typing import Any

import keras
import numpy as np

from keras_weightmods.backend import whole
from keras_weightmods.core import keras_compat
from keras_weightmods.core.reparameterization import slots
from keras_weightmods.core.reparameterized_layer import (
    checkpoint_arrays,
    plain_view,
)
from keras_weightmods.saving.container import Entry
from keras_weightmods.utils.checks import cut

_WEIGHTS = "weights/"
_ASSETS = "assets/"
GROUPS = _WEIGHTS, _ASSETS
# How a byte-pair tokenizer of `load_gguf` splits text, which its class forgets.
_SPLIT = "text_split.json"
_CONTAINERS = (list, dict, tuple)
_OF_TRAINING = (
    keras.losses.Loss,
    keras.metrics.Metric,
    keras.optimizers.Optimizer,
)


def walk(model, left_out=(), like=()):
    """Find the parts of a model that may keep something.

    Optimizers, losses and metrics are not among them.

    Args:
        model: The model.
        left_out: List of parts to pass over.
        like: Rows [name, class, own name, ...] of the same model on another
            backend, where Keras may list its layers in another order. Parts
            get the names that they have there.

    Returns:
        Dict from name to part, a layer mostly; a part comes before its own.
    """
    found = {}
    # The objects, and not only their ids, which are free again after them.
    visited = {id(each): each for each in left_out}
    own_names = {name: own for name, _, own, *_ in like}

    def visit(name, part):
        is_part = isinstance(part, keras_compat.KerasSaveable)
        if not is_part and not isinstance(part, _CONTAINERS):
            return
        if id(part) in visited or isinstance(part, _OF_TRAINING):
            return
        visited[id(part)] = part
        if is_part:
            found[name] = part
            # Take a plain view: an attached layer would compute its effective
            # weight here.
            for key, child in keras_compat.walk_saveable(plain_view(part)):
                visit(_join(name, key), child)
            return
        # By kind, the names in a file and the parts that they may stand for.
        named: dict[str, dict[str, Any]] = collections.defaultdict(dict)
        used: collections.Counter[str] = collections.Counter()
        order = []
        for child in part.values() if isinstance(part, dict) else part:
            if isinstance(child, keras_compat.KerasSaveable):
                kind = keras_compat.to_snake_case(type(child).__name__)
            elif isinstance(child, _CONTAINERS):
                kind = "container"
            else:
                continue
            number = f"_{used[kind]}" if used[kind] else ""
            used[kind] += 1
            order.append((kind, _join(name, kind + number)))
            if id(child) not in visited:
                named[kind][order[-1][1]] = child
        for kind, children in named.items():
            keys = [key for other, key in order if other == kind]
            saved = {key: own_names[key] for key in keys if key in own_names}
            named[kind] = _as_saved(children, saved)
        for kind, key in order:
            if key in named[kind]:
                visit(key, named[kind][key])

    visit("", model)
    return found


def _as_saved(children, saved):
    """Return {name: part} with the names under which the parts were saved.

    Args:
        children: Dict from name to part, all of one class.
        saved: Dict from name to what the part of that name was called.
    """
    ranks = [
        dict(zip(_ranked(names.values()), keys))
        for names, keys in (
            (saved, saved),
            (
                {k: getattr(x, "name", "") for k, x in children.items()},
                children,
            ),
        )
    ]
    if ranks[0].keys() != ranks[1].keys() or len(ranks[0]) != len(children):
        return children
    return {key: children[ranks[1][rank]] for rank, key in ranks[0].items()}


def _ranked(names):
    """Return names with their numbers as ranks, for Keras counts on."""
    split = [
        (re.sub(r"\d+", "", name), [*map(int, re.findall(r"\d+", name))])
        for name in map(str, names)
    ]
    return [
        (base, sum(other < (base, numbers) for other in split))
        for base, numbers in split
    ]


def weight_entries(parts):
    """Return a dict from name to `Entry` of all that the parts would save."""
    entries = {}
    for part_name, part in parts.items():
        # Without computing what it would save, or reading a value.
        if slots(part):
            arrays = checkpoint_arrays(part)
        else:
            # What the layer's own code assigns meanwhile is dropped: there
            # may be no value to assign to.
            with keras.StatelessScope():
                found = saved(part)
            arrays = {k: (x.shape, x.dtype) for k, x in found.items()}
        for key, (shape, dtype) in arrays.items():
            name = weight_name(part_name, key)
            if "/" in key:
                raise ValueError(
                    "The key of a weight must be without a slash. Received: "
                    f"{key!r}, of {name!r}"
                )
            entries[name] = Entry(
                tuple(map(int, shape)), keras.backend.standardize_dtype(dtype)
            )
    return entries


def check_quantizers(parts, others):
    """Raise ValueError if other parts quantize inputs otherwise than these."""
    for name, part in parts.items():
        mode = getattr(part, "quantization_mode", None)
        found, expected = map(_inputs_quantizer, (others.get(name), part))
        if mode is not None and found != expected:
            raise ValueError(
                f"The layer {part.name!r}, {mode}, would come back with "
                f"{found} for its inputs, where it has {expected}: layers of "
                "KerasHub do not keep how they were quantized. Use "
                "`quantize('int8')`, which is made again as it is"
            )


def _inputs_quantizer(layer):
    quantizer = getattr(layer, "inputs_quantizer", None)
    if quantizer is None:
        return "no quantizer"
    # Layers give it the axis if it has none, and tuples are lists in a file.
    config = {**quantizer.get_config(), "axis": None}
    config["value_range"] = tuple(config.get("value_range", ()))
    return f"{type(quantizer).__name__} {config}"


def weights(parts):
    """Yield the name and the value of all that the parts save."""
    for part_name, part in parts.items():
        for key, value in saved(part).items():
            yield weight_name(part_name, key), whole(value)


def load(parts, reader, folder, prepare, see):
    """Give the parts their weights and assets, one part after another.

    Args:
        parts: Dict from name to part.
        reader: `Reader`, with the weights that the parts would save.
        folder: String, where `extract_assets` put the assets.
        prepare: Callable, called with each part before.
        see: Callable, called with the name of each weight that is loaded.
    """
    keys: dict[str, list[str]] = collections.defaultdict(list)
    for name in filter(is_weight, reader.entries):
        part_name, _, key = name.removeprefix(_WEIGHTS).rpartition("/")
        keys[part_name].append(key)
    for part_name, part in parts.items():
        names = {key: weight_name(part_name, key) for key in keys[part_name]}
        prepare(part)
        try:
            if hasattr(part, "load_own_variables"):
                part.load_own_variables(
                    {key: reader.read(name) for key, name in names.items()}
                )
            load_assets({part_name: part}, folder)
        # What the code of a model's classes raises is not known.
        except Exception as error:
            raise reader.error(
                weight_name(part_name, ""),
                f"or its assets cannot be loaded into {part!r} ({cut(error)})",
            ) from error
        for name in names.values():
            see(name)


def is_weight(entry):
    """Return whether an entry of a file, by its name, is a weight."""
    return entry.startswith(_WEIGHTS)


def save_assets(parts, folder):
    """Save what the parts keep in files, and return {entry: file}."""
    for name, part in parts.items():
        plain = plain_view(part)
        if hasattr(plain, "save_assets"):
            plain.save_assets(_folder_of(name, folder))
            split = keras_compat.text_split(plain)
            if split is not None:
                pathlib.Path(folder, name, _SPLIT).write_bytes(split)
    return {
        _ASSETS + file.relative_to(folder).as_posix(): file
        for file in sorted(pathlib.Path(folder).rglob("*"))
        if file.is_file()
    }


def load_assets(parts, folder):
    """Load what parts of the same names have put into a folder."""
    for name, part in parts.items():
        if hasattr(part, "load_assets"):
            part.load_assets(_folder_of(name, folder))
            split = pathlib.Path(folder, name, _SPLIT)
            if split.is_file():
                keras_compat.restore_text_split(part, split.read_bytes())


def extract_assets(reader, folder):
    """Write the assets of a file to `folder`, where `load` looks for them."""
    folder = pathlib.Path(folder).resolve()
    for name in reader.entries:
        if not name.startswith(_ASSETS):
            continue
        file = (folder / name.removeprefix(_ASSETS)).resolve()
        try:
            if not file.is_relative_to(folder):
                raise OSError("it would lie outside of it")
            file.parent.mkdir(parents=True, exist_ok=True)
            reader.read(name).tofile(file)
        except OSError as error:
            raise reader.error(
                name, f"cannot be put in a temporary folder ({error})"
            ) from error


def saved(part):
    """Return {key: variable or array} of what `part` saves."""
    found: dict[str, Any] = {}
    if hasattr(part, "save_own_variables"):
        policy: Any = getattr(part, "dtype_policy", None)
        is_map = isinstance(policy, keras.dtype_policies.DTypePolicyMap)
        if is_map and part.path:
            # Keras' embeddings look at the map's default when they are saved,
            # and would leave out the scale of what is quantized.
            part = keras_compat.view(part, _dtype_policy=policy[part.path])
        part.save_own_variables(found)
    return {
        key: value if hasattr(value, "dtype") else np.asarray(value)
        for key, value in found.items()
    }


def weight_name(part_name, key):
    """Return the name of the entry of a weight, by its part and its key."""
    return _WEIGHTS + _join(part_name, key)


def _folder_of(name, folder):
    place = os.path.join(folder, name)
    os.makedirs(place, exist_ok=True)
    return place


def _join(name, key):
    return f"{name}/{key}" if name else key
