"""The batches of a `fit`, in an order that another process can repeat.

Each pass over the data draws its random numbers from a seed, apart from all
other ones. A pass is resumed by drawing again what was drawn of it, which
takes the time of the data alone, and no step.
"""

import hashlib
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_weightmods.backend import processes
from keras_weightmods.core import keras_compat
from keras_weightmods.saving.random_state import DataStream

_CHANGED = (
    "The data are not those of the run that was interrupted, or they come in "
    "another order: {}. Pass the same data; seed the shuffling of a "
    "`tf.data.Dataset`, a `DataLoader` or a class of your own; or delete the "
    "checkpoints to train anew."
)


class DataOrder:
    """The order of the batches of the `fit` that is running.

    Args:
        model: The model, whose `fit` calls us through a callback.
        seed: Int.
    """

    def __init__(self, model, seed):
        if getattr(model, "distribute_strategy", None) is not None and (
            model.distribute_strategy.num_replicas_in_sync > 1
        ):
            raise ValueError(
                "`Checkpoint` does not know the order of data that a "
                "`tf.distribute` strategy splits over several replicas. Use "
                "`keras.callbacks.BackupAndRestore` there. Received: "
                f"{type(model.distribute_strategy).__name__}"
            )
        self.seed = seed
        self._data = keras_compat.FitData(model)
        self._tensorflow_seed = self._data.shuffle_by_seed()
        self._stream = DataStream()
        self._batches: Any = None
        # Passes begun, and {number: digest of the first batch} of those drawn
        # from: Keras begins one more at the end of an epoch.
        self._begun = 0
        self._first: dict[int, str | None] = {}
        self._skip = 0
        self._is_placed = False
        self._expected = None
        self._then = None
        self._data.install(self._new_pass, self._steps)

    @property
    def steps_of_epoch(self):
        """Int, the steps of an epoch; None where they are not known yet."""
        return self._data.steps_of_epoch

    def state(self):
        """Return the place in the data, to be saved as JSON."""
        batches = self._batches
        return {
            **self._kind(),
            "num_batches": self._data.num_batches,
            "steps_seen": self._data.steps_seen,
            "begun": self._begun,
            "drawn": batches.drawn if batches else 0,
            "first": sorted(self._first.items()),
            "last": _digest(batches.last) if batches and batches.drawn else "",
        }

    def resume(self, state, step, then):
        """Go to a place in the data.

        Args:
            state: What `state` returned.
            step: Int, the steps of the epoch that are made already.
            then: Callable, called with the last batch that is left out, or
                None, when the first of the others is about to come.

        Raises:
            ValueError: If the data are other ones.
        """
        kind = self._kind()
        self._data.num_batches = state["num_batches"]
        kind["num_batches"] = self._data.num_batches
        others = [key for key in kind if kind[key] != state[key]]
        if others:
            raise ValueError(
                _CHANGED.format(
                    "; ".join(
                        f"{key} was {state[key]!r} and is {kind[key]!r}"
                        for key in others
                    )
                )
            )
        lasts = kind["steps_per_epoch"] is not None
        if kind["kind"] == "GeneratorDataAdapter" and not lasts:
            raise ValueError(
                "A generator cannot be begun again for another epoch. Pass "
                "`steps_per_epoch`, or data that have a length."
            )
        first = {int(number): digest for number, digest in state["first"]}
        past = state["begun"] - 1 if step or lasts else state["begun"]
        if self._data.is_arrays:
            # Their order is that of the seed: nothing is to be repeated.
            self._begun, self._first = past, first
        else:
            self._repeat(past, first, lasts)
        self._skip, self._then = step, then
        self._expected = state["last"]
        if lasts and state["begun"]:
            with self._stream.active():
                batches = self._new_pass()
                batches.look_ahead()
            for _ in range(state["drawn"]):
                next(batches, None)
            # Keras counts those that are left out once more.
            self._data.go_on_with(batches, state["steps_seen"] - step)
            self._is_placed = True
            self._check_last()

    def _kind(self):
        data = self._data
        return {
            "kind": data.kind,
            "steps_per_epoch": data.steps_per_epoch,
            "steps_per_execution": data.steps_per_execution,
        }

    def _repeat(self, past, first, lasts):
        """Begin the passes before, without drawing more than a batch of each.

        What keeps an order of its own, such as a `tf.data.Dataset`, moves on
        to that of the next pass.
        """
        adapter = self._data.adapter
        while self._begun < past:
            with self._stream.active():
                if not lasts:
                    adapter.on_epoch_begin()
                self._new_pass().look_ahead()
                number = self._begun
                if first.get(number) != self._first.get(number):
                    raise ValueError(
                        _CHANGED.format(f"the first batch of pass {number}")
                    )
                if self._begun < past and self._begun + 1 not in first:
                    self._new_pass()
                if not lasts:
                    adapter.on_epoch_end()

    def _new_pass(self):
        """Return what Keras draws the batches of a new pass from."""
        self._begun += 1
        self._stream.seed(self.seed, self._begun)
        if self._tensorflow_seed is not None:
            self._tensorflow_seed.assign([self.seed, self._begun << 32])
        self._batches = _Batches(self, self._data.new_batches(), self._begun)
        return self._batches

    def _steps(self):
        """Yield the steps of an epoch that are left."""
        steps = self._data.steps()
        batch = None
        while True:
            with self._stream.active():
                step = next(steps, None)
                if step is None:
                    return
                batches = step[-1]
                batches.look_ahead()
            if step[0] < self._skip:
                if not self._is_placed:
                    for _ in range(self._data.steps_per_execution):
                        next(batches, None)
                batch = batches.last
                continue
            if self._skip:
                self._check_last()
            if self._then is not None:
                then, self._then = self._then, None
                then(batch)
            self._skip = 0
            batches.is_fresh = True
            yield step

    def _check_last(self):
        batches = self._batches
        if batches.drawn and _digest(batches.last) != self._expected:
            raise ValueError(
                _CHANGED.format(
                    f"batch {batches.drawn} of pass {batches.number}"
                )
            )

    def draw(self, source):
        """Return the next batch of a source, by the numbers of the data."""
        if self._data.draws_at_start:
            return next(source)
        with self._stream.active():
            return next(source)

    def note_first(self, number, batch):
        """Keep what tells whether a pass begins with the same batch again."""
        if not self._data.is_arrays:
            self._first[number] = _digest(batch)


class _Batches:
    """The batches of one pass.

    Attributes:
        number: Int, of the pass, from 1.
        drawn: Int, the batches that `fit` has got.
        last: The last of them.
        is_fresh: Bool, whether an execution of steps has got none yet.
    """

    def __init__(self, order, source, number):
        self._order = order
        self._source = source
        self._ahead = None
        self._has_looked = False
        self.number = number
        self.drawn = 0
        self.last = None
        self.is_fresh = True

    def look_ahead(self):
        """Draw the first batch, with the numbers that are active.

        With it, what shuffles when it begins has shuffled.
        """
        if self._has_looked:
            return
        self._has_looked = True
        for batch in self._source:
            self._ahead = batch
            self._order.note_first(self.number, batch)
            return

    def __iter__(self):
        return self

    def __next__(self):
        batch, self._ahead = self._ahead, None
        if batch is None:
            try:
                batch = self._order.draw(self._source)
            except StopIteration:
                if keras.backend.backend() == "tensorflow" and self.is_fresh:
                    import tensorflow as tf

                    # What its trainer takes for the end.
                    raise tf.errors.OutOfRangeError(
                        None, None, "end of data"
                    ) from None
                raise
        self.is_fresh = False
        self.drawn += 1
        self.last = batch
        return batch


def _digest(batch):
    """Return a string that tells a batch from others."""
    digest = hashlib.sha256()
    group = processes()
    for leaf in keras.tree.flatten(batch):
        if hasattr(leaf, "dtype"):
            # A batch may be split over processes, each with data of its own.
            arrays = (
                [ops.convert_to_numpy(leaf)]
                if group is None
                else group.own_part(leaf)
            )
            for array in map(np.ascontiguousarray, arrays):
                digest.update(f"{array.shape}{array.dtype}".encode())
                digest.update(array.tobytes())
    return digest.hexdigest()
