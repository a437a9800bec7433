"""The memory that the examples and benchmarks report."""

import contextlib
import ctypes
import math
import pathlib
import re
import resource
import sys


def nbytes(variables):
    """Return the bytes that these variables hold."""
    sizes = {"bfloat16": 2, "float16": 2, "int8": 1, "uint8": 1, "bool": 1}
    return sum(
        math.prod(v.shape) * (8 if "64" in v.dtype else sizes.get(v.dtype, 4))
        for v in variables
    )


def peak_bytes():
    """Return the largest size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


def resident_bytes():
    """Return the size of this process now, freed blocks given back first."""
    status = pathlib.Path("/proc/self/status")
    if not status.exists():
        return peak_bytes()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
    (line,) = re.findall(r"VmRSS:\s+(\d+) kB", status.read_text())
    return int(line) * 1024
