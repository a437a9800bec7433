"""The file of a checkpoint: its entries, and the checks of what is in it."""

import itertools
import re
from typing import Any

import keras
import numpy as np

from keras_weightmods.backend import processes
from keras_weightmods.core import keras_compat
from keras_weightmods.saving import (
    bounded_json,
    container,
    random_state,
    shared,
)
from keras_weightmods.utils import checks

_FORMAT = "keras_weightmods.checkpoint"
_VERSION = 1
_STATE = "state.json"
_NUMBER = re.compile(r"_\d+")
_PLACE = re.compile(r"\d{1,9}/")
# What a value of the state is: a type, or more than one.
_STATE_FORMS: dict[str, Any] = {
    "backend": str,
    "epoch": int,
    "step": int,
    "taken": int,
    "stopped": bool,
    "seed": int,
    "data": {
        "kind": str,
        "steps_per_epoch": int | None,
        "steps_per_execution": int,
        "num_batches": int | None,
        "steps_seen": int,
        "begun": int,
        "drawn": int,
        "first": list,
        "last": str,
    },
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
        state: Dict, of the run; see `_STATE_FORMS`.

    Returns:
        Dict of the entries, and an iterator of pairs (name, array), which all
        processes have to go through.
    """
    own_random = random_state.save_global()
    arrays = _named("random", own_random)
    group = processes()
    if group is not None:
        numbers = {key: _as_json(a) for key, a in own_random.items()}
        everyone = group.gathered([state, numbers])
        state["processes"] = [each for each, _ in everyone]
        for place, (_, numbers) in enumerate(everyone):
            others = {key: _from_json(a) for key, a in numbers.items()}
            arrays.update(_named(f"random-{place}", others))
    arrays[_STATE] = bounded_json.json_array(state)
    arrays.update(_named("own", _own_state(model)))
    variables = {
        name: variable
        for group, listed in _variables(model).items()
        for name, variable in _numbered(group, listed).items()
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


def load(model: Any, reader: Any) -> tuple[Any, Any, Any]:
    """Load a checkpoint into a model, after it has been checked.

    Returns:
        The state of the run, its random numbers and its metrics.
    """
    if _STATE not in reader.entries:
        raise reader.error(_STATE, "is missing")
    state = reader.read_json(_STATE)
    if not _are_states(state):
        raise reader.error(_STATE, "is not the state of a run")
    for group in ("model", "optimizer", "metrics"):
        for key in _within(reader.entries, group):
            if not _PLACE.match(key):
                raise reader.error(f"{group}/{key}", "has no place in it")
    backend = keras.backend.backend()
    if state["backend"] != backend:
        raise ValueError(
            "A checkpoint goes on with the backend that it began with. "
            f"Received: one of {state['backend']!r}, on {backend!r}, in "
            f"{reader.filepath!r}"
        )
    group, random_group = processes(), "random"
    saved = state.get("processes", [state])
    here = 1 if group is None else group.count()
    if len(saved) != here:
        raise ValueError(
            "A checkpoint goes on with as many processes as it began with. "
            f"Received: one of {len(saved)}, with {here}, in "
            f"{reader.filepath!r}"
        )
    if group is not None:
        state = saved[group.index()]
        random_group = f"random-{group.index()}"
    if not model.built:
        expected = "built before `fit`. Call it on a batch of data"
        raise checks.error("model", expected, model)
    pairs = _pairs("model", model.variables, reader)
    own = _read_group(reader, "own")
    numbers = _read_group(reader, random_group)
    try:
        random_state.check(numbers)
    except ValueError as error:
        raise reader.error("random", str(error)) from error
    if own:
        # `CAST` builds its optimizer by what it is told here.
        model.load_own_variables(own)
    optimizer = model.optimizer
    if optimizer is not None:
        if not optimizer.built:
            optimizer.build(model.trainable_variables)
        pairs += _pairs("optimizer", optimizer.variables, reader)
    for name, variable in pairs:
        variable.assign(reader.read(name))
    return state, numbers, _read_group(reader, "metrics")


def load_metrics(model: Any, saved: dict[str, Any], batch: Any) -> None:
    """Load the metrics that `load` returned, built on a batch if need be."""
    if len(model.metrics_variables) != len(saved):
        keras_compat.build_metrics(model, batch)
    variables = model.metrics_variables
    order = sorted(saved, key=lambda key: int(key.partition("/")[0]))
    if [saved[key].shape for key in order] != [
        tuple(variable.shape) for variable in variables
    ]:
        raise ValueError(
            "The checkpoint is of other metrics. Compile the model as in the "
            "run that was interrupted. Received: metrics of "
            f"{[variable.path for variable in variables]} where it has {order}"
        )
    for key, variable in zip(order, variables):
        variable.assign(saved[key])


def _as_json(array: Any) -> Any:
    return str(array.dtype), array.tolist()


def _from_json(pair: Any) -> Any:
    dtype, numbers = pair
    return np.array(numbers, dtype)


def _are_states(value: Any) -> bool:
    """Return whether a value from a file is a state, with those of others."""
    if not isinstance(value, dict):
        return False
    own = {key: each for key, each in value.items() if key != "processes"}
    others = value.get("processes", [])
    return isinstance(others, list) and all(
        _is_state(each, _STATE_FORMS) for each in (own, *others)
    )


def _is_state(value: Any, forms: dict[str, Any]) -> bool:
    """Return whether a value from a file has the keys and types of `forms`."""
    if not isinstance(value, dict) or value.keys() != forms.keys():
        return False
    for key, form in forms.items():
        each = value[key]
        if isinstance(form, dict):
            valid = _is_state(each, form)
        else:
            valid = isinstance(each, form) and (
                form is bool or not isinstance(each, bool)
            )
        if not valid or (isinstance(each, int) and not 0 <= each < 2**53):
            return False
    return all(
        isinstance(pair, list) and [type(x) for x in pair] == [int, str]
        for pair in value.get("first", ())
    )


def _variables(model: Any) -> dict[str, Any]:
    optimizer = model.optimizer
    return {
        "model": model.variables,
        "optimizer": optimizer.variables if optimizer is not None else [],
        "metrics": model.metrics_variables,
    }


def _numbered(group: str, variables: Any) -> dict[str, Any]:
    return {f"{group}/{i}/{v.path}": v for i, v in enumerate(variables)}


def _own_state(model: Any) -> dict[str, Any]:
    """Return what a model saves of its own beside variables, as CAST does."""
    store: dict[str, Any] = {}
    model.save_own_variables(store)
    return {
        key: np.asarray(value)
        for key, value in store.items()
        if not isinstance(value, keras.Variable)
    }


def _named(group: str, arrays: dict[str, Any]) -> dict[str, Any]:
    return {f"{group}/{key}": value for key, value in arrays.items()}


def _within(arrays: dict[str, Any], group: str) -> dict[str, Any]:
    return {
        key.removeprefix(f"{group}/"): value
        for key, value in arrays.items()
        if key.startswith(f"{group}/")
    }


def _read_group(reader: Any, group: str) -> dict[str, Any]:
    return {
        key: reader.read(f"{group}/{key}")
        for key in _within(reader.entries, group)
    }


def _pairs(group: str, variables: Any, reader: Any) -> list[Any]:
    """Return pairs (entry, variable), which must be of one kind."""
    found = _within(reader.entries, group)
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
