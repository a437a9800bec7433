"""Random numbers of a training that can be saved and restored, on torch."""

import contextlib

import numpy as np
import torch


class RandomStream:
    """A stream of random numbers beside torch's global one.

    Dropout without a seed draws from torch's global generators, and so does
    every data loader when it starts. In a stream of its own, what a train
    step draws does not depend on how the data came.
    """

    def __init__(self):
        self._states = None

    @property
    def states(self):
        """Dict of uint8 arrays by device type; starts at torch's state."""
        if self._states is None:
            self._states = global_states()
        return self._states

    @states.setter
    def states(self, states):
        current = global_states()
        for device, state in states.items():
            if device in current and (
                state.dtype != np.uint8 or state.shape != current[device].shape
            ):
                raise ValueError(
                    f"The random state of {device!r} must be a uint8 array of "
                    f"shape {current[device].shape}. Received: an array of "
                    f"dtype {state.dtype} and shape {state.shape}"
                )
        # Of a device that is not in use here, its state is of no use either.
        self._states = {**current, **states}

    @contextlib.contextmanager
    def active(self):
        """Within, torch draws from this stream."""
        states = self.states
        devices = _cuda_devices()
        with torch.random.fork_rng(devices):
            set_global_states(states)
            yield
            self._states = global_states()


def global_states():
    """Return the state of torch's generators: uint8 arrays by device type."""
    states = {"cpu": torch.get_rng_state().numpy()}
    if _cuda_devices():
        states["cuda"] = torch.cuda.get_rng_state().numpy()
    return states


def set_global_states(states):
    """Give torch's generators, of the devices in use, these states."""
    torch.set_rng_state(torch.from_numpy(states["cpu"]))
    if _cuda_devices() and "cuda" in states:
        torch.cuda.set_rng_state(torch.from_numpy(states["cuda"]))


def _cuda_devices():
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return [torch.cuda.current_device()]
    return []
