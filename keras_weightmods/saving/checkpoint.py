"""Checkpoint: a training that was killed goes on where it was."""

import collections
import os
import random
import re
import time
import warnings
from typing import Any

import keras

from keras_weightmods.backend import processes
from keras_weightmods.core import keras_compat, train_step
from keras_weightmods.saving import (
    atomic_file,
    checkpoint_file,
    random_state,
    shared,
)
from keras_weightmods.saving.data_order import DataOrder
from keras_weightmods.utils import checks

_NAME = re.compile(r"step-\d{10}\.safetensors")
_KEPT = 2


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
        # The state of the run, its random numbers and its metrics.
        self._loaded: Any = None
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
                reader = checkpoint_file.opened(file)
            except (ValueError, OSError) as error:
                problems.append(str(error))
                continue
            with reader:
                self._loaded = checkpoint_file.load(model, reader)
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
        if self._loaded is None:
            self.restore(model)
        loaded, self._loaded = self._loaded, None
        seed = random.randrange(2**31) if loaded is None else loaded[0]["seed"]
        self._data = DataOrder(model, seed)
        self._epoch = self._step = self._taken = 0
        self._saved_at = time.monotonic()
        if loaded is not None:
            self._go_on(model, *loaded)
        train_step.keep_weights(model)
        # Their gradients would be no part of a checkpoint.
        keras_compat.list_hidden_parameters(model)
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
        keras_compat.begin_with_epoch(self._model, None)

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

    def _go_on(
        self, model: Any, state: Any, numbers: Any, metrics: Any
    ) -> None:
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
        keras_compat.begin_with_epoch(model, self._epoch)

        def then(batch: Any) -> None:
            checkpoint_file.load_metrics(model, metrics, batch)
            random_state.load_global(numbers)

        if self._step:
            self._data.resume(state["data"], self._step, then)
        else:
            self._data.resume(state["data"], 0, None)
            random_state.load_global(numbers)

    def _save(self, epoch: int, step: int, stopped: bool = False) -> None:
        state = {
            "backend": keras.backend.backend(),
            "epoch": epoch,
            "step": step,
            "taken": self._taken,
            "stopped": stopped,
            "seed": self._data.seed,
            "data": self._data.state(),
        }
        entries, values = checkpoint_file.contents(self.model, state)
        if shared.is_first():
            self._write(entries, values)
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
        checkpoint_file.write(file, entries, values)
        for old in self._names()[:-_KEPT]:
            os.remove(os.path.join(self.path, old))

    def _names(self) -> list[str]:
        """Return the names of the checkpoints, the last one last."""
        if not os.path.isdir(self.path):
            return []
        return sorted(filter(_NAME.fullmatch, os.listdir(self.path)))
