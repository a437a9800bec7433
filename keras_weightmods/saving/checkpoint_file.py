"""The file of a checkpoint: its entries, and the checks of what is in it."""

import itertools
import random
import re
import sys
from typing import Any

import keras
import numpy as np

from keras_weightmods.core import keras_compat
from keras_weightmods.saving import bounded_json, container, shared
from keras_weightmods.utils import checks

_FORMAT = "keras_weightmods.checkpoint"
_VERSION = 1
_STATE = "state.json"
_NUMBER = re.compile(r"_\d+")
_PLACE = re.compile(r"\d{1,9}/")
_STATE_TYPES = {
    "backend": str,
    "epoch": int,
    "step": int,
    "taken": int,
    "stopped": bool,
}
# The shapes and dtypes that the states of Python's and NumPy's generators have.
_RANDOM = {
    "python": [("uint32", (626,))],
    "python_gauss": [("float64", (0,)), ("float64", (1,))],
    "numpy": [("uint32", (624,))],
    "numpy_rest": [("float64", (3,))],
}


def opened(filepath: str) -> container.Reader:
    """Return what reads a checkpoint, once all of it has been checked."""
    return container.Reader(filepath, _FORMAT, (_VERSION,))


def write(filepath: str, entries: Any, values: Any) -> None:
    """Write what `contents` returned."""
    with container.Writer(filepath, _FORMAT, _VERSION, entries) as writer:
        for name, array in values:
            writer.write(name, array)


def contents(model: Any, state: dict[str, Any]) -> tuple[Any, Any]:
    """Return what a checkpoint holds; each of several processes calls it.

    Args:
        model: The compiled model.
        state: Dict, of the run; see `_STATE_TYPES`.

    Returns:
        Dict of the entries, and an iterator of pairs (name, array), which all
        processes have to go through.
    """
    own: dict[str, Any] = {}
    # What a model saves of its own beside variables, as CAST does.
    model.save_own_variables(own)
    arrays = {_STATE: bounded_json.json_array(state)}
    for key, array in _random_states().items():
        arrays[f"random/{key}"] = array
    for key, value in own.items():
        if not isinstance(value, keras.Variable):
            arrays[f"own/{key}"] = np.asarray(value)
    variables = {
        f"{group}/{i}/{variable.path}": variable
        for group, listed in _variables(model).items()
        for i, variable in enumerate(listed)
    }
    entries = {
        name: container.Entry(
            tuple(map(int, value.shape)),
            keras.backend.standardize_dtype(value.dtype),
        )
        for name, value in {**arrays, **variables}.items()
    }
    values = (
        (name, shared.whole(variable)) for name, variable in variables.items()
    )
    return entries, itertools.chain(arrays.items(), values)


def load(model: Any, reader: Any) -> tuple[Any, Any]:
    """Load a checkpoint into a model, after it has been checked.

    Returns:
        The state of the run, and its random numbers for `load_random`.
    """
    if _STATE not in reader.entries:
        raise reader.error(_STATE, "is missing")
    state = reader.read_json(_STATE)
    if not (
        isinstance(state, dict)
        and {key: type(value) for key, value in state.items()} == _STATE_TYPES
        and all(
            0 <= value < 2**53
            for value in state.values()
            if isinstance(value, int)
        )
    ):
        raise reader.error(_STATE, "is not the state of a run")
    backend = keras.backend.backend()
    if state["backend"] != backend:
        raise ValueError(
            "A checkpoint goes on with the backend that it began with. "
            f"Received: one of {state['backend']!r}, on {backend!r}, in "
            f"{reader.filepath!r}"
        )
    if not model.built:
        expected = "built before `fit`. Call it on a batch of data"
        raise checks.error("model", expected, model)
    pairs = _pairs("model", model.variables, reader)
    own = _read_group(reader, "own")
    numbers = _read_group(reader, "random")
    if not _are_random_states(numbers):
        raise reader.error("random", "is not the state of generators")
    if own:
        # `CAST` builds its optimizer by what it is told here.
        model.load_own_variables(own)
    optimizer = model.optimizer
    if optimizer is not None and not optimizer.built:
        optimizer.build(model.trainable_variables)
    pairs += _pairs("optimizer", _variables(model)["optimizer"], reader)
    for name, variable in pairs:
        variable.assign(reader.read(name))
    return state, numbers


def load_random(states: dict[str, Any]) -> None:
    """Give the global generators the states that `load` returned."""
    version, *numbers = states["python"].tolist()
    gauss = states["python_gauss"].tolist()
    random.setstate((version, tuple(numbers), gauss[0] if gauss else None))
    place, has_gauss, cached = states["numpy_rest"].tolist()
    keys = states["numpy"]
    np.random.set_state(("MT19937", keys, int(place), int(has_gauss), cached))
    if "keras" in states:
        keras_compat.global_seed(create=True).assign(states["keras"])
    of_torch = {
        name.removeprefix("torch_"): state
        for name, state in states.items()
        if name.startswith("torch_")
    }
    if of_torch and "torch" in sys.modules:
        from keras_weightmods.backend.torch.random_stream import (
            set_global_states,
        )

        set_global_states(of_torch)


def _random_states() -> dict[str, Any]:
    """Return the states of the global generators, but for TensorFlow's."""
    version, numbers, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state(legacy=True)
    if kind != "MT19937":
        raise ValueError(
            "Expected NumPy's global generator to be the one that it starts "
            f"with, MT19937, whose state can be saved. Received: {kind}"
        )
    states = {
        "python": np.array([version, *numbers], "uint32"),
        "python_gauss": np.array([] if gauss is None else [gauss], "float64"),
        "numpy": np.asarray(keys),
        "numpy_rest": np.array(rest, "float64"),
    }
    seed = keras_compat.global_seed()
    if seed is not None:
        states["keras"] = keras.ops.convert_to_numpy(seed)
    if "torch" in sys.modules:
        from keras_weightmods.backend.torch.random_stream import global_states

        for device, state in global_states().items():
            states[f"torch_{device}"] = state
    return states


def _are_random_states(states: dict[str, Any]) -> bool:
    """Return whether arrays from a file are what `_random_states` returns."""
    for name, kinds in _RANDOM.items():
        array = states.get(name)
        if array is None or (array.dtype.name, array.shape) not in kinds:
            return False
    position = states["numpy_rest"][0]
    return bool(
        states["python"][0] == 3
        and states["python"][-1] <= 624
        and 0 <= position <= 624
        and position == int(position)
    )


def _variables(model: Any) -> dict[str, Any]:
    optimizer = model.optimizer
    return {
        "model": model.variables,
        "optimizer": [] if optimizer is None else optimizer.variables,
    }


def _within(entries: dict[str, Any], group: str) -> dict[str, Any]:
    return {
        name.removeprefix(f"{group}/"): value
        for name, value in entries.items()
        if name.startswith(f"{group}/")
    }


def _read_group(reader: Any, group: str) -> dict[str, Any]:
    return {
        key: reader.read(f"{group}/{key}")
        for key in _within(reader.entries, group)
    }


def _pairs(group: str, variables: Any, reader: Any) -> list[Any]:
    """Return pairs (entry, variable), which must be of one kind."""
    found = _within(reader.entries, group)
    for key in found:
        if not _PLACE.match(key):
            raise reader.error(f"{group}/{key}", "has no place in it")
    saved = sorted(found, key=lambda key: int(key.partition("/")[0]))
    pairs = list(zip(saved, variables))
    for key, variable in pairs:
        entry = found[key]
        kind = (
            tuple(map(int, variable.shape)),
            keras.backend.standardize_dtype(variable.dtype),
        )
        path = key.partition("/")[2]
        # Keras numbers layers through a process, and optimizers' variables
        # have their names within their own.
        plain, own = (_NUMBER.sub("", each) for each in (path, variable.path))
        if (entry.shape, entry.dtype) != kind or plain != own:
            message = (
                f"{path!r} of shape {entry.shape} and dtype {entry.dtype} "
                f"where this one has {variable.path!r}, {kind[0]}, {kind[1]}"
            )
            break
    else:
        if len(saved) == len(variables):
            return [(f"{group}/{key}", variable) for key, variable in pairs]
        message = f"{len(saved)} variables where this one has {len(variables)}"
    raise ValueError(
        f"The checkpoint is of another {group}: {message}. Make and compile "
        "the model as in the run that was interrupted, and put `Checkpoint` "
        "last among the callbacks; or delete the folder to train anew. "
        f"Received: filepath={reader.filepath!r}"
    )
