"""The GPU products under torch, on CPU tensors where these can do them."""

import gc
import itertools

import keras
import numpy as np
import pytest

import keras_weightmods as kwm
from keras_weightmods.native.gpu import trial
from keras_weightmods.native.packed import (
    Packed,
    pack_dense,
    pack_kernel,
    unpack_kernel,
)
from tests.gpu.kernels import error, product_of_rounded_rows, sparse_kernel
from tests.models import make_sparse, mlp

if keras.backend.backend() != "torch":
    pytest.skip("torch alone", allow_module_level=True)

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from keras_weightmods.backend.torch import sparse_matmul as operators
from keras_weightmods.backend.torch import sparse_matmul_gpu as products

K, N = 64, 32
HALF = torch.bfloat16
VALUE_DTYPES = ("float32", "bfloat16", "int8", "int4")


def make(value_dtype="float32", k=70, n=21):
    packed = pack_kernel(sparse_kernel(k, n), value_dtype)
    tensors = [
        None if a is None else keras.ops.convert_to_tensor(a).cpu()
        for a in (packed.values, packed.meta, packed.scale)
    ]
    return unpack_kernel(packed).astype("float64"), tensors


@pytest.fixture
def kept():
    kept = products._companions._kept
    kept.clear()
    return kept


@pytest.mark.parametrize("value_dtype", VALUE_DTYPES)
@pytest.mark.parametrize("x_dtype", [torch.float32, HALF])
def test_dense_product(x_dtype, value_dtype):
    kernel, weights = make(value_dtype)
    x = torch.randn(2, 3, 70, dtype=x_dtype)
    y = products.sparse_matmul(x, *weights, 21)
    assert y.dtype == x_dtype
    expected = x.double().numpy() @ kernel
    assert error(y, expected) <= (1e-5 if x_dtype == torch.float32 else 1e-2)


def test_products_of_the_gradients():
    kernel, (values, meta, scale) = make()
    x, dy = torch.randn(2, 3, 70), torch.randn(2, 3, 21)
    dx = products.sparse_matmul_transposed(dy, values, meta, scale, 70)
    np.testing.assert_allclose(dx, dy.double().numpy() @ kernel.T, atol=1e-4)
    dvalues = products.sparse_values_gradient(x, dy, meta)
    assert dvalues.shape == values.shape
    # sum(dvalues * values) = sum(dy * (x @ W)), W being linear in the values.
    expected = (dy.double().numpy() * (x.double().numpy() @ kernel)).sum()
    assert abs(float((dvalues * values).sum()) - expected) <= 1e-3


def test_companion_is_made_once_and_anew_after_a_change(kept):
    _, weights = make()
    x = torch.randn(3, 70)
    first = products.sparse_matmul(x, *weights, 21)
    (entry,) = kept.values()
    products.sparse_matmul(x, *weights, 21)
    assert next(iter(kept.values())) is entry
    weights[0].mul_(2)
    second = products.sparse_matmul(x, *weights, 21)
    torch.testing.assert_close(second, 2 * first)
    assert len(kept) == 1


def test_companion_goes_with_the_packed_values(kept):
    for value_dtype in VALUE_DTYPES:
        _, weights = make(value_dtype)
        products.sparse_matmul(torch.randn(3, 70), *weights, 21)
        del weights
        gc.collect()
    assert len(kept) == 1


@pytest.mark.parametrize("value_dtype", ["int8", "int4", "dense int4"])
def test_dense_products_stay_on_their_device(value_dtype):
    """By int8 activations and by int4, on a GPU."""
    kernel = sparse_kernel(70, 21)
    if value_dtype == "dense int4":
        packed = pack_dense(kernel, "int4")
    else:
        packed = pack_kernel(kernel, value_dtype, "int8")
    arrays = {
        name: torch.empty(
            array.shape, dtype=getattr(torch, array.dtype.name), device="meta"
        )
        for name in ("values", "meta", "scale")
        if (array := getattr(packed, name)) is not None
    }
    moved = Packed(**{**vars(packed), **arrays})
    y = operators._dense(torch.empty(2, 3, 70, device="meta"), moved)
    assert (y.device.type, y.shape) == ("meta", (2, 3, 21))


class Operators(TorchDispatchMode):
    """Writes down the operators that are called, by the device of `x`."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append((function._schema.name, args[0].device.type))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("x_dtype", [HALF, torch.float32])
@pytest.mark.parametrize(
    ("dtype", "activations", "name"),
    [
        ("bfloat16", None, "sparse_matmul"),
        ("int8", "float32", "sparse_matmul"),
        ("int8", "int8", "sparse_matmul_int8"),
    ],
)
def test_layers_reach_the_operator_on_a_gpu(x_dtype, dtype, activations, name):
    """By tensors that are fake, on a GPU that is not there."""
    model = make_sparse(mlp(64, 32, use_bias=False))
    kwm.pack(model, dtype=dtype, activations=activations)
    (layer,) = model.layers
    item = layer._reparameterizations["kernel"]
    packed = item.packed
    with FakeTensorMode():
        arrays = {
            name: torch.empty(v.shape, dtype=v.value.dtype, device="cuda")
            for name in ("values", "meta", "scale")
            if (v := getattr(packed, name)) is not None
        }
        item.packed = Packed(**{**vars(packed), **arrays})
        x = torch.empty(2, 5, 64, device="cuda", dtype=x_dtype)
        with Operators() as operators:
            y = layer.call(x)
    assert (y.device.type, y.shape, y.dtype) == ("cuda", (2, 5, 32), x_dtype)
    # One operator, and nothing before or after it.
    assert operators.seen == [(f"keras_weightmods::{name}", "cuda")]


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "finds no NVIDIA GPU" in products.reason_unavailable()
    assert products.device_name() is None


class Cusparselt:
    """torch's two functions, as their documentation has it, on a CPU."""

    broken = ""

    def compress(self, transposed):
        assert transposed.is_contiguous()
        return transposed

    def multiply(
        self, compressed, x, alpha=None, out_dtype=None, transpose_result=False
    ):
        assert transpose_result
        assert x.shape[1] % 16 == 0
        if self.broken == "raises":
            raise RuntimeError("an error of fake cuSPARSELt")
        y = (compressed.float() @ x.float()).T.contiguous()
        y[:, 3] += 1000 * (self.broken == "wrong")
        if alpha is None:
            assert out_dtype is None
            return y.to(x.dtype)
        # A scale for each row of what is compressed.
        assert (alpha.shape, alpha.dtype) == ((len(compressed),), torch.float32)
        return (y * alpha).to(out_dtype)


@pytest.fixture
def cusparselt(monkeypatch, kept):
    """A GPU that is none, cuda:0: the CPU stands for it."""
    fake = Cusparselt()
    device = torch.device
    for owner, name, value in (
        (torch, "_cslt_compress", fake.compress),
        (torch, "_cslt_sparse_mm", fake.multiply),
        (products, "_device", lambda index: device("cpu")),
        (products, "_index_of", lambda matrix: 0),
        (products, "reason_unavailable", lambda: ""),
        (products, "_plans", {}),
        # Either product at some number of rows.
        (trial, "ROWS", (16, 32)),
        (trial, "seconds_by", lambda wait: seconds),
    ):
        monkeypatch.setattr(owner, name, value)
    return fake


def seconds(product, x):
    is_dense = product.multiply is torch.matmul
    return 1.5 if is_dense else {16: 2.0, 32: 1.0}[len(x)]


@pytest.mark.parametrize("x_dtype", [HALF, torch.float16])
def test_product_by_the_plan(cusparselt, kept, x_dtype):
    kernel, weights = make("bfloat16", K, N)
    for rows, method in ((5, "dense"), (40, "cusparselt")):
        kept.clear()
        x = torch.randn(rows, K, dtype=x_dtype)
        y = products.sparse_matmul(x, *weights, N)
        assert error(y, x.double().numpy() @ kernel) <= 1e-2
        assert [key[-1] for key in kept] == [method]
    assert len(products._plans) == 1


@pytest.mark.parametrize("x_dtype", [HALF, torch.float32, torch.float16])
def test_product_of_rounded_rows(cusparselt, x_dtype):
    kernel = sparse_kernel(K, N) * np.linspace(0.1, 3, N)
    packed = pack_kernel(kernel.astype("float32"), "int8", "int8")
    arrays = packed.values, packed.meta, packed.scale
    arrays = [torch.from_numpy(array) for array in arrays]
    x = torch.randn(40, K)
    x[1] *= 1000
    x = x.to(x_dtype)
    expected = product_of_rounded_rows(x.float(), packed)
    for rows, method in itertools.product((5, 40), (None, "dense")):
        y = products.sparse_matmul_int8(x[:rows], *arrays, N, method)
        assert y.dtype == x_dtype
        for row, wanted in zip(y.float(), expected):
            assert error(row, wanted) <= 6e-3
    x[0, 3], x[1, 5] = float("nan"), float("inf")
    for method in ("dense", "cusparselt"):
        y = products.sparse_matmul_int8(x, *arrays, N, method)
        assert y.isnan().all(1).tolist() == [True, True] + [False] * 38


@pytest.mark.parametrize("how", ["raises", "wrong"])
def test_a_product_that_fails_is_dense(cusparselt, kept, how):
    cusparselt.broken = how
    kernel, weights = make("int8", K, N)
    x = torch.randn(40, K, dtype=HALF)
    with pytest.warns(UserWarning, match="cuSPARSELt was tried on this GPU"):
        y = products.sparse_matmul(x, *weights, N)
    assert error(y, x.double().numpy() @ kernel) <= 1e-2
    # Rounded activations then are rounded in blocks, as on a CPU.
    with pytest.warns(UserWarning, match="cuSPARSELt was tried on this GPU"):
        y = products.sparse_matmul_int8(x, *weights, N)
    expected = products.sparse_matmul_int8(x, *weights, N, "blocks")
    assert torch.equal(y, expected)
    assert {key[-1] for key in kept} == {"dense"}


def test_nothing_is_tried_in_a_cuda_graph(cusparselt, monkeypatch):
    """A trial would wait for the GPU, which ends the capture."""
    kernel, weights = make("bfloat16", K, N)
    x = torch.randn(40, K, dtype=HALF)
    monkeypatch.setattr(products, "_is_capturing", lambda: True)
    with pytest.warns(UserWarning, match="once before the capture"):
        y = products.sparse_matmul(x, *weights, N)
    assert error(y, x.double().numpy() @ kernel) <= 1e-2
    assert not products._plans
