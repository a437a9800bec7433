"""The processes that run one training together.

All must call these functions in the same order, or they wait forever.
"""

import json

import jax
import numpy as np
from jax.experimental import multihost_utils


def index():
    """Return the number of this process, from 0."""
    return jax.process_index()


def wait(name):
    """Wait until all processes have reached this call."""
    multihost_utils.sync_global_devices(name)


def gathered(value):
    """Return the list of the values of all processes, each made of JSON."""
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(len(data)))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(data)] = data
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [
        json.loads(row[: int(size)].tobytes()) for row, size in zip(rows, sizes)
    ]


def rows_of_all(array):
    """Return the rows of all processes, concatenated, in NumPy."""
    array = np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def whole(array):
    """Return a JAX array, even one split over the processes, in NumPy."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    # Under `jax.disable_jit` it would return only the part of this process.
    with jax.disable_jit(False):
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
