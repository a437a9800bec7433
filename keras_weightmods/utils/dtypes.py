"""Array dtypes by their names in Keras."""

import math
from typing import Any

import ml_dtypes
import numpy as np

# The largest rounding error of a number, as a share of it.
_ROUNDING = {"bfloat16": 2.0**-8, "float16": 2.0**-11}


def numpy_dtype(name: str) -> Any:
    """Return the NumPy dtype that Keras calls `name`."""
    return np.dtype(getattr(ml_dtypes, name, name))


def has_16_bits(variable: Any) -> bool:
    """Return whether rounding cancels steps of the usual size in a variable."""
    return variable.dtype in _ROUNDING


def restored(weight: Any, master: Any) -> Any:
    """Return the float32 tensor that was rounded to a weight in 16 bits.

    Args:
        weight: Tensor in bfloat16 or float16.
        master: Float32 tensor, the weight before it was rounded. Where
            `weight` was changed since, it is not used. `weight` is not compared
            with a rounded `master`: XLA leaves out such a rounding.
    """
    # Imported here: the command line reads files without Keras.
    import keras
    from keras import ops

    dtype = keras.backend.standardize_dtype(weight.dtype)
    wide = ops.cast(weight, "float32")
    rounded = ops.abs(master - wide)
    is_own = rounded <= _ROUNDING[dtype] * ops.abs(wide)
    return ops.where(is_own, master, wide)


def bytes_of(arrays: Any) -> int:
    """Return the bytes of all `arrays`, which have a `shape` and a `dtype`."""
    return sum(
        math.prod(array.shape) * int(numpy_dtype(array.dtype).itemsize)
        for array in arrays
    )
