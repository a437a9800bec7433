import dataclasses

import keras
import numpy as np
import pytest

from keras_weightmods.native.packed import pack_dense
from keras_weightmods.ops import pack_kernel, sparse_matmul, unpack_kernel
from keras_weightmods.ops.sparse_matmul import reason_for_dense
from tests import references
from tests.models import normal
from tests.native.test_packed import kernel_of
from tests.ops.test_sparse_matmul import assert_close

if keras.backend.backend() != "jax" or reason_for_dense():
    pytest.skip("JAX and the compiled kernels", allow_module_level=True)

import jax
import jax.numpy as jnp

K, N = 36, 20


@pytest.fixture
def packed():
    return pack_kernel(kernel_of(K, N))


def product(x, values, packed):
    return sparse_matmul(x, dataclasses.replace(packed, values=values))


@pytest.mark.parametrize(
    "packed",
    [
        pack_kernel(kernel_of(K, N), "bfloat16"),
        pack_kernel(kernel_of(K, N), "int8", "int8"),
        pack_dense(normal(K, N), "int4"),
        pack_dense(normal(K, N), "int3"),
    ],
)
def test_vmap_and_gradients_of_rows(packed):
    w = unpack_kernel(packed).astype("float64")
    x = jnp.asarray(normal(3, 2, K))
    batched = jax.vmap(lambda x: sparse_matmul(x, packed))
    rounded = np.asarray(x, "float64")
    if packed.activations == "int8":
        rounded = references.round_activations(np.asarray(x))
    assert_close(batched(x), rounded @ w)
    # The gradient ignores the rounding of `x`.
    gradient = jax.vmap(jax.grad(lambda x: jnp.sum(sparse_matmul(x, packed))))
    assert_close(gradient(x), np.broadcast_to(w.sum(1), x.shape))


def test_bfloat16_is_never_cast():
    packed = pack_kernel(kernel_of(K, N), "bfloat16")
    x = jnp.asarray(normal(10, K), "bfloat16")
    product = jax.jit(lambda x: sparse_matmul(x, packed))
    lowered = product.lower(x).as_text()
    assert lowered.count("custom_call @kwm_xla_matmul_bfloat16") == 1
    assert "convert" not in lowered
    expected = np.asarray(x, "float64") @ unpack_kernel(packed)
    assert_close(product(x), expected, 2**-8)


@pytest.mark.parametrize("x_batched", [True, False])
def test_vmap_over_kernels(packed, x_batched):
    factors = np.array([1.0, -2.0, 0.5], "float32")
    values = factors[:, None, None, None] * packed.values
    x = normal(3, 2, K) if x_batched else normal(2, K)
    y = jax.vmap(
        lambda x, values: product(x, values, packed),
        (0 if x_batched else None, 0),
    )(x, values)
    expected = x.astype("float64") @ kernel_of(K, N)
    assert_close(y, factors[:, None, None] * expected)


def test_second_derivatives_equal_those_of_the_dense_product(packed):
    x, kernel = jnp.asarray(normal(3, K)), jnp.asarray(kernel_of(K, N))

    def norm_of_gradient(multiply, w):
        gradient = jax.grad(lambda x: jnp.sum(multiply(x, w) ** 3))
        return jnp.sum(gradient(x) ** 2)

    found = jax.grad(
        lambda v: norm_of_gradient(lambda x, v: product(x, v, packed), v)
    )(jnp.asarray(packed.values))
    dense = jax.grad(lambda w: norm_of_gradient(jnp.matmul, w))(kernel)
    expected = pack_kernel(np.where(kernel != 0, dense, 0))
    # Where a group holds fewer than two nonzeros, a zero is kept too.
    kept = packed.values != 0
    assert_close(found * kept, expected.values.astype("float64") * kept, 1e-4)


def test_a_gradient_that_nobody_asks_for_is_not_computed(packed):
    def loss(x, values):
        return jnp.sum(product(x, values, packed))

    compiled = jax.jit(jax.grad(loss)).lower(normal(2, K), packed.values)
    text = compiled.compile().as_text()
    assert "kwm_xla_matmul_transposed" in text
    assert "kwm_xla_values_gradient" not in text


def test_exported_program_runs(packed):
    function = jax.jit(lambda x: sparse_matmul(x, packed))
    checks = [jax.export.DisabledSafetyCheck.custom_call("kwm_xla_matmul")]
    (batch,) = jax.export.symbolic_shape("batch")
    exported = jax.export.export(function, disabled_checks=checks)(
        jax.ShapeDtypeStruct((batch, K), jnp.float32)
    )
    again = jax.export.deserialize(exported.serialize())
    for rows in (1, 5):
        x = normal(rows, K)
        assert_close(again.call(x), x.astype("float64") @ kernel_of(K, N))


def test_a_call_that_does_not_fit_is_an_error_of_xla(packed):
    no_scale = np.zeros(0, "float32")
    rounded = pack_kernel(kernel_of(K, N), "int4")
    values, meta, scale = rounded.values, rounded.meta, rounded.scale
    int8, x = pack_kernel(kernel_of(K, N), "int8"), normal(2, K)
    dense = pack_dense(normal(K, N), "int5")
    misfit, half = "packed weights do not fit", scale.view("float16")
    for kind, columns, weights, message in (
        ("", 4 * N, (packed.values, packed.meta, no_scale), misfit),
        ("_int8", N, (values, meta, scale.astype("f4")), misfit),
        ("_int8", N, (int8.values, meta[:0, 0, 0], int8.scale), misfit),
        ("_int8", N, (dense.values[1:], meta[:0, 0, 0], scale), misfit),
        *(
            ("_int8", N, (values, meta[:0, 0, 0], scale), "uint8 of 2 to 6")
            for values in (dense.values.repeat(2, 2), dense.values[:, :, 0])
        ),
        ("_int8", N, (values, meta, half), "bfloat16 for int4"),
    ):
        result = jax.ShapeDtypeStruct((2, columns), jnp.float32)
        with pytest.raises(Exception, match=message):
            jax.ffi.ffi_call(f"kwm_xla_matmul{kind}", result)(x, *weights)
