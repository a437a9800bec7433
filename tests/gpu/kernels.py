"""The kernels and the measure that the tests here share."""

import numpy as np

from keras_weightmods.ops import nm_project
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


def prepared(products, packed, x_dtype, kinds):
    """Return a packed kernel of JAX with companions, by their module."""
    made = {kind: products.companion(kind, packed, x_dtype) for kind in kinds}
    return products.PreparedPacked(
        **vars(packed), companions=made, x_dtype=x_dtype
    )
