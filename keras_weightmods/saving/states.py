"""What the parts of a model keep: their variables and their assets.

The parts have the names that they have in Keras' own files, made of the
attributes that hold them: "layers/dense_1", "layers/llama_backbone/layers/...".
These are unique, where the paths of variables are not, and the same on every
backend, where the order of `model.weights` is not.
"""

import collections
import collections.abc
import functools
import os
import pathlib
import tempfile
from typing import Any

import keras
import numpy as np

from keras_weightmods.core.keras_private import (
    KerasSaveable,
    to_snake_case,
    walk_saveable,
)
from keras_weightmods.core.seam import (
    checkpoint_arrays,
    is_reparameterized,
)
from keras_weightmods.saving.container import DTYPES, Entry

_WEIGHTS = "weights"
_ASSETS = "assets"


def walk(model, left_out=()):
    """Finds the parts of a model that may keep something.

    Optimizers, losses and metrics are not among them.

    Returns:
        Dict from name to part, a layer mostly; a part comes before its own.
    """
    found = {}
    # The objects, and not only their ids, which are free again after them.
    visited = {id(each): each for each in left_out}

    def visit(name, part):
        is_part = isinstance(part, KerasSaveable)
        if not is_part and not isinstance(part, (list, dict, tuple)):
            return
        if id(part) in visited or isinstance(part, _OF_TRAINING):
            return
        visited[id(part)] = part
        if is_part:
            found[name] = part
            for attribute, child in walk_saveable(part):
                visit(_join(name, attribute), child)
            return
        used: collections.Counter[str] = collections.Counter()
        for child in part.values() if isinstance(part, dict) else part:
            kind = "container"
            if isinstance(child, KerasSaveable):
                kind = to_snake_case(type(child).__name__)
            elif not isinstance(child, (list, dict, tuple)):
                continue
            number = f"_{used[kind]}" if used[kind] else ""
            used[kind] += 1
            visit(_join(name, kind + number), child)

    visit("", model)
    return found


_OF_TRAINING = (
    keras.losses.Loss,
    keras.metrics.Metric,
    keras.optimizers.Optimizer,
)


def weight_entries(parts):
    """Dict from name to `Entry` of all that the parts would save."""
    entries = {}
    for part_name, part in parts.items():
        for key, (shape, dtype) in _saved_arrays(part).items():
            name = _join(_WEIGHTS, part_name, key)
            if dtype not in DTYPES or "/" in key:
                raise ValueError(
                    "A weight must have a name without a slash and one of the "
                    f"dtypes {', '.join(DTYPES)}. Received: {name!r} of dtype "
                    f"{dtype}"
                )
            entries[name] = Entry(shape, dtype)
    return entries


def write_weights(parts, writer):
    """Writes all that the parts save, one after another."""
    for name, part in parts.items():
        if hasattr(part, "save_own_variables"):
            part.save_own_variables(_Writing(name, writer))


def load(parts, reader, folder, prepare):
    """Gives the parts their weights and assets, one after another.

    Args:
        parts: Dict from name to part.
        reader: `Reader`, with the weights that the parts would save.
        folder: String, where `extract_assets` put the assets.
        prepare: Callable, called with each part before.
    """
    names: dict[str, dict[str, str]] = collections.defaultdict(dict)
    for name in reader.entries:
        if is_weight(name):
            part, _, key = name.removeprefix(_WEIGHTS + "/").rpartition("/")
            names[part][key] = name
    for name, part in parts.items():
        prepare(part)
        try:
            if hasattr(part, "load_own_variables"):
                part.load_own_variables(_Stored(names[name], reader))
            _load_assets(name, part, folder)
        # What the code of a model's classes raises is not known.
        except Exception as error:
            raise reader.error(
                _join(_WEIGHTS, name),
                f"or its assets cannot be loaded into {part!r} ({error})",
            ) from error


def is_weight(entry):
    """Whether an entry of a file, by its name, is a weight."""
    return entry.startswith(_WEIGHTS + "/")


def is_asset(entry):
    """Whether an entry of a file, by its name, is an asset."""
    return entry.startswith(_ASSETS + "/")


def save_assets(parts, folder):
    """Saves what the parts keep in files, and returns {entry: file}."""
    for name, part in parts.items():
        if hasattr(part, "save_assets"):
            place = os.path.join(folder, name)
            os.makedirs(place, exist_ok=True)
            part.save_assets(place)
    files = sorted(f for f in pathlib.Path(folder).rglob("*") if f.is_file())
    return {
        _join(_ASSETS, file.relative_to(folder).as_posix()): file
        for file in files
    }


def copy_assets(parts, others):
    """Lets `others` load what `parts`, of the same names, keep in files."""
    with tempfile.TemporaryDirectory() as folder:
        save_assets(parts, folder)
        for name, part in others.items():
            _load_assets(name, part, folder)


def _load_assets(name, part, folder):
    if hasattr(part, "load_assets"):
        place = os.path.join(folder, name)
        os.makedirs(place, exist_ok=True)
        part.load_assets(place)


def extract_assets(reader, folder):
    """Puts the assets of a file in `folder`, where `load` looks for them."""
    for name in reader.entries:
        if not is_asset(name):
            continue
        parts = name.split("/")[1:]
        if any(
            each in ("", ".", "..") or not {"\\", ":"}.isdisjoint(each)
            for each in parts
        ):
            raise reader.error(name, "must be named as a file in a folder")
        file = pathlib.Path(folder, *parts)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            reader.read(name).tofile(file)
        except OSError as error:
            raise reader.error(
                name, f"cannot be put in a temporary folder ({error})"
            ) from error


def check_assets(parts, reader):
    """Raises ValueError if an asset belongs to none of the parts."""
    folders = tuple(
        _join(_ASSETS, name) + "/"
        for name, part in parts.items()
        if hasattr(part, "load_assets")
    )
    for name in reader.entries:
        if is_asset(name) and not name.startswith(folders):
            raise reader.error(name, "belongs to no part of the model")


def _saved_arrays(part):
    """{key: (shape, dtype)} of what `part` would save."""
    if not hasattr(part, "save_own_variables"):
        return {}
    # Without computing what it would save, or reading a value.
    if isinstance(part, keras.layers.Layer) and is_reparameterized(part):
        return checkpoint_arrays(part)
    saved: dict[str, Any] = {}
    part.save_own_variables(saved)
    for key, value in saved.items():
        if not hasattr(value, "dtype"):
            saved[key] = np.asarray(value)
    return {
        key: (
            tuple(map(int, value.shape)),
            keras.backend.standardize_dtype(value.dtype),
        )
        for key, value in saved.items()
    }


class _Writing:
    """Where a part saves its variables; each is written at once."""

    def __init__(self, part, writer):
        self._part = part
        self._writer = writer

    def __setitem__(self, key, value):
        self._writer.write(
            _join(_WEIGHTS, self._part, key), keras.ops.convert_to_numpy(value)
        )


class _Stored(collections.abc.Mapping):
    """What a part finds of its variables in a file; read when asked for."""

    def __init__(self, names, reader):
        self._names = names
        self._read = functools.cache(reader.read)

    def __getitem__(self, key):
        return self._read(self._names[key])

    def __iter__(self):
        return iter(self._names)

    def __len__(self):
        return len(self._names)


def _join(*names):
    return "/".join(filter(None, names))
