"""Writing where several processes train one model: the first one writes."""

import collections
from collections.abc import Iterable
from typing import Any

from keras_weightmods.backend import processes
from keras_weightmods.saving import container


def is_first() -> bool:
    """Return whether this is the process that writes."""
    group = processes()
    return group is None or bool(group.index() == 0)


def write(
    filepath: Any,
    format: str,
    version: int,
    entries: Any,
    arrays: Iterable[tuple[str, Any]],
    overwrite: bool = True,
) -> None:
    """Write a file as `container.write` does, by the first process.

    All go through the arrays, as each may hold a part of a weight.
    """
    if is_first():
        container.write(filepath, format, version, entries, arrays, overwrite)
    else:
        collections.deque(arrays, maxlen=0)


def wait(name: str) -> None:
    """Wait for the other processes, where there are any."""
    group = processes()
    if group is not None:
        group.wait(name)
