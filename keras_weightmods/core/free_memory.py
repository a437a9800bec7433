"""Memory that is free: whether a training fits, and what goes back."""

import contextlib
import ctypes
import math
import os
import pathlib
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from keras_weightmods import backend
from keras_weightmods.utils.report import size_text

# What the system can give without swapping, and what a container may take.
_SYSTEM = pathlib.Path("/proc/meminfo")
_CONTAINER = pathlib.Path("/sys/fs/cgroup")
# Options of glibc's `mallopt`.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4


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
    if trim := _of_glibc("malloc_trim"):
        trim(0)


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Keep freed memory within this scope, and give it back at the end.

    By default glibc gives an array of some megabytes to the system as soon as
    it is freed. The next step of a training then waits for new pages. Settings
    that the user has made by an environment variable stay.
    """
    names = "MALLOC_", "GLIBC_TUNABLES"
    option = _of_glibc("mallopt")
    if option is None or any(name.startswith(names) for name in os.environ):
        yield
        return
    # What lies free between arrays would stay so, beside new memory.
    give_back()
    try:
        option(_MMAP_MAX, 0)
        option(_TRIM_THRESHOLD, 2**31 - 1)
        yield
    finally:
        # From now on glibc does not adapt the thresholds. These are the largest
        # that it goes to by itself.
        option(_MMAP_MAX, 2**16)
        option(_MMAP_THRESHOLD, 2**25)
        option(_TRIM_THRESHOLD, 2**26)
        give_back()


def _of_glibc(name: str) -> Any:
    """Return a function of glibc; None where Python runs on another library."""
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), name, None)


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
