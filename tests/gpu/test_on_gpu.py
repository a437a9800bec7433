"""The GPU products on a GPU; skipped without one. `make gpu` runs them."""

import dataclasses
import functools
import os

import keras
import numpy as np
import pytest
from keras import ops

import keras_weightmods as kwm
from keras_weightmods.native.gpu import dispatch, first_contact
from keras_weightmods.ops import pack_kernel, packed_arrays, unpack_kernel
from tests.gpu.kernels import error, product_of_rounded_rows, sparse_kernel
from tests.models import make_sparse, mlp, normal, numpy

BACKEND = keras.backend.backend()
if BACKEND == "jax":
    import jax

    from keras_weightmods.backend.jax import sparse_matmul_gpu as products
elif BACKEND == "torch":
    import torch

    from keras_weightmods.backend.torch import sparse_matmul_gpu as products
else:
    pytest.skip("JAX and torch alone", allow_module_level=True)

if products.device_name() is None:
    pytest.skip(f"{BACKEND} finds no NVIDIA GPU", allow_module_level=True)

# bfloat16 first; `make gpu` runs float16 last, in a process of its own.
TOLERANCE = {"bfloat16": 1e-2, "float32": 1e-5, "float16": 2e-3}
ASKED = os.environ.get("KERAS_WEIGHTMODS_GPU_TYPES")
ASKED = ASKED.split(",") if ASKED else [*TOLERANCE, "int8"]
X_DTYPES = [x_dtype for x_dtype in TOLERANCE if x_dtype in ASKED]
HALVES = [x_dtype for x_dtype in X_DTYPES if x_dtype != "float32"]
VALUE_DTYPES = ("float32", "bfloat16", "int8", "int4")


@pytest.fixture(autouse=True)
def types_that_are_asked_for(request):
    names = {"x_dtype", "kind"} & {*request.fixturenames}
    if ASKED == ["float16"] and not names:
        pytest.skip("float16 alone is asked for")


def make(k, n, value_dtype):
    packed = pack_kernel(sparse_kernel(k, n), value_dtype)
    on_gpu = {
        name: ops.convert_to_tensor(getattr(packed, name))
        for name in packed_arrays(packed.shape, value_dtype)
    }
    return dataclasses.replace(packed, **on_gpu), unpack_kernel(packed)


def multiply(x, packed, method):
    if BACKEND == "torch":
        arrays = packed.values, packed.meta, packed.scale
        return products.sparse_matmul(x, *arrays, packed.shape[1], method)
    if method == "cusparselt":
        packed = products.prepare(packed, x.dtype.name, ["cusparselt"])
    return products.matmul(x, packed, method)


def check(method, rows, k, n, x_dtype, value_dtype):
    packed, kernel = make(k, n, value_dtype)
    x = normal(rows, k, seed=1)
    x = ops.cast(ops.convert_to_tensor(x), x_dtype)
    y = multiply(x, packed, method)
    assert tuple(y.shape) == (rows, n)
    assert keras.backend.standardize_dtype(y.dtype) == x_dtype
    x = numpy(x).astype("float64")
    assert error(y, x @ kernel) <= TOLERANCE[x_dtype]


@pytest.mark.parametrize("rows", [1, 5, 8, 16])
@pytest.mark.parametrize("value_dtype", VALUE_DTYPES)
@pytest.mark.parametrize("x_dtype", X_DTYPES)
def test_decode(x_dtype, value_dtype, rows):
    if rows > products.gpu.decode_rows(x_dtype):
        pytest.skip("more rows than the kernel takes")
    for k, n in ((4096, 1024), (2050, 1000), (33, 5)):
        check("decode", rows, k, n, x_dtype, value_dtype)


@pytest.mark.parametrize("rows", [1, 17, 64, 512])
@pytest.mark.parametrize("value_dtype", VALUE_DTYPES)
@pytest.mark.parametrize("x_dtype", HALVES)
def test_cusparselt(x_dtype, value_dtype, rows):
    for k, n in ((1024, 2048), (2048, 512)):
        check("cusparselt", rows, k, n, x_dtype, value_dtype)


@pytest.mark.parametrize("kind", [x for x in ASKED if x != "float32"])
def test_trial_of_a_new_card(kind):
    trial = first_contact.Trial.of(64, (512, 256))
    kind = kind if BACKEND == "jax" or kind == "int8" else getattr(torch, kind)
    index = () if BACKEND == "jax" else (0,)
    y, expected = products._try_cusparselt(*index, kind, trial)
    assert first_contact._difference(y, expected) == ""


@pytest.mark.skipif("int8" not in ASKED, reason="int8 is not asked for")
@pytest.mark.parametrize("rows", [1, 16, 33, 512])
@pytest.mark.parametrize("method", ["cusparselt", "decode", "dense"])
def test_int8_activations(method, rows):
    if method == "decode" and rows > products.gpu.decode_rows("bfloat16"):
        pytest.skip("more rows than the kernel takes")
    # Entries of one scale would hide a scale on the wrong axis.
    kernel = sparse_kernel(1024, 512) * np.geomspace(0.1, 10, 512)
    packed = pack_kernel(kernel.astype("float32"), "int8", "int8")
    x = normal(rows, 1024, seed=1) * np.geomspace(1, 50, rows)[:, None]
    for x_dtype in ("bfloat16", "float32"):
        given = ops.cast(ops.convert_to_tensor(x), x_dtype)
        if BACKEND == "torch":
            arrays = packed.values, packed.meta, packed.scale
            arrays = [ops.convert_to_tensor(array) for array in arrays]
            y = products.sparse_matmul_int8(given, *arrays, 512, method)
        else:
            kinds = [method] if method != "decode" else []
            prepared = products.prepare(packed, x_dtype, kinds)
            y = products.matmul(given, prepared, method)
        expected = product_of_rounded_rows(given, packed)
        for row, wanted in zip(numpy(y), expected):
            assert error(row, wanted) <= TOLERANCE["bfloat16"]


def test_decode_of_poisoned_memory():
    """Every result is written; nothing beyond the arrays counts."""
    packed, kernel = make(70, 21, "float32")
    x = normal(3, 70, seed=1)
    for _ in range(5):
        poison = ops.full((64, 1024), float("nan"))
        del poison
        y = multiply(ops.convert_to_tensor(x), packed, "decode")
        assert error(y, x @ kernel.astype("float64")) <= 1e-5


def test_decode_is_repeatable():
    packed, _ = make(4096, 1024, "bfloat16")
    x = normal(4, 4096, seed=1)
    x = ops.cast(ops.convert_to_tensor(x), "bfloat16")
    results = [numpy(multiply(x, packed, "decode")) for _ in range(20)]
    assert all(np.array_equal(y, results[0]) for y in results)


@pytest.mark.parametrize("method", ["decode", "cusparselt", "dense"])
def test_second_gpu(method):
    packed, kernel = make(512, 256, "bfloat16")
    x = normal(16, 512, seed=1)
    names = packed_arrays(packed.shape, "bfloat16")
    if BACKEND == "torch":
        if torch.cuda.device_count() < 2:
            pytest.skip("needs two GPUs")
        move = functools.partial(torch.Tensor.to, device="cuda:1")
    else:
        devices = jax.local_devices(backend="cuda")
        if len(devices) < 2:
            pytest.skip("needs two GPUs")
        move = functools.partial(jax.device_put, device=devices[1])
    moved = {name: move(getattr(packed, name)) for name in names}
    x = move(ops.cast(ops.convert_to_tensor(x), "bfloat16"))
    y = multiply(x, dataclasses.replace(packed, **moved), method)
    where = y.device if BACKEND == "torch" else y.devices()
    assert where == (x.device if BACKEND == "torch" else x.devices())
    with keras.device("gpu:1"):
        x, y = numpy(x), numpy(y)
    assert error(y, x.astype("float64") @ kernel) <= 1e-2


@pytest.mark.parametrize("value_dtype", VALUE_DTYPES)
def test_public_product_and_its_gradient(value_dtype):
    packed, kernel = make(256, 96, value_dtype)
    x = normal(2, 3, 256, seed=1)
    dy = normal(2, 3, 96, seed=2)
    expected = dy @ kernel.T.astype("float64")
    if BACKEND == "jax":
        y, pull = jax.vjp(lambda x: kwm.ops.sparse_matmul(x, packed), x)
        (dx,) = pull(dy)
    else:
        tensor = ops.convert_to_tensor(x).requires_grad_()
        y = kwm.ops.sparse_matmul(tensor, packed)
        (dx,) = torch.autograd.grad(y, tensor, ops.convert_to_tensor(dy))
        y = y.detach()
    assert error(y, x @ kernel.astype("float64")) <= 1e-3
    assert error(dx, expected) <= 1e-3


def test_compiled_with_both_products():
    packed, kernel = make(512, 512, "bfloat16")
    x = normal(4, 512, seed=1)
    x = ops.cast(ops.convert_to_tensor(x), "bfloat16")

    if BACKEND == "jax":
        prepared = products.prepare(packed, "bfloat16", ["cusparselt"])

        # A loop, which XLA records as a CUDA graph where it can.
        @jax.jit
        def run(x):
            def step(_, x):
                x = products.matmul(x, prepared, "decode")
                return products.matmul(x, prepared, "cusparselt") / 256

            return jax.lax.fori_loop(0, 3, step, x)
    else:

        def run(x):
            for _ in range(3):
                x = multiply(x, packed, "decode")
                x = multiply(x, packed, "cusparselt") / 256
            return x

    expected = numpy(x).astype("float64")
    for _ in range(3):
        expected = expected @ kernel @ kernel / 256
    assert error(run(x), expected) <= 5e-2


@pytest.mark.skipif(BACKEND != "torch", reason="torch alone")
def test_decode_in_a_cuda_graph():
    packed, kernel = make(512, 512, "bfloat16")
    x = torch.randn(4, 512, device="cuda", dtype=torch.bfloat16)
    multiply(x, packed, "decode")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = multiply(x, packed, "decode")
    x.normal_()
    graph.replay()
    expected = x.double().cpu().numpy() @ kernel
    assert error(y, expected) <= 1e-2


@pytest.mark.parametrize("method", ["decode", "cusparselt"])
def test_packed_model(monkeypatch, method, tmp_path):
    times = {"dense": 3.0, "decode": 2.0, "cusparselt": 2.0, method: 1.0}
    plan = dispatch.Plan((dispatch.Measured(8, times),))
    for name in ("plan", "_plan_on"):
        monkeypatch.setattr(products, name, lambda *_: plan, raising=False)
    monkeypatch.setattr(products, "_chosen", {}, raising=False)
    model = make_sparse(mlp(256, 128, 64, dtype="mixed_bfloat16"))
    x = normal(8, 256, seed=1)
    expected = model.predict(x, verbose=0).astype("float64")
    kwm.pack(model)
    assert error(model.predict(x, verbose=0), expected) <= 2e-2
    path = tmp_path / "packed.kwm"
    kwm.save_model(model, path)
    loaded = kwm.load_model(path)
    assert error(loaded.predict(x, verbose=0), expected) <= 2e-2


def test_wrong_arguments_name_the_reason():
    packed, _ = make(64, 32, "float32")
    x = ops.ones((9, 64), "float32")
    with pytest.raises(Exception, match="takes 1 to 8 rows"):
        ops.convert_to_numpy(multiply(x, packed, "decode"))
