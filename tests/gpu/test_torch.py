"""The GPU products under torch, on CPU tensors where these can do them."""

import gc

import keras
import pytest

import keras_weightmods as kwm
from keras_weightmods.native.gpu import trial
from keras_weightmods.ops import Packed, pack_kernel, unpack_kernel
from tests.gpu.kernels import error, sparse_kernel
from tests.models import make_sparse, mlp

if keras.backend.backend() != "torch":
    pytest.skip("torch alone", allow_module_level=True)

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from keras_weightmods.backend.torch import sparse_matmul_gpu as products

K, N = 64, 32
HALF = torch.bfloat16
VALUE_DTYPES = ("float32", "bfloat16", "int8", "int4")


def make(value_dtype="float32", k=70, n=21):
    packed = pack_kernel(sparse_kernel(k, n), value_dtype)
    arrays = packed.values, packed.meta, packed.scale
    convert = keras.ops.convert_to_tensor
    tensors = [a if a is None else convert(a).cpu() for a in arrays]
    return unpack_kernel(packed).astype("float64"), tensors


@pytest.fixture
def kept():
    kept = products._companions
    kept.clear()
    return kept


@pytest.mark.parametrize("value_dtype", VALUE_DTYPES)
@pytest.mark.parametrize("x_dtype", [torch.float32, HALF])
def test_dense_product(x_dtype, value_dtype):
    kernel, weights = make(value_dtype)
    x = torch.randn(2, 3, 70, dtype=x_dtype)
    y = products.sparse_matmul(x, *weights, 21)
    assert y.dtype == x_dtype
    tolerance = 1e-5 if x_dtype == torch.float32 else 1e-2
    assert error(y, x.double().numpy() @ kernel) <= tolerance
    dx = products.sparse_matmul(y, *weights, 70, False, True)
    assert error(dx, y.double().numpy() @ kernel.T) <= tolerance


def test_companion_is_made_once_and_anew_after_a_change(kept):
    _, weights = make()
    x = torch.randn(3, 70)
    first = products.sparse_matmul(x, *weights, 21)
    (entry,) = kept[weights[0]].values()
    products.sparse_matmul(x, *weights, 21)
    assert next(iter(kept[weights[0]].values())) is entry
    weights[0].mul_(2)
    second = products.sparse_matmul(x, *weights, 21)
    torch.testing.assert_close(second, 2 * first)
    assert len(kept) == len(kept[weights[0]]) == 1
    # It goes with the packed values.
    del weights
    gc.collect()
    assert not kept


@pytest.mark.parametrize("value_dtype", VALUE_DTYPES)
def test_products_stay_on_their_own_device(value_dtype):
    """Any device that is not Keras' default one stands for cuda:1."""
    _, weights = make(value_dtype)
    moved = [None if a is None else a.to("meta") for a in weights]
    x = torch.empty(3, 70, device="meta")
    y = products.sparse_matmul(x, *moved, 21)
    assert (y.device.type, y.shape) == ("meta", (3, 21))


class Operators(TorchDispatchMode):
    """Writes down the operators that are called, by the device of `x`."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append((function._schema.name, args[0].device.type))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("x_dtype", [HALF, torch.float32])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_layers_reach_the_operator_on_a_gpu(x_dtype, dtype):
    """By tensors that are fake, on a GPU that is not there."""
    model = make_sparse(mlp(64, 32, use_bias=False))
    kwm.pack(model, dtype=dtype, activations="float32")
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
    assert operators.seen == [("keras_weightmods::sparse_matmul", "cuda")]


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "finds no NVIDIA GPU" in products.reason_unavailable()
    assert not products.has_gpu()


class Cusparselt:
    """torch's two functions, as their documentation has it, on a CPU."""

    broken = ""

    def compress(self, transposed):
        assert transposed.is_contiguous()
        return transposed

    def multiply(self, compressed, x, transpose_result=False):
        assert transpose_result
        assert x.shape[1] % 16 == 0
        if self.broken == "raises":
            raise RuntimeError("an error of fake cuSPARSELt")
        y = (compressed.float() @ x.float()).T.contiguous()
        y[:, 3] += 1000 * (self.broken == "wrong")
        return y.to(x.dtype)


@pytest.fixture
def cusparselt(monkeypatch, kept):
    """A GPU that is none, cuda:0: the CPU stands for it."""
    fake = Cusparselt()
    for owner, name, value in (
        (torch, "_cslt_compress", fake.compress),
        (torch, "_cslt_sparse_mm", fake.multiply),
        (products, "reason_unavailable", lambda: ""),
        (products, "_plans", {}),
        # Either product at some number of rows.
        (trial, "ROWS", (16, 32)),
        (trial, "seconds", seconds),
    ):
        monkeypatch.setattr(owner, name, value)
    return fake


def seconds(multiply, weights, x, wait):
    is_dense = multiply is torch.matmul
    return 1.5 if is_dense else {16: 2.0, 32: 1.0}[len(x)]


@pytest.mark.parametrize("x_dtype", [HALF, torch.float16])
def test_product_by_the_plan(cusparselt, kept, x_dtype):
    kernel, weights = make("bfloat16", K, N)
    for rows, method in ((5, "dense"), (40, "cusparselt")):
        kept.clear()
        x = torch.randn(rows, K, dtype=x_dtype)
        y = products.sparse_matmul(x, *weights, N)
        assert error(y, x.double().numpy() @ kernel) <= 1e-2
        assert [key[-1] for key in kept[weights[0]]] == [method]
    assert len(products._plans) == 1


@pytest.mark.parametrize("how", ["raises", "wrong"])
def test_a_product_that_fails_is_dense(cusparselt, kept, how):
    cusparselt.broken = how
    kernel, weights = make("int8", K, N)
    x = torch.randn(40, K, dtype=HALF)
    with pytest.warns(UserWarning, match="cuSPARSELt was tried on this GPU"):
        y = products.sparse_matmul(x, *weights, N)
    assert error(y, x.double().numpy() @ kernel) <= 1e-2
    assert [key[-1] for key in kept[weights[0]]] == ["dense"]


def test_nothing_is_tried_or_kept_in_a_cuda_graph(
    cusparselt, kept, monkeypatch
):
    """A trial would wait for the GPU, which ends the capture.

    What is made has the graph's memory, empty until that is replayed.
    """
    kernel, weights = make("bfloat16", K, N)
    x = torch.randn(40, K, dtype=HALF)
    monkeypatch.setattr(products, "_is_capturing", lambda: True)
    with pytest.warns(UserWarning, match="once before the capture"):
        y = products.sparse_matmul(x, *weights, N)
    assert error(y, x.double().numpy() @ kernel) <= 1e-2
    assert not products._plans
    assert not any(kept.values())
