"""The random numbers of a process: what a training draws from, and its state.

Python's, NumPy's and torch's global generators, and the seed generator that
Keras uses where none is given. Those of TensorFlow cannot be read.
"""

import contextlib
import random
import sys

import numpy as np
from keras import ops

from keras_weightmods.core import keras_compat


def save_global():
    """Return the state of the global generators as {name: array}."""
    version, numbers, gauss = random.getstate()
    kind, keys, *rest = np.random.get_state(legacy=True)
    if kind != "MT19937":
        raise ValueError(
            "The state of NumPy's global generator can be kept where it is the "
            f"one NumPy starts with, MT19937. Received: {kind}"
        )
    states = {
        "python": np.array([version, *numbers], "uint32"),
        "python_gauss": np.array([] if gauss is None else [gauss], "float64"),
        "numpy": np.asarray(keys),
        "numpy_rest": np.array(rest, "float64"),
    }
    for device, state in _torch_states().items():
        states[f"torch_{device}"] = state
    seed = keras_compat.global_seed()
    if seed is not None:
        states["keras"] = ops.convert_to_numpy(seed)
    return states


def check(states):
    """Raise ValueError for what `save_global` never returns, from a file."""
    shapes = {
        "python": [("uint32", (626,))],
        "python_gauss": [("float64", (0,)), ("float64", (1,))],
        "numpy": [("uint32", (624,))],
        "numpy_rest": [("float64", (3,))],
    }
    for name, kinds in shapes.items():
        array = states.get(name)
        if array is None or (array.dtype.name, array.shape) not in kinds:
            raise ValueError(f"has no valid {name!r}")
    position = states["numpy_rest"][0]
    if not (
        states["python"][0] == 3
        and states["python"][-1] <= 624
        and 0 <= position <= 624
        and position == int(position)
    ):
        raise ValueError("is not the state of a generator")


def load_global(states):
    """Give the global generators the state that `save_global` returned."""
    version, *numbers = states["python"].tolist()
    gauss = states["python_gauss"].tolist()
    random.setstate((version, tuple(numbers), gauss[0] if gauss else None))
    place, has_gauss, cached = states["numpy_rest"].tolist()
    keys = states["numpy"]
    np.random.set_state(("MT19937", keys, int(place), int(has_gauss), cached))
    prefix = "torch_"
    _set_torch_states(
        {
            name.removeprefix(prefix): state
            for name, state in states.items()
            if name.startswith(prefix)
        }
    )
    if "keras" in states:
        keras_compat.global_seed(create=True).assign(states["keras"])


class DataStream:
    """Random numbers for data alone, from a seed.

    Drawn within `active`, the order of data depends neither on what else
    draws from the global generators, nor changes what that gets.
    """

    def __init__(self):
        self._state = None

    @contextlib.contextmanager
    def active(self):
        """Within, the global generators are those of the stream."""
        outer = _in_memory()
        if self._state is not None:
            _set(self._state)
        try:
            yield
        finally:
            self._state = _in_memory()
            _set(outer)

    @staticmethod
    def seed(*numbers):
        """Seed what is active; to be called within `active`."""
        words = np.random.SeedSequence(numbers).generate_state(4)
        random.seed(int(words[0]))
        np.random.seed(words[1:3])
        torch = sys.modules.get("torch")
        if torch is not None:
            # Not those of the GPU, of which no data are made.
            torch.default_generator.manual_seed(int(words[3]))


def _in_memory():
    torch = sys.modules.get("torch")
    return (
        random.getstate(),
        np.random.get_state(legacy=False),
        None if torch is None else torch.get_rng_state(),
    )


def _set(state):
    python, of_numpy, of_torch = state
    random.setstate(python)
    np.random.set_state(of_numpy)
    if of_torch is not None:
        sys.modules["torch"].set_rng_state(of_torch)


def _torch_states():
    if "torch" not in sys.modules:
        return {}
    from keras_weightmods.backend.torch.random_stream import global_states

    return global_states()


def _set_torch_states(states):
    if not states or "torch" not in sys.modules:
        return
    from keras_weightmods.backend.torch.random_stream import set_global_states

    set_global_states(states)
