"""The kernels and the measure that the tests here share."""

import numpy as np

from keras_weightmods.ops import nm_project
from tests.models import normal, numpy


def sparse_kernel(k, n, seed=0, further_zeros=0.0):
    """Return a float32 2:4 kernel; some groups may have fewer nonzeros."""
    kernel = np.zeros((-(-k // 4) * 4, n), "float32")
    kernel[:k] = normal(k, n, seed=seed)
    rng = np.random.default_rng(seed)
    kernel[rng.random(kernel.shape) < further_zeros] = 0
    return numpy(nm_project(kernel, "2:4"))[:k]


def error(y, expected):
    """Return the norm of the difference over that of `expected`."""
    difference = np.linalg.norm(numpy(y).astype("float64") - expected)
    return difference / np.linalg.norm(expected)
