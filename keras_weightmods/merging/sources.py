"""Where merging reads models from: files, an array at a time, or memory."""

import dataclasses
import functools
import os
import threading
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_weightmods.core import keras_compat
from keras_weightmods.core.reparameterization import reparameterizations
from keras_weightmods.core.targets import kernel_axes
from keras_weightmods.patches import architecture
from keras_weightmods.patches.checkpoint import FLOATS, Checkpoint
from keras_weightmods.saving import model as model_file
from keras_weightmods.saving import states
from keras_weightmods.saving.file_kinds import kind_of
from keras_weightmods.utils import checks


@dataclasses.dataclass(frozen=True, eq=False)
class Weight:
    """One array of a model, as a file of `save_model` names it.

    Attributes:
        name: String, of the entry of a file.
        path: String, of the variable.
        shape, dtype: Of the array.
        place: Callable that returns a float in [0, 1], of its layer from the
            first to the last. For it the model is run, on symbols.
        kept: String, why it is not merged; `None` if it is.
        is_statistic: Bool, a moving mean or variance.
        axes: Pair of the contraction and stack axes of a kernel, or `None`.
    """

    name: str
    path: str
    shape: tuple[int, ...]
    dtype: str
    place: Callable[[], float]
    kept: str | None
    is_statistic: bool
    axes: Any


class FileSource:
    """A file of `save_model`, of which the header is checked at first.

    Args:
        argument: String, what it is in messages.
        filepath: String or path.

    Raises:
        ValueError: If it is no such file, or its weights are packed,
            reparameterized or quantized.
        OSError: If it cannot be read.
    """

    def __init__(self, argument: str, filepath: Any) -> None:
        self.argument = argument
        self.filepath = os.fspath(filepath)
        self.reader = model_file.open_model(filepath)
        try:
            self.described = model_file.read_description(self.reader)
        except BaseException:
            self.close()
            raise
        self.entries = {
            name: entry
            for name, entry in self.reader.entries.items()
            if states.is_weight(name)
        }
        # Names of layers count; those that Keras has numbered may differ.
        self.layers = [tuple(row[:2]) for row in self.described["parts"]]
        self.changed = bool(self.described["changes"] or self.described["lora"])

    def part(self, name: str, part: slice) -> np.ndarray:
        """Return a part of an array, flattened."""
        return self.reader.read_part(name, part.start, part.stop)

    def check_data(self) -> None:
        """Raise ValueError if the data do not have their checksums."""
        self.reader.check_data()

    def model(self, custom_objects: Any) -> Any:
        """Return the model, mostly without values."""
        return model_file.build_model(
            self.reader, self.described, custom_objects
        )[0]

    def close(self) -> None:
        """Close the file."""
        self.reader.close()


class ModelSource:
    """A model in memory, in the same form.

    Args:
        argument: String, what it is in messages.
        model: A built Keras model.

    Raises:
        ValueError: If it is something else.
    """

    def __init__(self, argument: str, model: Any) -> None:
        if not isinstance(model, keras.Model) or not model.built:
            expected = "a built Keras model, or a file of `save_model`"
            raise checks.error(argument, expected, model)
        self.argument = argument
        self._model = model
        parts = states.walk(model)
        self.entries = states.weight_entries(parts)
        self.variables = variables_of(parts)
        self.layers = [
            (name, type(part).__name__) for name, part in parts.items()
        ]
        self.changed = is_changed(model)
        self._read: tuple[str, Any] = ("", None)
        self._reading = threading.Lock()

    def part(self, name: str, part: slice) -> np.ndarray:
        """Return a part of an array, flattened."""
        with self._reading:
            if self._read[0] != name:
                array = keras.ops.convert_to_numpy(self.variables[name])
                self._read = name, np.ascontiguousarray(array).reshape(-1)
            found: np.ndarray = self._read[1][part]
        return found

    def check_data(self) -> None:
        """Do nothing: there is no file."""

    def model(self, custom_objects: Any) -> Any:
        """Return the model."""
        return self._model

    def close(self) -> None:
        """Do nothing: there is no file."""


def open_source(argument: str, given: Any, custom_objects: Any = None) -> Any:
    """Return the source that a model, or the path of a file, stands for."""
    if not isinstance(given, (str, os.PathLike)):
        return ModelSource(argument, given)
    if os.path.isfile(given) and kind_of(given)[0] == "a .keras file":
        model = keras.saving.load_model(given, custom_objects, compile=False)
        return ModelSource(argument, model)
    return FileSource(argument, given)


def variables_of(parts: Any) -> dict[str, Any]:
    """Return {name of an entry: variable} of the parts of a model."""
    return {
        states.weight_name(name, key): value
        for name, part in parts.items()
        for key, value in states.saved(part).items()
    }


def is_changed(model: Any) -> bool:
    """Return whether weights are packed, quantized, with LoRA or the like."""
    return bool(reparameterizations(model)) or any(
        getattr(layer, "quantization_mode", None)
        or getattr(layer, "lora_enabled", False)
        for layer in keras_compat.layers_of(model)
    )


def source_problems(sources: Any, template: Any) -> list[str]:
    """Return what keeps models from being merged, their headers read alone.

    Args:
        sources: List of sources.
        template: The one whose arrays the others must have.
    """
    found = []
    for source in sources:
        name = f"`{source.argument}`"
        if source.changed:
            found.append(
                f"{name}: weights that are packed, reparameterized, quantized "
                "or with LoRA. Unpack, fold, dequantize or merge them first"
            )
        if source is template:
            continue
        for entry in {**template.entries, **source.entries}:
            mine, theirs = (
                each.entries.get(entry) for each in (source, template)
            )
            if mine is None or theirs is None:
                where = "has no" if mine is None else "has in addition"
                found.append(f"{name} {where} {entry!r}")
            elif mine.shape != theirs.shape or (
                mine.dtype != theirs.dtype
                and not {mine.dtype, theirs.dtype} <= {*FLOATS}
            ):
                found.append(
                    f"{name}, {entry}: {mine.dtype} of shape {mine.shape}, "
                    f"and {theirs.dtype} of {theirs.shape} is expected"
                )
        kinds = dict(template.layers)
        found += [
            f"{name}, {part or 'the model'}: {kind}, and {kinds[part]} is "
            "expected"
            for part, kind in source.layers
            if kinds.get(part, kind) != kind
        ]
    return found


def weights_of(source: Any, model: Any) -> list[Weight]:
    """Return the `Weight`s of a model, in the order of a file's entries.

    Args:
        source: The source of the model.
        model: The model, which may be without values.
    """
    checkpoint = Checkpoint("model", model)
    roles = architecture.roles(checkpoint)

    @functools.cache
    def places():
        depths = architecture.depths(checkpoint, roles)
        return [depth / (max(depths) or 1) for depth in depths]

    positions = {id(v): i for i, v in enumerate(checkpoint.variables)}
    axes = kernel_axes(model)
    variables = variables_of(states.walk(model))
    found = []
    for name, entry in source.entries.items():
        variable = variables[name]
        position = positions.get(id(variable))
        role, path = "other", getattr(variable, "path", name)
        if position is not None:
            role, path = roles[position], checkpoint.infos[position].path
        reason = None
        if entry.dtype not in FLOATS:
            reason = f"{entry.dtype}, no floats"
        elif role == "other":
            reason = "not trained"
        elif 0 in entry.shape:
            reason = "empty"
        found.append(
            Weight(
                name=name,
                path=path,
                shape=entry.shape,
                dtype=entry.dtype,
                place=lambda p=position: 0.0 if p is None else places()[p],
                kept=reason,
                is_statistic=role == "statistic",
                axes=axes.get(id(variable)),
            )
        )
    return found
