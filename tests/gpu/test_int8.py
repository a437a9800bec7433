"""int8 activations on a GPU: each row rounded, by the fakes on a CPU."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_weightmods as kwm
from keras_weightmods.native.gpu.dispatch import Measured, Plan
from keras_weightmods.native.packed import (
    dense_matmul,
    pack_kernel,
    unpack_kernel,
)
from tests.gpu.kernels import error, product_of_rounded_rows, sparse_kernel
from tests.models import make_sparse, mlp, normal, numpy

BACKEND = keras.backend.backend()
if BACKEND not in ("jax", "torch"):
    pytest.skip("JAX and torch alone", allow_module_level=True)
if BACKEND == "jax":
    import jax

    from keras_weightmods.backend.jax import sparse_matmul_gpu as products
else:
    import torch

    from keras_weightmods.backend.torch import sparse_matmul_gpu as products

K, N = 64, 32
# Roundings to bfloat16: of the dense kernel, of the sum and of the result.
TOLERANCE = 6e-3


def make(seed=0):
    kernel = sparse_kernel(K, N, seed) * np.linspace(0.1, 3, N)
    return pack_kernel(kernel.astype("float32"), "int8", "int8")


def multiply(x, packed, method):
    if BACKEND == "torch":
        arrays = [packed.values, packed.meta, packed.scale]
        arrays = [torch.from_numpy(array) for array in arrays]
        return products.sparse_matmul_int8(x, *arrays, N, method)
    kinds = [method] if method != "decode" else []
    packed = products.prepare(packed, x.dtype.name, kinds)
    return products.matmul(x, packed, method)


@pytest.mark.parametrize("x_dtype", ["bfloat16", "float32", "float16"])
@pytest.mark.parametrize("method", ["cusparselt", "decode", "dense"])
def test_product_equals_reference(card, method, x_dtype):
    packed = make()
    x = normal(2, 3, K, seed=1)
    x[0, 1] *= 1000
    x = ops.cast(ops.convert_to_tensor(x), x_dtype)
    y = multiply(x, packed, method)
    assert tuple(y.shape) == (2, 3, N)
    assert keras.backend.standardize_dtype(y.dtype) == x_dtype
    rows = numpy(x).astype("float64").reshape(-1, K)
    expected = product_of_rounded_rows(rows.astype("float32"), packed)
    y = numpy(y).astype("float64").reshape(-1, N)
    for i in range(len(y)):
        assert error(y[i], expected[i]) <= TOLERANCE


@pytest.mark.parametrize("method", ["cusparselt", "decode", "dense"])
def test_a_row_that_is_not_finite(card, method):
    packed = make()
    x = normal(5, K, seed=1)
    x[1, 7], x[2, 9], x[3] = np.nan, np.inf, 0
    y = numpy(multiply(ops.cast(x, "bfloat16"), packed, method))
    assert np.isnan(y[1:3].astype("float32")).all()
    assert not y[3].any()
    assert np.isfinite(y[[0, 4]].astype("float32")).all()


def test_differs_from_a_cpu_by_the_rounding_alone(card):
    """By blocks there, by rows here: what the docs say of it."""
    packed = make()
    x = normal(32, K, seed=1)
    x[:, 5] *= 30  # an outlier costs its block there, its row here
    here = numpy(multiply(ops.convert_to_tensor(x), packed, "cusparselt"))
    there = numpy(dense_matmul(ops.convert_to_tensor(x), packed))
    weights = np.abs(unpack_kernel(packed)).sum(axis=0)
    step = np.abs(x).max(axis=1, keepdims=True) / 127
    assert (np.abs(here - there) <= step * weights + np.abs(there) / 128).all()
    exact = x @ unpack_kernel(packed).astype("float64")
    assert error(there, exact) < error(here, exact) < 0.05


def test_gradient_is_that_of_no_rounding(card):
    packed = make()
    x, dy = normal(32, K, seed=1), normal(32, N, seed=2)
    expected = dy @ unpack_kernel(packed).T
    if BACKEND == "jax":
        function = lambda x: multiply(x, packed, "cusparselt")  # noqa: E731
        _, pull = jax.vjp(function, jax.numpy.asarray(x))
        (dx,) = pull(jax.numpy.asarray(dy))
    else:
        arrays = [packed.values, packed.meta, packed.scale]
        arrays = [torch.from_numpy(array) for array in arrays]
        dx = products.sparse_matmul_transposed(torch.from_numpy(dy), *arrays, K)
    np.testing.assert_allclose(dx, expected, rtol=1e-3, atol=1e-3)


def test_packed_model(card):
    """The argument of the CPU; rows alone, whatever their number."""
    model = make_sparse(mlp(K, N, dtype="mixed_bfloat16"))
    kernel = numpy(model.layers[0].kernel)
    bias = numpy(model.layers[0].bias)
    kwm.pack(model, dtype="int8", activations="int8")
    packed = pack_kernel(kernel, "int8", "int8")
    x = normal(32, K, seed=1)
    rounded = numpy(ops.cast(x, "bfloat16")).astype("float32")
    expected = product_of_rounded_rows(rounded, packed) + bias
    with pytest.warns(UserWarning, match="rows of int8 .* have not been run"):
        y = model(x)
    assert error(y, expected) <= TOLERANCE
    assert error(model(x[:3]), expected[:3]) <= TOLERANCE
    if BACKEND == "jax":
        names = [v.name for v in model.layers[0].variables]
        assert "kernel_companion_cusparselt" in names
        assert error(model.predict(x, verbose=0), expected) <= TOLERANCE


def test_layer_where_the_library_is_wrong(card):
    model = make_sparse(mlp(K, N, dtype="mixed_bfloat16"))
    x = normal(32, K, seed=1)
    expected = numpy(model(x)).astype("float64")
    card.fake_break(1)
    with pytest.warns(UserWarning, match="tried on this .* rows of int8"):
        kwm.pack(model, dtype="int8", activations="int8")
    # As on any card without such products: in blocks, as on a CPU.
    assert type(model.layers[0]._reparameterizations["kernel"]).__name__ == (
        "UnpackedKernel"
    )
    assert error(model(x), expected) <= 2e-2


@pytest.mark.skipif(BACKEND != "jax", reason="torch rounds without it")
def test_without_the_kernel_that_rounds(card, monkeypatch):
    def reason_unavailable(what):
        return "NVRTC was not found." if what == "rounding" else ""

    monkeypatch.setattr(products, "reason_unavailable", reason_unavailable)
    kind = (K, N), "bfloat16", "int8"
    with pytest.warns(UserWarning, match="NVRTC was not found"):
        plan = products.plan(*kind, activations="int8")
    assert not plan.is_sparse
    assert products.plan(*kind).is_sparse
    with pytest.raises(RuntimeError, match="NVRTC was not found"):
        products.matmul(
            ops.cast(normal(1, K), "bfloat16"), make(), "cusparselt"
        )


def test_decode_where_it_was_measured(card, monkeypatch):
    """At few rows the steps themselves are multiplied, exact in bfloat16."""
    plan = Plan(
        (
            Measured(8, {"dense": 2.0, "decode": 1.0}),
            Measured(64, {"dense": 2.0, "cusparselt": 1.0}),
        )
    )
    monkeypatch.setattr(products, "plan", lambda *_: plan)
    monkeypatch.setattr(products, "_plan_on", lambda *_: plan, raising=False)
    packed = make()
    x = normal(20, K, seed=1)
    expected = product_of_rounded_rows(x, packed)
    for rows in (3, 20):
        given = ops.convert_to_tensor(x[:rows])
        if BACKEND == "jax":
            prepared = products.prepare(packed, "float32")
            assert list(prepared.companions) == ["cusparselt"]
            y = products.matmul(given, prepared)
        else:
            y = multiply(given, packed, None)
        assert error(y, expected[:rows]) <= TOLERANCE
