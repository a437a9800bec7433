"""The GPU products under torch, on CPU tensors where these can do them."""

import gc
import sys
import types

import keras
import numpy as np
import pytest

import keras_weightmods as kwm
from keras_weightmods.native import gpu
from keras_weightmods.native.gpu.dispatch import Measured, Plan
from keras_weightmods.native.packed import (
    Packed,
    pack_dense,
    pack_kernel,
    unpack_kernel,
)
from tests.gpu.kernels import error, sparse_kernel
from tests.gpu.test_products import account_of
from tests.models import make_sparse, mlp, normal

if keras.backend.backend() != "torch":
    pytest.skip("torch alone", allow_module_level=True)

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

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


@pytest.mark.parametrize("value_dtype", ["float32", "bfloat16", "int8", "int4"])
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
    for value_dtype in ("float32", "bfloat16", "int8", "int4"):
        _, weights = make(value_dtype)
        sparse_matmul_gpu.sparse_matmul(x, *weights, N)
        del weights
        gc.collect()
    assert len(kept) == 1


def test_companion_made_in_a_cuda_graph_is_not_kept(monkeypatch):
    """Its memory is the graph's, and empty until that is replayed."""
    kernel, weights = make()
    kept = sparse_matmul_gpu._companions._kept
    kept.clear()
    monkeypatch.setattr(sparse_matmul_gpu, "_is_capturing", lambda: True)
    x = torch.randn(3, K)
    with pytest.warns(UserWarning, match="once before the capture"):
        y = sparse_matmul_gpu.sparse_matmul(x, *weights, N)
    assert error(y, x.double().numpy() @ kernel) <= 1e-5
    assert not kept


@pytest.mark.parametrize("value_dtype", ["float32", "bfloat16", "int8", "int4"])
def test_unpacked_on_its_own_device(value_dtype):
    _, weights = make(value_dtype)
    kernel = sparse_matmul_gpu.unpack(*weights, K, N, torch.float32)
    expected = unpack_kernel(pack_kernel(sparse_kernel(K, N), value_dtype))
    np.testing.assert_array_equal(kernel, expected)
    # Any device that is not Keras' default one stands for cuda:1.
    moved = [None if a is None else a.to("meta") for a in weights]
    kernel = sparse_matmul_gpu.unpack(*moved, K, N, torch.float32)
    assert kernel.device.type == "meta"
    y = sparse_matmul_gpu.sparse_matmul(
        torch.empty(3, K, device="meta"), *moved, N
    )
    assert (y.device.type, y.shape) == ("meta", (3, N))


@pytest.mark.parametrize("value_dtype", ["int8", "int4", "dense int4"])
def test_dense_products_stay_on_their_device(value_dtype):
    """By int8 activations and by int4, on a GPU."""
    kernel = sparse_kernel(K, N)
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
    y = operators._dense(torch.empty(2, 3, K, device="meta"), moved)
    assert (y.device.type, y.shape) == ("meta", (2, 3, N))


@pytest.fixture
def on_fake_gpu(monkeypatch, faked):
    """CPU tensors on the fake GPU: `_decode` runs down to the kernel."""
    library, fake = faked

    def decode(device, *arguments):
        assert device == -1  # of a tensor on a CPU
        return library.kwm_gpu_decode(0, *arguments)

    stand_in = types.SimpleNamespace(kwm_gpu_decode=decode)
    monkeypatch.setattr(gpu, "library", lambda: stand_in)
    stream = types.SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(sparse_matmul_gpu, "reason_unavailable", lambda _: "")
    return fake


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
def test_decode_of_views(on_fake_gpu, x_dtype):
    """A view may begin anywhere; a misaligned load would end the context."""
    kernel, weights = make()
    room = torch.randn(2 * K + 1).to(x_dtype)
    for x in (room[1:], room[:-1], torch.randn(K, 2).to(x_dtype).T):
        x = x.reshape(2, K)
        y = sparse_matmul_gpu.sparse_matmul(x, *weights, N, "decode")
        expected = x.double().numpy() @ kernel
        assert error(y, expected) <= (
            1e-5 if x_dtype == torch.float32 else 1e-2
        )
    assert account_of(on_fake_gpu).bad_address == 0


def test_hot_call_checks_no_packed_kernel(on_fake_gpu, monkeypatch):
    kernel, weights = make()
    x = torch.randn(2, K)

    def made(self):
        raise AssertionError("a Packed is made and checked in each call")

    monkeypatch.setattr(Packed, "__post_init__", made)
    for method in ("decode", "dense", None):
        y = sparse_matmul_gpu.sparse_matmul(x, *weights, N, method)
        assert error(y, x.double().numpy() @ kernel) <= 1e-5


def python_functions_of(call):
    """Return the names of the Python functions that a call runs."""
    names = []

    def see(frame, event, argument):
        if event == "call":
            names.append(frame.f_code.co_name)

    sys.setprofile(see)
    try:
        call()
    finally:
        sys.setprofile(None)
    return names[1:]  # without `call` itself


@pytest.fixture
def planned(on_fake_gpu, monkeypatch):
    """The decode kernel for few rows, by a table of a card."""
    plan = Plan((Measured(8, {"dense": 2.0, "decode": 1.0}),))
    asked = []

    def measured(*about):
        asked.append(about)
        return plan

    monkeypatch.setattr(sparse_matmul_gpu, "_index_of", lambda x: 0)
    monkeypatch.setattr(sparse_matmul_gpu, "_name_of", lambda index: "card")
    monkeypatch.setattr(sparse_matmul_gpu.dispatch, "plan", measured)
    monkeypatch.setattr(sparse_matmul_gpu, "_plans", {})
    monkeypatch.setattr(sparse_matmul_gpu, "_chosen", {})
    return asked


def test_hot_call_is_look_ups_alone(planned):
    _, weights = make()
    x = torch.randn(2, K)

    def call():
        sparse_matmul_gpu.sparse_matmul(x, *weights, N)

    call()
    assert len(planned) == 1
    run = python_functions_of(call)
    # Of the device and the plan nothing is asked again.
    assert set(run) <= {
        "sparse_matmul",
        "_check_weights",
        "_choose",
        "_index_of",
        "<lambda>",  # what stands for the GPU here
        "_decode",
        "decode",
        "type_code",
        "check",
    }
    assert len(run) <= 12
    assert len(planned) == 1


def test_plan_is_not_tried_in_a_cuda_graph(planned, monkeypatch):
    """A trial would wait for the GPU, which ends the capture."""
    kernel, weights = make()
    x = torch.randn(2, K)
    monkeypatch.setattr(sparse_matmul_gpu, "_is_capturing", lambda: True)
    with pytest.warns(UserWarning, match="once before the capture"):
        y = sparse_matmul_gpu.sparse_matmul(x, *weights, N)
    assert error(y, x.double().numpy() @ kernel) <= 1e-5
    assert not planned
    assert not sparse_matmul_gpu._chosen
    # Called once before, the graph has the product that is chosen.
    monkeypatch.setattr(sparse_matmul_gpu, "_is_capturing", lambda: False)
    sparse_matmul_gpu.sparse_matmul(x, *weights, N)
    monkeypatch.setattr(sparse_matmul_gpu, "_is_capturing", lambda: True)
    run = python_functions_of(
        lambda: sparse_matmul_gpu.sparse_matmul(x, *weights, N)
    )
    assert "_decode" in run
    assert "_is_capturing" not in run


class Operators(TorchDispatchMode):
    """Writes down the operators that are called, by the device of `x`."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append((function._schema.name, args[0].device.type))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32])
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


@pytest.mark.parametrize("activations", ["float32", "int8"])
def test_compiled_layer_is_one_graph(activations):
    model = make_sparse(mlp(64, 32))
    kwm.pack(model, dtype="int8", activations=activations)
    (layer,) = model.layers
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        layer.call, backend=aot_autograd(fw_compiler=backend), fullgraph=True
    )
    x = keras.ops.convert_to_tensor(normal(3, 64))
    with torch.no_grad():
        y = compiled(x)
    torch.testing.assert_close(y, layer.call(x).detach())
    (graph,) = graphs
    called = [str(node.target) for node in graph.graph.nodes]
    suffix = "_int8" if activations == "int8" else ""
    assert called.count(f"keras_weightmods.sparse_matmul{suffix}.default") == 1


def test_wrong_sizes_are_refused():
    """The kernel would read beyond its arrays."""
    _, (values, meta, scale) = make()
    x = torch.randn(2, K)
    for weights in ((values[:1], meta, scale), (values, meta[:1], scale)):
        with pytest.raises(ValueError, match="of a packed kernel of shape"):
            sparse_matmul_gpu.sparse_matmul(x, *weights, N)
    with pytest.raises(ValueError, match="of a packed kernel of shape"):
        sparse_matmul_gpu.sparse_matmul(x, values, meta, scale, 3 * N)
    with pytest.raises(ValueError, match="of a packed kernel of shape"):
        sparse_matmul_gpu.sparse_matmul(x, values, meta, meta, N)


def test_facts_of_each_device_are_asked_for_once(monkeypatch):
    asked = []

    def get_device_name(index):
        asked.append(index)
        return f"card {index}"

    monkeypatch.setattr(torch.cuda, "get_device_name", get_device_name)
    sparse_matmul_gpu._name_of.cache_clear()
    monkeypatch.setattr(sparse_matmul_gpu, "_plans", {})
    for _ in range(3):
        for index in (0, 1):
            for n in (N, 2 * N):
                chosen = sparse_matmul_gpu._plan_on(
                    index, K, n, torch.bfloat16, torch.int8
                )
                assert f"card {index}" in chosen.why(1)
    assert asked == [0, 1]
    sparse_matmul_gpu._name_of.cache_clear()


def test_cusparselt_of_torch(monkeypatch):
    """Its two functions, as their documentation has it."""
    kernel = sparse_kernel(64, 32)
    packed = pack_kernel(kernel)
    weights = [torch.from_numpy(packed.values), torch.from_numpy(packed.meta)]
    algorithms = []

    def compress(transposed):
        assert transposed.is_contiguous()
        assert transposed.shape == (32, 64)
        return transposed

    def multiply(compressed, x, transpose_result, alg_id):
        assert transpose_result
        assert x.shape[1] % 16 == 0
        algorithms.append(alg_id)
        return (compressed @ x).T

    monkeypatch.setattr(torch, "_cslt_compress", compress)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", multiply)
    monkeypatch.setattr(sparse_matmul_gpu, "reason_unavailable", lambda _: "")
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    product = sparse_matmul_gpu.sparse_matmul
    for algorithm in (-1, 17):
        y = product(x, *weights, None, 32, "cusparselt", algorithm)
        assert error(y, x.double().numpy() @ kernel) <= 1e-2
    assert algorithms == [0, 17]


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
    _, weights = make()
    with pytest.raises(RuntimeError, match="finds no NVIDIA GPU"):
        sparse_matmul_gpu.sparse_matmul(torch.ones(1, K), *weights, N, "decode")
    assert sparse_matmul_gpu.device_name() is None


def test_torch_without_cusparselt_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    reason = sparse_matmul_gpu.reason_unavailable.__wrapped__
    available = torch.backends.cusparselt
    monkeypatch.setattr(available, "is_available", lambda: False)
    assert "built without cuSPARSELt" in reason("cusparselt")
    monkeypatch.setattr(available, "is_available", lambda: True)
    assert reason("cusparselt") == ""
