"""The sources of merging: files, read an array at a time, or memory."""

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_weightmods.core import keras_compat
from keras_weightmods.core.reparameterization import reparameterizations
from keras_weightmods.core.targets import kernel_axes
from keras_weightmods.patches.checkpoint import Checkpoint
from keras_weightmods.patches.entry import FLOATS
from keras_weightmods.saving import model as model_file
from keras_weightmods.saving import states
from keras_weightmods.saving.file_kinds import kind_of
from keras_weightmods.utils import checks

_CHANGED = (
    "weights that are packed, reparameterized, quantized or with LoRA. Call "
    "`kwm.unpack`, `kwm.fold` or `kwm.merge_lora` first; quantize what is "
    "merged"
)


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
    axes: Any = None


class Source:
    """A model in memory, or a file whose header is checked first.

    Args:
        argument: String, what it is in messages.
        given: A built Keras model, or the path of a file of `save_model` or
            of a `.keras` file, which is loaded.
        custom_objects: As in `load_model`.

    Attributes:
        model: The model in memory, or `None`.
        reader: `Reader` of a file, or `None`.
        entries: Dict from the names of the arrays to their `Entry`.
        layers: List of pairs of the name and the class of each part.
        changed: Bool, whether weights are packed, reparameterized, quantized
            or with LoRA.

    Raises:
        ValueError: If it is something else.
        OSError: If it cannot be read.
    """

    def __init__(self, argument: str, given: Any, custom_objects: Any) -> None:
        self.argument = argument
        self.model: Any = None
        self.reader: Any = None
        self._custom_objects = custom_objects
        if isinstance(given, (str, os.PathLike)):
            is_file = os.path.isfile(given)
            if not is_file or kind_of(given)[0] != "a .keras file":
                self._open(given)
                return
            given = model_file.load_keras_file(given, custom_objects)
        if not isinstance(given, keras.Model) or not given.built:
            expected = "a built Keras model, or a file of `save_model`"
            raise checks.error(argument, expected, given)
        self.model = given
        parts = states.walk(given)
        self.entries = states.weight_entries(parts)
        self.variables = variables_of(parts)
        self.layers = [
            (name, type(part).__name__) for name, part in parts.items()
        ]
        self.changed = _is_changed(given)

    def _open(self, filepath):
        self.reader = model_file.open_model(filepath)
        try:
            found = self._described = model_file.read_description(self.reader)
        except BaseException:
            self.close()
            raise
        self.entries = {
            name: entry
            for name, entry in self.reader.entries.items()
            if states.is_weight(name)
        }
        # Names of layers count, except those that Keras has numbered.
        self.layers = [tuple(row[:2]) for row in found["parts"]]
        self.changed = bool(found["changes"] or found["lora"])

    def reading(self, name: str) -> Callable[[slice], np.ndarray]:
        """Return a thread-safe reader of slices of a flattened array."""
        if self.reader is not None:
            read_part = self.reader.read_part
            return lambda part: read_part(name, part.start, part.stop)
        array = keras.ops.convert_to_numpy(self.variables[name])
        return np.ascontiguousarray(array).reshape(-1).__getitem__

    def built(self) -> Any:
        """Return the model. Most variables of a file's model have no values."""
        if self.reader is None:
            return self.model
        return model_file.build_model(
            self.reader, self._described, self._custom_objects
        )[0]

    def close(self) -> None:
        """Close the file, if it is one."""
        if self.reader is not None:
            self.reader.close()


def _is_changed(model: Any) -> bool:
    """Return whether summing arrays would not sum models."""
    return bool(reparameterizations(model)) or any(
        getattr(layer, "quantization_mode", None)
        or getattr(layer, "lora_enabled", False)
        for layer in keras_compat.layers_of(model)
    )


def variables_of(parts: Any) -> dict[str, Any]:
    """Return {name of an entry: variable} of the parts of a model."""
    return {
        states.weight_name(name, key): value
        for name, part in parts.items()
        for key, value in states.saved(part).items()
    }


def source_problems(sources: Any, template: Any) -> list[str]:
    """Return the problems that prevent merging, from the headers alone.

    Args:
        sources: List of sources.
        template: The one whose arrays the others must have.
    """
    found = []
    kinds = dict(template.layers)
    for source in sources:
        name = f"`{source.argument}`"
        if source.changed:
            found.append(f"{name}: {_CHANGED}")
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
        found += [
            f"{name}, {part or 'the model'}: {kind}, and {kinds[part]} is "
            "expected"
            for part, kind in source.layers
            if kinds.get(part, kind) != kind
        ]
    return found


def weights_of(source: Any) -> list[Weight]:
    """Return the `Weight`s of a source, in the order of a file's entries."""
    model = source.built()
    if _is_changed(model):
        # The others have the same arrays.
        raise ValueError(f"`{source.argument}` has {_CHANGED}")
    checkpoint = Checkpoint("model", model)
    roles = checkpoint.roles()

    @functools.cache
    def places():
        depths = checkpoint.depths(roles)
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
