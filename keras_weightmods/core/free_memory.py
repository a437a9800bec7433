"""Memory that is free: whether a training fits, and what goes back."""

import ctypes
import math
import pathlib
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from keras_weightmods import backend
from keras_weightmods.utils.report import size_text

# What the system can give without swapping, and what a container may take.
_SYSTEM = pathlib.Path("/proc/meminfo")
_CONTAINER = pathlib.Path("/sys/fs/cgroup")


def warn_if_short(
    caller: str, variables: Sequence[Any], nbytes: int, way_out: str
) -> None:
    """Warn if a training is sure to take more memory than is free.

    Otherwise the system would end the process during the first steps, without a
    word. Nothing is checked on an accelerator, or where the system does not say
    how much is free.

    Args:
        caller: String, the function of the user.
        variables: List of variables of the model, to find their device.
        nbytes: Int, the bytes of what will be allocated: gradients and the
            state of the optimizer. Activations are not in it.
        way_out: String, what takes less.
    """
    free = _free_bytes()
    if free is None or nbytes <= free:
        return
    # A small one, because TensorFlow copies it.
    small = min(variables, key=lambda v: math.prod(v.shape))
    if backend.current().view_of(small.value) is None:
        return
    warnings.warn(
        f"`{caller}` needs {size_text(nbytes)} for gradients and the state of "
        "the optimizer, and more for activations. Received: "
        f"{size_text(free)} of free memory. The system may end the process. "
        f"{way_out}",
        stacklevel=3,
    )


def give_back() -> None:
    """Give freed memory to the system, where the C library can.

    On Linux it keeps freed memory that lies between arrays in use.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def _free_bytes() -> int | None:
    found = []
    try:
        lines = _SYSTEM.read_text().splitlines()
        (available,) = [x for x in lines if x.startswith("MemAvailable:")]
        found.append(1024 * int(available.split()[1]))
    except (OSError, ValueError):
        return None
    try:
        limit, used = (
            int((_CONTAINER / f"memory.{name}").read_text())
            for name in ("max", "current")
        )
        found.append(max(0, limit - used))
    except (OSError, ValueError):
        # No container, or one without a limit, which says "max".
        pass
    return min(found)
