import dataclasses
import importlib
import warnings

import keras
import ml_dtypes
import numpy as np
import pytest

from keras_weightmods import native
from keras_weightmods.native.layout import INTEGERS
from keras_weightmods.native.packed import pack_dense
from keras_weightmods.ops import pack_kernel, sparse_matmul, unpack_kernel
from tests import models, references
from tests.backends import breadth
from tests.models import normal, numpy
from tests.native.test_packed import DTYPES, half_kernel, kernel_of

# The function has taken the module's name.
module = importlib.import_module("keras_weightmods.ops.sparse_matmul")


@pytest.fixture
def compiled():
    if module.reason_for_dense():
        pytest.skip(module.reason_for_dense())


def gradients(function, *inputs):
    """Gradients of the sum of `function` times fixed numbers."""

    def loss(*inputs):
        y = function(*inputs)
        dy = keras.ops.convert_to_tensor(normal(*y.shape, seed=7))
        return keras.ops.sum(y * dy)

    return models.gradients(loss, *inputs)


def assert_close(actual, expected, tolerance=1e-5):
    """Within `tolerance` of the largest entry."""
    actual = np.asarray(actual, "float64")
    assert actual.shape == expected.shape
    if expected.size:
        largest = np.abs(expected).max()
        assert np.abs(actual - expected).max() <= tolerance * largest


CASES = [
    *((dtype, "float32") for dtype in DTYPES),
    *(
        (dtype, "int8")
        for dtype in ("int8", "int4", *(f"{i} dense" for i in INTEGERS))
    ),
    *(("16:32 int8", "int8"), ("16:32 int4", "int8")),
    *(("16:32 int4", "float32"), ("16:32 bfloat16", "float32")),
]


@breadth(("dtype", "activations"), CASES, 0, 5, 9, 10, 13)
@breadth(
    ("leading", "k", "n"),
    [((3, 2), 37, 21), ((1,), 64, 48), ((19,), 132, 17), ((), 5, 2)],
)
def test_equals_reference_with_gradients(
    compiled, leading, k, n, dtype, activations
):
    check_product(sparse_matmul, leading, k, n, dtype, activations)


@pytest.mark.one_backend
@pytest.mark.parametrize(("dtype", "activations"), CASES)
def test_dense_product_equals_reference_too(dtype, activations):
    check_product(module.dense_matmul, (3, 2), 37, 21, dtype, activations)


def check_product(sparse_matmul, leading, k, n, dtype, activations):
    kernel = kernel_of(k, n)
    if dtype.endswith("dense"):
        packed = pack_dense(normal(k, n, seed=2), dtype.removesuffix(" dense"))
    elif dtype.startswith("16:32"):
        kind = dtype.split()[1], activations
        packed = pack_kernel(half_kernel(k, n), *kind, pattern="16:32")
    else:
        packed = pack_kernel(kernel, dtype, activations)
    w = unpack_kernel(packed).astype("float64")
    x = normal(*leading, k)
    dy = normal(*leading, n, seed=7).astype("float64")

    y = numpy(sparse_matmul(x, packed))
    assert y.dtype == np.float32
    rounded = x.astype("float64")
    if activations == "int8":
        rounded = references.round_activations(x)
    assert_close(y, rounded @ w)
    if dtype != "float32":
        (dx,) = gradients(lambda x: sparse_matmul(x, packed), x)
        assert_close(dx, dy @ w.T)
        return

    def with_values(values):
        return dataclasses.replace(packed, values=values)

    def product(x, values):
        return sparse_matmul(x, with_values(values))

    dx, dvalues = gradients(product, x, packed.values)
    assert_close(dx, dy @ w.T)
    dw = x.reshape(-1, k).T.astype("float64") @ dy.reshape(-1, n)
    found = unpack_kernel(with_values(dvalues))
    kept = kernel != 0
    assert_close(found * kept, dw * kept)


@breadth("shape", [(2, 0, 3), (2, 4, 0), (0, 8, 3)])
def test_empty(shape):
    rows, k, n = shape
    packed = pack_kernel(kernel_of(k, n))
    y = numpy(sparse_matmul(normal(rows, k), packed))
    np.testing.assert_array_equal(y, np.zeros((rows, n)))


@breadth(
    ("dtype", "values", "rows"),
    [
        *(("bfloat16", "bfloat16", 30), ("bfloat16", "bfloat16", 3)),
        *(("float16", "float32", 3), ("bfloat16", "float32", 3)),
    ],
)
def test_the_activation_gives_the_type(dtype, values, rows):
    packed = pack_kernel(kernel_of(64, 48), values)
    x = keras.ops.cast(normal(rows, 64), dtype)
    y = sparse_matmul(x, packed)
    assert keras.backend.standardize_dtype(y.dtype) == dtype
    x, y = (numpy(keras.ops.cast(each, "float32")) for each in (x, y))
    assert_close(y, x.astype("float64") @ unpack_kernel(packed), 2**-8)

    def product(x):
        y = sparse_matmul(keras.ops.cast(x, dtype), packed)
        return keras.ops.cast(y, "float32")

    (dx,) = gradients(product, x)
    expected = normal(rows, 48, seed=7).astype("float64")
    assert_close(dx, expected @ unpack_kernel(packed).T, 2**-6)


def test_bfloat16_results_are_rounded_once(compiled):
    kernel = np.rint(8 * kernel_of(64, 48))
    packed = pack_kernel(kernel, "bfloat16")
    x = np.rint(16 * normal(5, 6, 64))
    y = sparse_matmul(keras.ops.cast(x, "bfloat16"), packed)
    # The sums are exact.
    expected = (x @ kernel).astype(ml_dtypes.bfloat16).astype("float32")
    y = numpy(keras.ops.cast(y, "float32"))
    np.testing.assert_array_equal(y, expected)


def test_without_the_library_one_warning_says_so(monkeypatch):
    monkeypatch.setattr(native, "_loaded", (None, "it is switched off."))
    monkeypatch.setattr(module, "_implementations", {})
    native.warn_dense.cache_clear()
    packed = pack_kernel(kernel_of(64, 48), "int8")
    x = normal(3, 64)
    with pytest.warns(UserWarning, match="dense kernels.*switched off"):
        y = sparse_matmul(x, packed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparse_matmul(x, packed)
    native.warn_dense.cache_clear()
    expected = x.astype("float64") @ unpack_kernel(packed)
    assert_close(numpy(y), expected)


@pytest.mark.one_backend
def test_wrong_arguments():
    packed = pack_kernel(kernel_of(64, 48))
    for x in (normal(3, 63), normal(3, 64, 1), np.float32(1)):
        with pytest.raises(ValueError, match="must have 64 entries in its"):
            sparse_matmul(x, packed)
    for dtype in ("int32", "bool", "complex64"):
        with pytest.raises(ValueError, match=r"`x` must be .*Received"):
            sparse_matmul(np.ones((2, 64), dtype), packed)
    with pytest.raises(ValueError, match="what `pack_kernel` returns"):
        sparse_matmul(np.ones((2, 4), "float32"), np.ones((4, 3), "float32"))
