"""The state of torch's random numbers, to be saved and restored."""

import torch


def global_states():
    """Return the state of torch's generators: uint8 arrays by device type."""
    states = {"cpu": torch.get_rng_state().numpy()}
    if _uses_cuda():
        states["cuda"] = torch.cuda.get_rng_state().numpy()
    return states


def set_global_states(states):
    """Give torch's generators, of the devices in use, these states."""
    torch.set_rng_state(torch.from_numpy(states["cpu"]))
    if _uses_cuda() and "cuda" in states:
        torch.cuda.set_rng_state(torch.from_numpy(states["cuda"]))


def _uses_cuda():
    return torch.cuda.is_available() and torch.cuda.is_initialized()
