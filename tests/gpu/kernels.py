"""The kernels and the measure that the tests here share."""

import numpy as np

from keras_weightmods.ops import nm_project, unpack_kernel
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


def rounded_rows(x):
    """Return int8 rows and their scales, as the activations of a GPU."""
    x = x.astype("float32")
    largest = np.abs(x).max(axis=1)
    scale = largest / np.float32(127)
    scale[scale < np.finfo("float32").tiny] = 1
    scale[~np.isfinite(largest)] = np.nan
    steps = np.nan_to_num(np.rint(x / scale[:, None])).astype("int8")
    return steps, scale


def product_of_rounded_rows(x, packed):
    """Return, in float64, the product of rounded rows with an int8 kernel."""
    steps, scale = rounded_rows(numpy(x).astype("float32"))
    kernel = unpack_kernel(packed).astype("float64")
    return steps.astype("float64") @ kernel * scale[:, None]
