"""Types of arrays by the names that Keras has for them."""

import math
from typing import Any

import ml_dtypes
import numpy as np


def numpy_dtype(name: str) -> Any:
    """Return the NumPy dtype that Keras calls `name`."""
    return np.dtype(getattr(ml_dtypes, name, name))


def bytes_of(arrays: Any) -> int:
    """Return the size of all that has a `shape` and a `dtype`, in bytes."""
    return sum(
        math.prod(array.shape) * int(numpy_dtype(array.dtype).itemsize)
        for array in arrays
    )
