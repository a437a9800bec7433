import sys

import keras
import numpy as np
import pytest

from keras_weightmods import native
from keras_weightmods.native.packed import pack_dense
from keras_weightmods.ops import (
    Packed,
    pack_kernel,
    sparse_matmul,
    unpack_kernel,
)
from keras_weightmods.ops.sparse_matmul import reason_for_dense
from tests import references
from tests.models import normal
from tests.native.test_packed import kernel_of
from tests.ops.test_sparse_matmul import assert_close

if keras.backend.backend() != "tensorflow" or reason_for_dense():
    pytest.skip("TensorFlow and the compiled kernels", allow_module_level=True)

import tensorflow as tf

from keras_weightmods.backend.tensorflow import sparse_matmul as implementation

K, N = 36, 20
SIGNATURE = [tf.TensorSpec((None, None, K))]


class Product(tf.Module):
    def __init__(self):
        super().__init__()
        packed = pack_kernel(kernel_of(K, N))
        self.values = tf.Variable(packed.values)
        self.meta = tf.Variable(packed.meta, trainable=False)

    def __call__(self, x):
        packed = Packed(self.values, self.meta, None, (K, N), "float32")
        return sparse_matmul(x, packed)


@pytest.mark.parametrize("jit_compile", [False, True])
def test_one_function_for_batches_of_any_size(jit_compile):
    options = {"jit_compile": jit_compile, "input_signature": SIGNATURE}
    function = tf.function(Product(), **options)
    for leading in ((1, 1), (3, 2), (2, 7)):
        x = normal(*leading, K)
        assert_close(function(x), x.astype("float64") @ kernel_of(K, N))
    graph = function.get_concrete_function().graph.as_graph_def()
    operators = {node.op for node in graph.node}
    assert "XlaCallModule" in operators
    assert "MatMul" not in operators
    assert function.experimental_get_tracing_count() == 1


def test_gradients_in_a_function():
    product = Product()

    @tf.function(jit_compile=True, input_signature=SIGNATURE)
    def gradients(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(product(x) ** 2)
        return tape.gradient(loss, [x, product.values])

    x, w = normal(3, 2, K), kernel_of(K, N).astype("float64")
    dx, dvalues = gradients(x)
    y = x @ w
    assert_close(dx, 2 * y @ w.T)
    dw = 2 * x.reshape(-1, K).T.astype("float64") @ y.reshape(-1, N)
    expected = pack_kernel(np.where(w != 0, dw, 0)).values
    kept = product.values.numpy() != 0
    assert_close(dvalues * kept, expected.astype("float64") * kept)


@pytest.mark.parametrize(
    "packed",
    [
        pack_kernel(kernel_of(K, N), "int8", "int8"),
        pack_dense(normal(K, N), "int4"),
        pack_dense(normal(K, N), "int3"),
    ],
)
def test_int8_activations_in_a_function(packed):
    w = unpack_kernel(packed).astype("float64")

    @tf.function(jit_compile=True, input_signature=SIGNATURE)
    def product(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = sparse_matmul(x, packed)
        return y, tape.gradient(y, x)

    for leading in ((1, 1), (2, 7)):
        x = normal(*leading, K)
        y, dx = product(x)
        assert_close(y, references.round_activations(x) @ w)
        assert_close(dx, np.broadcast_to(w.sum(1), x.shape))
    assert product.experimental_get_tracing_count() == 1


def test_where_the_way_into_xla_is_missing(monkeypatch):
    def register():
        raise AttributeError("undefined symbol")

    monkeypatch.setattr(implementation.xla_calls, "register", register)
    chosen = sys.modules["keras_weightmods.ops.sparse_matmul"]
    monkeypatch.setattr(chosen, "_implementations", {})
    implementation._refusal.cache_clear()
    native.warn_dense.cache_clear()
    x = normal(3, K)
    try:
        with pytest.warns(UserWarning, match=r"TensorFlow .* undefined symb"):
            y = sparse_matmul(x, pack_kernel(kernel_of(K, N)))
    finally:
        implementation._refusal.cache_clear()
        native.warn_dense.cache_clear()
    assert_close(y, x.astype("float64") @ kernel_of(K, N))
