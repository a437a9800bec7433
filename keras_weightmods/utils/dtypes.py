"""Types of arrays by the names that Keras has for them."""

import math
from typing import Any

import ml_dtypes
import numpy as np


def numpy_dtype(name: str) -> Any:
    """Return the NumPy dtype that Keras calls `name`."""
    return np.dtype(getattr(ml_dtypes, name, name))


def bytes_of(arrays: Any) -> int:
    """Return the size of arrays, given as pairs of a shape and a dtype."""
    return sum(
        math.prod(shape) * int(numpy_dtype(dtype).itemsize)
        for shape, dtype in arrays
    )
