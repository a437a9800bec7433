"""Checkpoint: a training that was killed goes on where it was."""

import collections
import itertools
import os
import random
import re
import time
import warnings
from typing import Any

import keras
import numpy as np

from keras_weightmods.backend import processes
from keras_weightmods.core import keras_private
from keras_weightmods.saving import (
    atomic_file,
    bounded_json,
    container,
    random_state,
    shared,
)
from keras_weightmods.saving.data_order import DataOrder
from keras_weightmods.utils import checks

_FORMAT = "keras_weightmods.checkpoint"
_VERSION = 1
_STATE = "state.json"
_NAME = re.compile(r"step-\d{10}\.safetensors")
_NUMBER = re.compile(r"_\d+")
_PLACE = re.compile(r"\d{1,9}/")
_KEPT = 2
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


class Checkpoint(keras.callbacks.Callback):
    """Saves a training as it runs; the same `fit` then goes on from there.

    Run the same program again after a kill, a crash or a power cut: `fit`
    continues in the middle of the epoch, with the batches that are left, and
    ends with the weights, bit for bit, of a run that nothing has stopped.
    It is what `keras.callbacks.BackupAndRestore` is for, which begins an
    epoch again on the weights from the middle of it, and whose files a kill
    at the wrong moment leaves unreadable.

    A checkpoint is one file: weights, the optimizer with its masks, metrics,
    what `CAST` knows of its run, the random numbers of dropout and the place
    in the data. It is written beside the others, flushed to the disk and then
    named; the last two are kept. The one before is used, with a warning, where
    the last cannot be read.

    At the end of `fit` the state is saved once more, and stays: a program that
    is killed between the training and the saving of its model gets it back
    without training, and with a warning. Delete the folder to train anew.

    Put it last among the callbacks, so that what they do at a step is done when
    it is saved, and `PrincipalMaskCallback` has put its masks into the
    optimizer before they are loaded.

    What is exact depends on the data:

    - arrays, also with `shuffle=True`: their order is drawn from a seed that
      the checkpoint holds. Other calls of NumPy's generator do not change it;
    - a `keras.utils.PyDataset` whose batches depend on the index, and on the
      global generators of Python, NumPy and torch; not with several `workers`
      that draw random numbers;
    - a `tf.data.Dataset`, `DataLoader` or generator that gives the same
      batches in each process, such as one with seeds. The first batch of each
      pass, and the last one before the interruption, are compared: other data
      are an error. A generator needs `steps_per_epoch`.

    Where several processes train one model under `keras.distribution`, each
    makes this callback, with the same `path` on a disk that all of them see.
    The first one writes, the weights whole even where each holds a part, and
    the place in the data of each. As many processes go on as were interrupted.

    On JAX an error or Ctrl-C in the middle of a step would leave the model
    without weights. With this callback it has those of the last step, or of
    the one before, if the step has not written over them.

    What is left out of the last epoch is drawn again, without training on it.
    Not saved are what other callbacks remember, such as the best value of
    `EarlyStopping`, the `History` of the epochs before, and random numbers
    that TensorFlow draws from a state of its own (`tf.random.normal`).

    Args:
        path: String or path of a folder for this run alone. It is made where
            there is none.
        save_freq: `"epoch"`, or an int, the steps (batches) between two saves.
            Where the data do not say how many batches they have, only the ends
            of epochs are saved. Defaults to `"epoch"`.
        save_seconds: Float, save after a step once so many seconds have passed
            since the last save; may come with either `save_freq`, and not with
            several processes, whose clocks differ. Defaults to `None`, for no
            such saves.

    Raises:
        ValueError: For arguments outside these ranges. When the training
            starts: if the checkpoints are of another model, optimizer, backend
            or other data, or none of them can be read. The weights are
            unchanged then.

    Example:

    ```python
    import tempfile
    import keras
    import numpy as np
    import keras_weightmods as kwm

    def train(epochs, folder):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
        model.compile("adam", "mse")
        x = np.random.normal(size=(64, 8))
        checkpoint = kwm.Checkpoint(folder, save_freq=10)
        model.fit(
            x, x[:, :4], 4, epochs, verbose=0, callbacks=[checkpoint]
        )
        return model.get_weights()

    with (
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryDirectory() as other,
    ):
        whole = train(3, other)
        train(1, folder)  # Stopped early ...
        resumed = train(3, folder)
    assert all(map(np.array_equal, whole, resumed))
    ```
    """

    def __init__(
        self,
        path: Any,
        save_freq: Any = "epoch",
        save_seconds: float | None = None,
    ) -> None:
        super().__init__()
        self.path = os.path.abspath(checks.check_path("path", path))
        if os.path.lexists(self.path) and not os.path.isdir(self.path):
            raise checks.error("path", "a folder, or none yet", self.path)
        if not (isinstance(save_freq, str) and save_freq == "epoch"):
            checks.check_int("save_freq", save_freq, 1)
        self.save_freq = save_freq
        self.save_seconds = checks.check_float(
            "save_seconds", save_seconds, above=0, optional=True
        )
        self._state: Any = None
        self._rest: dict[str, Any] = {}
        self._data: Any = None

    def restore(self, model: keras.Model) -> bool:
        """Load the last checkpoint into a model; `fit` does it by itself.

        Args:
            model: The compiled model, built, and with the masks of
                `PrincipalMaskCallback` attached where it is trained with them.

        Returns:
            Bool, whether there was a checkpoint.

        Raises:
            ValueError: As the class.
        """
        if not isinstance(model, keras.Model):
            raise checks.error("model", "a keras.Model", model)
        found = self._restore(model)
        group = processes()
        if group is not None:
            all_found = group.gathered(found)
            if len(set(all_found)) > 1:
                raise ValueError(
                    "All processes must see the same checkpoints, on a disk "
                    f"that they share. Received: path={self.path!r}, where "
                    f"they found {all_found}"
                )
        return found is not None

    def _restore(self, model: Any) -> str | None:
        """Return the name of the checkpoint that is loaded, if any is."""
        problems = []
        for name in reversed(self._names()):
            file = os.path.join(self.path, name)
            try:
                reader = container.Reader(file, _FORMAT, (_VERSION,))
            except (ValueError, OSError) as error:
                problems.append(str(error))
                continue
            with reader:
                self._load(model, reader)
            # It is newer by its name, and would be kept in place of good ones.
            names = self._names() if shared.is_first() else []
            for later in names[names.index(name) + 1 :] if names else []:
                broken = os.path.join(self.path, later)
                os.replace(broken, f"{broken}.unreadable")
            if problems:
                warnings.warn(
                    f"`Checkpoint` goes on from {name!r}, as a later one "
                    f"cannot be read. {problems[0]}",
                    stacklevel=3,
                )
            return name
        if problems:
            raise ValueError(
                "None of the checkpoints can be read. Delete the folder to "
                f"train anew. {problems[0]}"
            )
        return None

    def on_train_begin(self, logs: Any = None) -> None:
        model = self.model
        if self.save_seconds is not None and processes() is not None:
            expected = "None with several processes, whose clocks differ"
            raise checks.error("save_seconds", expected, self.save_seconds)
        if self._state is None:
            self.restore(model)
        state, self._state = self._state, None
        rest, self._rest = self._rest, {}
        seed = random.randrange(2**31) if state is None else state["seed"]
        self._data = DataOrder(model, seed)
        self._epoch = self._step = self._taken = 0
        self._saved_at = time.monotonic()
        if state is not None:
            self._go_on(model, state, rest)
        keras_private.keep_weights(model)
        self._last_saved = self._taken
        by_step = self.save_freq != "epoch" or self.save_seconds
        if by_step and self._data.steps_of_epoch is None:
            warnings.warn(
                "`Checkpoint` saves at the ends of epochs alone until the "
                "data have said how many batches they have. Pass "
                "`steps_per_epoch` to save in between.",
                stacklevel=2,
            )

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._epoch = epoch
        keras_private.begin_with_epoch(self._model, None)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        steps = batch + 1
        self._taken += steps - self._step
        self._step = steps
        length = self._data.steps_of_epoch
        # The end of an epoch is not done after its last step.
        if length is not None and steps < length and self._is_due():
            self._save(self._epoch, steps)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._step = 0
        if self.save_freq == "epoch" or self._is_due():
            self._save(epoch + 1, 0)
        self._epoch = epoch + 1

    def on_train_end(self, logs: Any = None) -> None:
        self._save(self._epoch, 0, stopped=bool(self.model.stop_training))
        self._data = None

    def _is_due(self) -> bool:
        seconds = time.monotonic() - self._saved_at
        if self.save_seconds is not None and seconds >= self.save_seconds:
            return True
        return (
            self.save_freq != "epoch"
            and self._taken - self._last_saved >= self.save_freq
        )

    def _go_on(self, model: Any, state: Any, rest: Any) -> None:
        """Have `fit` go on from a place in a run; the weights are loaded."""
        last = self.params["epochs"]
        self._epoch, self._step = state["epoch"], state["step"]
        self._taken = state["taken"]
        if state["stopped"]:
            self._epoch = max(self._epoch, last)
        if self._epoch >= last:
            warnings.warn(
                f"The run in {self.path!r} is complete: its weights are "
                "loaded, and nothing is trained. Delete the folder to train "
                "anew, or pass more `epochs`.",
                stacklevel=2,
            )
        keras_private.begin_with_epoch(model, self._epoch)

        def then(batch: Any) -> None:
            _load_metrics(model, rest, batch)
            random_state.load_global(_within(rest, "random"))

        if self._step:
            self._data.resume(state["data"], self._step, then)
        else:
            self._data.resume(state["data"], 0, None)
            random_state.load_global(_within(rest, "random"))

    def _save(self, epoch: int, step: int, stopped: bool = False) -> None:
        model = self.model
        state = {
            "backend": keras.backend.backend(),
            "epoch": epoch,
            "step": step,
            "taken": self._taken,
            "stopped": stopped,
            "seed": self._data.seed,
            "data": self._data.state(),
        }
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
            (name, shared.whole(variable))
            for name, variable in variables.items()
        )
        if shared.is_first():
            self._write(entries, itertools.chain(arrays.items(), values))
        else:
            # It takes part where a weight is split over processes.
            collections.deque(values, maxlen=0)
        shared.wait("checkpoint")
        self._last_saved = self._taken
        self._saved_at = time.monotonic()

    def _write(self, entries: Any, values: Any) -> None:
        os.makedirs(self.path, exist_ok=True)
        atomic_file.remove_leftovers(self.path)
        name = f"step-{self._taken:010d}.safetensors"
        file = os.path.join(self.path, name)
        with container.Writer(file, _FORMAT, _VERSION, entries) as writer:
            for name, array in values:
                writer.write(name, array)
        for old in self._names()[:-_KEPT]:
            os.remove(os.path.join(self.path, old))

    def _load(self, model: Any, reader: Any) -> None:
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
        self._state = state
        self._rest = {
            **_named("random", numbers),
            **_named("metrics", _read_group(reader, "metrics")),
        }

    def _names(self) -> list[str]:
        """Return the names of the checkpoints, the last one last."""
        if not os.path.isdir(self.path):
            return []
        return sorted(filter(_NAME.fullmatch, os.listdir(self.path)))


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


def _load_metrics(model: Any, rest: dict[str, Any], batch: Any) -> None:
    saved = _within(rest, "metrics")
    if len(model.metrics_variables) != len(saved):
        keras_private.build_metrics(model, batch)
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
