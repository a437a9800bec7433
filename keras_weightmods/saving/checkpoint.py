"""Checkpoint: a training that was killed goes on from its last save."""

import itertools
import numbers
import os
import random
import re
import sys
import warnings
from typing import Any

import keras
import numpy as np

from keras_weightmods.backend import processes, whole
from keras_weightmods.core import keras_compat, train_step
from keras_weightmods.core.restored import RestoredOnError
from keras_weightmods.saving import (
    bounded_json,
    container,
    shared,
)
from keras_weightmods.utils import checks

_FORMAT = "keras_weightmods.checkpoint"
_VERSION = 1
_STATE = "state.json"
_NAME = re.compile(r"step-\d{10}\.safetensors")
_KEPT = 2
# Keras numbers layers through a process.
_NUMBER = re.compile(r"_\d+")


class Checkpoint(keras.callbacks.Callback):
    """Saves a training as it runs; the same `fit` then continues from there.

    Run the same program again after a kill, a crash or a power cut. `fit` then
    loads the last save and continues with its epoch. It replaces
    `keras.callbacks.BackupAndRestore`, whose files a kill at the wrong moment
    leaves unreadable. `BackupAndRestore` also saves neither the random numbers
    nor the state of `CAST` and `PrincipalMaskCallback`.

    A checkpoint is one file. It holds weights, the optimizer with its masks,
    the state of `CAST`, and the seeds of the model's layers. It also holds the
    state of the global generators of Python, NumPy, Keras and torch. It is
    written beside the others, flushed to the disk and then renamed. The last
    two are kept. If the last one cannot be read, the one before is used, with a
    warning.

    **Where it continues.** After a save at the end of an epoch, training
    continues as if nothing had stopped it. It does so bit for bit if the order
    of the data is fixed, or drawn from the saved generators, as Keras shuffles
    arrays on JAX and torch. A save within an epoch keeps the weights of that
    step, but no callback can move `fit` forward in its data. So the epoch
    begins again, and a warning says how many steps are repeated.
    `steps_per_epoch` makes epochs shorter.

    The state is saved once more at the end of `fit`, and stays. A program that
    is killed between the training and the saving of its model gets it back
    without training, and with a warning. Delete the folder to train anew.

    Put it last among the callbacks. Then the others have done their work at a
    step before it saves, and `PrincipalMaskCallback` has put its masks into the
    optimizer before they are loaded.

    If several processes train one model under `keras.distribution`, each makes
    this callback, with the same `path` on a disk that all of them see. The
    first one writes whole weights, even where each process holds a part.

    On JAX an error or Ctrl-C in the middle of a step would leave the model
    without weights. With this callback it has those of the last step, or of the
    one before, if the step has not overwritten them.

    The file lacks what other callbacks remember, such as the best value of
    `EarlyStopping`, and the `History` of the epochs before. It also lacks
    random numbers that TensorFlow draws from a state of its own. These are
    `tf.random.normal`, and the order in which Keras shuffles arrays there.

    Args:
        path: String or path of a folder for this run alone. It is made if there
            is none.
        save_freq: `"epoch"`, or an int, the steps (batches) between two saves
            within an epoch, beside those at the ends of epochs. Defaults to
            `"epoch"`.

    Raises:
        ValueError: For arguments outside these ranges. When the training
            starts: if the checkpoints belong to another model, optimizer or
            backend, or none of them can be read. The weights are unchanged
            then.

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
        model.fit(
            x, x[:, :4], 4, epochs, verbose=0, shuffle=False,
            callbacks=[kwm.Checkpoint(folder)],
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

    def __init__(self, path: Any, save_freq: Any = "epoch") -> None:
        super().__init__()
        self.path = os.path.abspath(checks.check_path("path", path))
        if os.path.lexists(self.path) and not os.path.isdir(self.path):
            raise checks.error("path", "a folder, or none yet", self.path)
        is_int = isinstance(save_freq, numbers.Integral)
        is_steps = is_int and checks.is_number(save_freq) and save_freq >= 1
        is_epoch = isinstance(save_freq, str) and save_freq == "epoch"
        if not (is_steps or is_epoch):
            raise checks.error("save_freq", '"epoch" or an int >= 1', save_freq)
        self.save_freq = save_freq
        # What `_load` returned.
        self._loaded: Any = None

    def restore(self, model: keras.Model) -> bool:
        """Load the last checkpoint into a model; `fit` does it by itself.

        Args:
            model: The compiled and built model. If it is trained with the masks
                of `PrincipalMaskCallback`, they must be attached.

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
                problems.append((file, error))
                continue
            with reader:
                self._loaded = _load(model, reader)
            # They are newer by their names, and would be kept in its place.
            for broken, error in problems:
                warnings.warn(
                    f"`Checkpoint` goes on from {name!r}, as a later one "
                    f"cannot be read. {error}",
                    stacklevel=3,
                )
                if shared.is_first():
                    os.replace(broken, f"{broken}.unreadable")
            return name
        if problems:
            raise ValueError(
                "None of the checkpoints can be read. Delete the folder to "
                f"train anew. {problems[0][1]}"
            )
        return None

    def on_train_begin(self, logs: Any = None) -> None:
        model = self.model
        strategy = getattr(model, "distribute_strategy", None)
        if strategy is not None and strategy.num_replicas_in_sync > 1:
            raise ValueError(
                "`Checkpoint` does not save what a `tf.distribute` strategy "
                "keeps on several replicas. Use "
                "`keras.callbacks.BackupAndRestore` there. Received: "
                f"{type(strategy).__name__}"
            )
        if self._loaded is None:
            self.restore(model)
        # The epoch that is next to be begun, and all steps that were made.
        self._epoch = self._taken = self._step = 0
        if self._loaded is not None:
            state, self._loaded = self._loaded, None
            self._epoch, self._taken = state["epoch"], state["taken"]
            self._go_on(state)
            _load_random(state)
        train_step.keep_weights(model)
        # Their gradients would be no part of a checkpoint.
        keras_compat.list_hidden_parameters(model)
        self._last_saved = self._taken

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._epoch, self._step = epoch, 0
        # A later `fit` of the model begins as it is told.
        keras_compat.begin_with_epoch(self._model, None)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._taken += batch + 1 - self._step
        self._step = batch + 1
        # The save at the end of the epoch comes after its last step.
        is_last = self._step == (self.params or {}).get("steps")
        if self.save_freq == "epoch" or is_last:
            return
        if self._taken - self._last_saved >= self.save_freq:
            self._save(self._step)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._epoch = epoch + 1
        self._save(0)

    def on_train_end(self, logs: Any = None) -> None:
        keras_compat.begin_with_epoch(self._model, None)
        self._save(0, stopped=bool(self.model.stop_training))

    def _go_on(self, state: dict[str, Any]) -> None:
        """Have `fit` begin with the epoch of a loaded state, and say where."""
        epochs = self.params["epochs"]
        if state["stopped"] or self._epoch >= epochs:
            self._epoch = max(self._epoch, epochs)
            warnings.warn(
                f"The run in {self.path!r} is complete: its weights are "
                "loaded, and nothing is trained. Delete the folder to train "
                "anew, or pass more `epochs`.",
                stacklevel=3,
            )
        elif state["step"]:
            warnings.warn(
                f"`Checkpoint` goes on with the weights of step "
                f"{state['step']} of epoch {self._epoch + 1}, and with the "
                "data from the beginning of that epoch. Steps that are "
                f"repeated: {state['step']}.",
                stacklevel=3,
            )
        keras_compat.begin_with_epoch(self.model, self._epoch)

    def _save(self, step: int, stopped: bool = False) -> None:
        state = {
            "backend": keras.backend.backend(),
            "epoch": self._epoch,
            "step": step,
            "taken": self._taken,
            "stopped": stopped,
        }
        entries, values = _contents(self.model, state)
        if shared.is_first():
            os.makedirs(self.path, exist_ok=True)
        name = f"step-{self._taken:010d}.safetensors"
        file = os.path.join(self.path, name)
        shared.write(file, _FORMAT, _VERSION, entries, values)
        if shared.is_first():
            for old in self._names()[:-_KEPT]:
                os.remove(os.path.join(self.path, old))
        shared.wait("checkpoint")
        self._last_saved = self._taken

    def _names(self) -> list[str]:
        """Return the names of the checkpoints, the last one last."""
        if not os.path.isdir(self.path):
            return []
        return sorted(filter(_NAME.fullmatch, os.listdir(self.path)))


def _contents(model: Any, state: dict[str, Any]) -> tuple[Any, Any]:
    """Return the entries of a checkpoint, and an iterator of (name, array).

    Each of several processes has to go through all of it.
    """
    kind, keys, *rest = np.random.get_state()
    numpy_state = [kind, np.asarray(keys).tolist(), *rest]
    state = {**state, "python": random.getstate(), "numpy": numpy_state}
    arrays = {_STATE: bounded_json.json_array(state)}
    seed = keras_compat.global_seed()
    if seed is not None:
        arrays["random/keras"] = keras.ops.convert_to_numpy(seed)
    if "torch" in sys.modules:
        from keras_weightmods.backend.torch.random_stream import global_states

        for device, numbers in global_states().items():
            arrays[f"torch/{device}"] = numbers
    own: dict[str, Any] = {}
    # What a model saves of its own beside variables, as CAST does.
    model.save_own_variables(own)
    for key, value in own.items():
        if not isinstance(value, keras.Variable):
            arrays[f"own/{key}"] = np.asarray(value)
    variables = _named("model", model) | _named("optimizer", model)
    entries = {n: _entry(v) for n, v in {**arrays, **variables}.items()}
    values = ((name, whole(v)) for name, v in variables.items())
    return entries, itertools.chain(arrays.items(), values)


def _load(model: Any, reader: Any) -> dict[str, Any]:
    """Load a checkpoint into a model, after it has been checked.

    Returns:
        The state of the run, with what `_load_random` takes.
    """
    state = _checked_state(reader)
    backend = keras.backend.backend()
    if state["backend"] != backend:
        raise ValueError(
            "A checkpoint goes on with the backend that it began with. "
            f"Received: one of {checks.shown(state['backend'])}, on "
            f"{backend!r}, in {reader.filepath!r}"
        )
    if not model.built:
        expected = "built before `fit`. Call it on a batch of data"
        raise checks.error("model", expected, model)
    pairs = _pairs("model", model, reader)
    own = _group("own", reader)
    if own:
        # `CAST` builds its optimizer by what it is told here.
        model.load_own_variables(own)
    optimizer = model.optimizer
    if optimizer is not None and not optimizer.built:
        optimizer.build(model.trainable_variables)
    pairs += _pairs("optimizer", model, reader)
    with RestoredOnError(values=[variable for _, variable in pairs]):
        for name, variable in pairs:
            variable.assign(reader.read(name))
    arrays = {name: _group(name, reader) for name in ("random", "torch")}
    return {**state, **arrays}


def _checked_state(reader: Any) -> Any:
    """Return the state of the run; raise ValueError if it is not one."""
    state = reader.read_json(_STATE)
    try:
        counts = [state[name] for name in ("epoch", "step", "taken")]
        version, numbers, gauss = state["python"]
        # By generators of their own, which say what is wrong with these.
        random.Random().setstate((version, tuple(numbers), gauss))
        np.random.RandomState().set_state(state["numpy"])
        is_valid = (
            all(type(n) is int and 0 <= n < 2**53 for n in counts)
            and isinstance(state["stopped"], bool)
            and isinstance(state["backend"], str)
            and isinstance(gauss, float | None)
            and state["numpy"][2] in range(625)
        )
    except (LookupError, OverflowError, TypeError, ValueError):
        is_valid = False
    if not is_valid:
        raise reader.error(_STATE, "is not the state of a run")
    return state


def _load_random(state: dict[str, Any]) -> None:
    """Give the global generators the states that `_load` returned."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(state["numpy"])
    if "keras" in state["random"]:
        seed = keras_compat.global_seed(create=True)
        seed.assign(state["random"]["keras"])
    if state["torch"] and "torch" in sys.modules:
        from keras_weightmods.backend.torch import random_stream

        random_stream.set_global_states(state["torch"])


def _group(group: str, reader: Any) -> dict[str, Any]:
    return {
        name.removeprefix(f"{group}/"): reader.read(name)
        for name in reader.entries
        if name.startswith(f"{group}/")
    }


def _named(group: str, model: Any) -> dict[str, Any]:
    """Return the variables of the model or its optimizer by their entries."""
    owner = model if group == "model" else model.optimizer
    found = [] if owner is None else owner.variables
    # An optimizer that TensorFlow's `fit` builds puts its name before those of
    # the optimizer inside, as `LossScaleOptimizer` does.
    scope = f"{owner.name}/" if group == "optimizer" and found else ""
    return {
        f"{group}/{i}/{each.path.removeprefix(scope)}": each
        for i, each in enumerate(found)
    }


def _entry(value: Any) -> container.Entry:
    dtype = keras.backend.standardize_dtype(value.dtype)
    return container.Entry(tuple(map(int, value.shape)), dtype)


def _pairs(group: str, model: Any, reader: Any) -> list[Any]:
    """Return pairs (entry, variable), which must be of one kind."""
    saved = {
        _NUMBER.sub("", name): name
        for name in reader.entries
        if name.startswith(f"{group}/")
    }
    pairs, different = [], []
    for name, variable in _named(group, model).items():
        found = saved.pop(_NUMBER.sub("", name), None)
        pairs.append((found, variable))
        if reader.entries.get(found) != _entry(variable):
            different.append(name)
    different += saved.values()
    if different:
        raise ValueError(
            f"The checkpoint is of another {group}: {len(different)} variables "
            f"differ, the first being {different[0]!r}. Make and compile the "
            "model as in the run that was interrupted, and put `Checkpoint` "
            "last among the callbacks; or delete the folder to train anew. "
            f"Received: filepath={reader.filepath!r}"
        )
    return pairs
