"""The kernels and the measure that the tests here share."""

import numpy as np

from keras_weightmods.ops import nm_project, unpack_kernel
from tests.models import normal, numpy


def sparse_kernel(k, n, seed=0):
    """Return a float32 2:4 kernel."""
    kernel = np.zeros((-(-k // 4) * 4, n), "float32")
    kernel[:k] = normal(k, n, seed=seed)
    return numpy(nm_project(kernel, "2:4"))[:k]


def error(y, expected):
    """Return the norm of the difference over that of `expected`."""
    difference = np.linalg.norm(numpy(y).astype("float64") - expected)
    return difference / np.linalg.norm(expected)


def product_of_rounded_rows(x, packed):
    """Return, in float64, the product of rows rounded to int8."""
    x = numpy(x).astype("float32")
    largest = np.abs(x).max(axis=1)
    scale = largest / np.float32(127)
    scale[scale < np.finfo("float32").tiny] = 1
    scale[~np.isfinite(largest)] = np.nan
    steps = np.nan_to_num(np.rint(x / scale[:, None]))
    kernel = unpack_kernel(packed).astype("float64")
    return steps.astype("float64") @ kernel * scale[:, None]
