"""What a checkpoint of `CAST` holds beside the variables that Keras saves."""

from typing import Any

import keras
import numpy as np

from keras_weightmods.backend import backend_module


class RunState:
    """The length of a run, whether it is started, and its random numbers.

    Args:
        model: The `keras.Model` that is trained.
        is_started: Bool, False where a one-shot start is to come.

    Attributes:
        is_started: Bool.
        planned_batches: Int, the length of the run, or `None` where `CAST`
            has not planned it.
        random_stream: The `RandomStream` of the train steps on torch; `None`
            on the other backends, whose random numbers are in the variables.
    """

    def __init__(self, model, is_started):
        self.model = model
        self.is_started = is_started
        self.planned_batches = None
        self.random_stream: Any = None
        if keras.backend.backend() == "torch":
            self.random_stream = backend_module("random_stream").RandomStream()

    def save(self, store):
        """Write the state into a store of `save_own_variables`."""
        store["is_started"] = np.asarray(self.is_started)
        if self.planned_batches is not None:
            store["planned_batches"] = np.asarray(self.planned_batches)
        for key, variable in self._seed_states().items():
            store[key] = variable
        if self.random_stream is not None:
            for device, state in self.random_stream.states.items():
                store[f"random_state_{device}"] = state

    def load(self, store):
        """Take the state, or as much of it as there is, from a store.

        Returns:
            The `planned_batches` in the store, for `CAST` to plan with.

        Raises:
            ValueError: If a random state does not fit. Nothing is changed
                then.
        """
        saved = {key: np.asarray(store[key]) for key in list(store.keys())}
        states = {
            key.removeprefix("random_state_"): state
            for key, state in saved.items()
            if key.startswith("random_state_")
        }
        if self.random_stream is not None and states:
            self.random_stream.states = states
        for key, variable in self._seed_states().items():
            if key in saved:
                variable.assign(saved[key])
        self.is_started = bool(saved.get("is_started", self.is_started))
        planned = saved.get("planned_batches")
        return None if planned is None else int(planned)

    def _seed_states(self):
        # Of dropout; Keras leaves them out of checkpoints.
        states = [
            variable
            for variable in self.model.non_trainable_variables
            if variable.name == "seed_generator_state"
        ]
        return {f"seed_state_{i}": state for i, state in enumerate(states)}
