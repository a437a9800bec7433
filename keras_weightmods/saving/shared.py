"""Writing where several processes train one model: the first one writes."""

from typing import Any

from keras import ops

from keras_weightmods.backend import processes


def is_first() -> bool:
    """Return whether this is the process that writes."""
    group = processes()
    return group is None or bool(group.index() == 0)


def wait(name: str) -> None:
    """Wait for the other processes, where there are any."""
    group = processes()
    if group is not None:
        group.wait(name)


def whole(value: Any) -> Any:
    """Return a variable, tensor or array as a NumPy array.

    All processes call it, as each may hold a part.
    """
    group = processes()
    if group is None:
        return ops.convert_to_numpy(value)
    return group.whole(ops.convert_to_tensor(value))
