import dataclasses
import importlib
import warnings

import keras
import ml_dtypes
import numpy as np
import pytest

from keras_weightmods import native
from keras_weightmods.native.layout import packed_arrays
from keras_weightmods.native.packed import Packed, pack_dense
from keras_weightmods.ops import pack_kernel, sparse_matmul, unpack_kernel
from tests import models, references
from tests.backends import breadth
from tests.models import normal, numpy
from tests.native.test_packed import DTYPES, kernel_of

# The function has taken the module's name.
module = importlib.import_module("keras_weightmods.ops.sparse_matmul")


@pytest.fixture
def compiled():
    if module.reason_for_dense():
        pytest.skip(module.reason_for_dense())


@pytest.fixture
def without_library(monkeypatch):
    monkeypatch.setattr(native, "_loaded", (None, "it is switched off."))
    monkeypatch.setattr(module, "_implementations", {})
    native.warn_dense.cache_clear()
    yield
    native.warn_dense.cache_clear()


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


ROUNDED = ["int8", "int4", "int8 dense", "int4 dense"]
CASES = [
    *((dtype, "float32") for dtype in DTYPES),
    *((dtype, "int8") for dtype in ROUNDED),
]


@pytest.mark.parametrize(("dtype", "activations"), CASES)
@breadth(
    ("leading", "k", "n"),
    [((1,), 64, 48), ((3, 2), 37, 21), ((19,), 132, 17), ((), 5, 2)],
    *(1, 3),
)
def test_equals_reference_with_gradients(
    compiled, leading, k, n, dtype, activations
):
    check_product(sparse_matmul, leading, k, n, dtype, activations)


@pytest.mark.parametrize(("dtype", "activations"), CASES)
def test_dense_product_equals_reference_too(dtype, activations):
    check_product(module.dense_matmul, (3, 2), 37, 21, dtype, activations)


def check_product(sparse_matmul, leading, k, n, dtype, activations):
    kernel = kernel_of(k, n)
    if dtype.endswith("dense"):
        packed = pack_dense(normal(k, n, seed=2), dtype.removesuffix(" dense"))
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


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_may_be_variables(dtype):
    packed = pack_kernel(kernel_of(64, 48), dtype)
    layer = SparseDense(packed)
    x = normal(3, 64)
    y = numpy(layer(keras.ops.convert_to_tensor(x)))
    np.testing.assert_array_equal(y, numpy(sparse_matmul(x, packed)))
    y = numpy(sparse_matmul(x, layer.packed))
    assert_close(y, x.astype("float64") @ unpack_kernel(packed))


@pytest.mark.parametrize("shape", [(2, 0, 3), (2, 4, 0), (0, 8, 3)])
def test_empty(shape):
    rows, k, n = shape
    packed = pack_kernel(kernel_of(k, n))
    y = numpy(sparse_matmul(normal(rows, k), packed))
    np.testing.assert_array_equal(y, np.zeros((rows, n)))


@pytest.mark.parametrize(
    ("dtype", "values", "rows"),
    [
        *(("float16", "float32", 3), ("bfloat16", "float32", 3)),
        *(("bfloat16", "bfloat16", 3), ("bfloat16", "bfloat16", 30)),
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


class SparseDense(keras.layers.Layer):
    """The least that makes a layer of the product."""

    def __init__(self, packed, **arguments):
        super().__init__(**arguments)
        self.given = packed

    def build(self, input_shape):
        weights = []
        specs = packed_arrays(self.given.shape, self.given.dtype)
        for name, (shape, dtype) in specs.items():
            weight = self.add_weight(
                shape=shape,
                dtype=dtype,
                name=name,
                initializer="zeros",
                trainable=name == "values" and dtype == "float32",
                autocast=False,
            )
            weight.assign(getattr(self.given, name))
            weights.append(weight)
        scale = weights[2:] or [None]
        shape, dtype = self.given.shape, self.given.dtype
        self.packed = Packed(*weights[:2], *scale, shape, dtype)

    def call(self, x):
        return sparse_matmul(x, self.packed)

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.given.shape[1])


@pytest.mark.parametrize("jit_compile", [False, True])
def test_in_a_compiled_model(jit_compile):
    if jit_compile and keras.backend.backend() == "torch":
        pytest.skip("torch.compile has tests of its own")
    kernel = kernel_of(24, 40)
    layer = SparseDense(pack_kernel(kernel))
    last = SparseDense(pack_kernel(kernel_of(40, 3, 1), "int8"))
    model = models.sequential((5, 24), layer, last)
    sgd = keras.optimizers.SGD(0.1)
    model.compile(sgd, "mse", jit_compile=jit_compile)
    x = normal(3, 5, 24)
    # The last batch is a smaller one.
    y = model.predict(x, batch_size=2, verbose=0)
    last_kernel = unpack_kernel(last.given)
    assert_close(y, x.astype("float64") @ kernel @ last_kernel, 1e-4)
    model.fit(x, np.ones_like(y), batch_size=3, verbose=0)
    trained = unpack_kernel(layer.packed)
    dy = 2 * (y - 1) / y.size
    dw = x.reshape(-1, 24).T @ (dy.reshape(-1, 3) @ last_kernel.T)
    expected = (kernel - 0.1 * dw).astype("float64")
    assert_close(trained * (kernel != 0), expected * (kernel != 0), 1e-4)
    assert not np.any(trained[kernel == 0])


def test_without_the_library(without_library):
    packed = pack_kernel(kernel_of(64, 48), "int8")
    x = normal(3, 64)
    with pytest.warns(UserWarning, match="dense kernels.*switched off"):
        y = sparse_matmul(x, packed)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparse_matmul(x, packed)
    expected = x.astype("float64") @ unpack_kernel(packed)
    assert_close(numpy(y), expected)


def test_compiled_model_without_the_library(without_library):
    with pytest.warns(UserWarning, match="dense kernels.*switched off"):
        test_in_a_compiled_model(False)


def test_wrong_shapes():
    packed = pack_kernel(kernel_of(64, 48))
    for x in (normal(3, 63), normal(3, 64, 1), np.float32(1)):
        with pytest.raises(ValueError, match="must have 64 entries in its"):
            sparse_matmul(x, packed)


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64"])
def test_inputs_that_are_no_floats_are_refused(dtype):
    packed = pack_kernel(kernel_of(64, 48))
    with pytest.raises(ValueError, match=r"`x` must be .*Received"):
        sparse_matmul(np.ones((2, 64), dtype), packed)


def test_a_kernel_that_is_not_packed_is_refused():
    with pytest.raises(ValueError, match="what `pack_kernel` returns"):
        sparse_matmul(np.ones((2, 4), "float32"), np.ones((4, 3), "float32"))
