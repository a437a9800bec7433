"""The GPU products under torch, on CPU tensors where these can do them."""

import gc

import keras
import numpy as np
import pytest

from keras_weightmods.native.packed import pack_kernel, unpack_kernel
from tests.gpu.kernels import error, sparse_kernel

if keras.backend.backend() != "torch":
    pytest.skip("torch alone", allow_module_level=True)

import torch

from keras_weightmods.backend.torch import sparse_matmul as operators
from keras_weightmods.backend.torch import sparse_matmul_gpu

K, N = 70, 21


def make(value_dtype="float32"):
    packed = pack_kernel(sparse_kernel(K, N), value_dtype)
    tensors = [
        None if a is None else keras.ops.convert_to_tensor(a).cpu()
        for a in (packed.values, packed.meta, packed.scale)
    ]
    return unpack_kernel(packed).astype("float64"), tensors


@pytest.mark.parametrize("value_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_dense_product(x_dtype, value_dtype):
    kernel, weights = make(value_dtype)
    x = torch.randn(2, 3, K, dtype=x_dtype)
    y = sparse_matmul_gpu.sparse_matmul(x, *weights, N)
    assert y.dtype == x_dtype
    expected = x.double().numpy() @ kernel
    assert error(y, expected) <= (1e-5 if x_dtype == torch.float32 else 1e-2)


def test_products_of_the_gradients():
    kernel, (values, meta, scale) = make()
    x, dy = torch.randn(2, 3, K), torch.randn(2, 3, N)
    dx = sparse_matmul_gpu.sparse_matmul_transposed(dy, values, meta, scale, K)
    np.testing.assert_allclose(dx, dy.double().numpy() @ kernel.T, atol=1e-4)
    dvalues = sparse_matmul_gpu.sparse_values_gradient(x, dy, meta)
    assert dvalues.shape == values.shape
    # sum(dvalues * values) = sum(dy * (x @ W)), W being linear in the values.
    expected = (dy.double().numpy() * (x.double().numpy() @ kernel)).sum()
    assert abs(float((dvalues * values).sum()) - expected) <= 1e-3


def test_companion_is_made_once_and_anew_after_a_change():
    _, weights = make()
    kept = sparse_matmul_gpu._companions._kept
    kept.clear()
    x = torch.randn(3, K)
    first = sparse_matmul_gpu.sparse_matmul(x, *weights, N)
    (entry,) = kept.values()
    sparse_matmul_gpu.sparse_matmul(x, *weights, N)
    assert next(iter(kept.values())) is entry
    weights[0].mul_(2)
    second = sparse_matmul_gpu.sparse_matmul(x, *weights, N)
    torch.testing.assert_close(second, 2 * first)
    assert len(kept) == 1


def test_companion_goes_with_the_packed_values():
    kept = sparse_matmul_gpu._companions._kept
    kept.clear()
    x = torch.randn(3, K)
    for value_dtype in ("float32", "bfloat16", "int8"):
        _, weights = make(value_dtype)
        sparse_matmul_gpu.sparse_matmul(x, *weights, N)
        del weights
        gc.collect()
    assert len(kept) == 1


def test_operators_have_them_on_cuda():
    assert operators.reason_unavailable() == ""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    for name in ("matmul", "matmul_transposed", "values_gradient"):
        assert has_kernel(f"keras_weightmods::sparse_{name}", "CUDA")


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    reason = sparse_matmul_gpu.reason_unavailable("decode")
    assert "finds no NVIDIA GPU" in reason
    assert sparse_matmul_gpu.device_name() is None
