import jax
import keras
import numpy as np
import pytest

from keras_weightmods import native
from keras_weightmods.backend.jax import shared_inputs
from keras_weightmods.native.packed import pack_dense, pack_kernel
from keras_weightmods.ops import nm_project, sparse_matmul

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "jax" or not native.is_available(),
    reason="needs the JAX backend and the compiled kernels",
)
RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype("float32")


def kernels(*sizes, dtype="int8"):
    made = [np.asarray(nm_project(normal(64, n), "2:4", 0)) for n in sizes]
    return [pack_kernel(w, dtype, "int8") for w in made]


def calls_in(function, *args):
    return str(jax.make_jaxpr(function)(*args)).count("ffi_call[")


def attention(x, kernels, others):
    """Products of one input, of another, and of what came of the first."""
    q, k, v = (sparse_matmul(x, packed) for packed in kernels)
    y = q * k * v
    return [y, *(sparse_matmul(y, packed) for packed in others)]


def test_products_of_one_input_share_a_call():
    first, others = kernels(64, 64, 64), kernels(16, 40, dtype="int4")
    x = normal(2, 3, 64)

    def plain(x):
        return attention(x, first, others)

    shared = shared_inputs.in_one_call(plain)
    assert calls_in(plain, x) == 5
    assert calls_in(shared, x) == 2
    jax.tree.map(
        np.testing.assert_array_equal, jax.jit(shared)(x), jax.jit(plain)(x)
    )


def test_what_shares_nothing():
    """Another input, another type, a dense matrix: a call each."""
    int8, int4 = kernels(16), kernels(16, dtype="int4")
    dense = [pack_dense(normal(64, 16), "int8")]

    def plain(x):
        products = [sparse_matmul(x, w) for w in (*int8, *int4, *dense)]
        return [*products, sparse_matmul(x + 1, int8[0])]

    shared = shared_inputs.in_one_call(plain)
    x = normal(3, 64)
    assert calls_in(shared, x) == calls_in(plain, x) == 4
    jax.tree.map(
        np.testing.assert_array_equal, jax.jit(shared)(x), jax.jit(plain)(x)
    )


def test_what_does_not_repeat_itself():
    """The products are right also where the second trace differs."""
    first, second, third = kernels(64, 64, 64)
    turn = iter([(first, second), (first, third)])

    def plain(x):
        return [sparse_matmul(x, packed) for packed in next(turn)]

    x = normal(3, 64)
    received = jax.jit(shared_inputs.in_one_call(plain))(x)
    for y, packed in zip(received, (first, third)):
        np.testing.assert_array_equal(y, sparse_matmul(x, packed))
    # Another size than that of the group that begins there.
    wide = pack_dense(normal(96, 16), "int8")
    turn = iter([[(x, first), (x, second)], [(normal(3, 96), wide)]])

    def other(_):
        return [sparse_matmul(*pair) for pair in next(turn)]

    assert calls_in(shared_inputs.in_one_call(other), x) == 1
