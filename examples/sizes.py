"""The memory that the examples and benchmarks report."""

import math
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
