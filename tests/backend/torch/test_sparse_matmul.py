import dataclasses
import shutil

import keras
import numpy as np
import pytest

from keras_weightmods.native.packed import pack_dense
from keras_weightmods.ops import pack_kernel, sparse_matmul, unpack_kernel
from keras_weightmods.ops.sparse_matmul import reason_for_dense
from tests import references
from tests.models import normal
from tests.native.test_packed import DTYPES, half_kernel, kernel_of
from tests.ops.test_sparse_matmul import assert_close

if keras.backend.backend() != "torch" or reason_for_dense():
    pytest.skip("torch and the compiled kernels", allow_module_level=True)

import torch

K, N = 36, 20


def tensors(dtype="float32", activations="float32"):
    return with_tensors(pack_kernel(kernel_of(K, N), dtype, activations))


def with_tensors(packed):
    arrays = {
        name: keras.ops.convert_to_tensor(array)
        for name in ("values", "meta", "scale")
        if (array := getattr(packed, name)) is not None
    }
    return dataclasses.replace(packed, **arrays)


def operator():
    # There once a product was made.
    sparse_matmul(normal(1, K), tensors())
    return torch.ops.keras_weightmods


@pytest.mark.parametrize("dtype", DTYPES)
def test_operators_pass_the_checks_of_torch(dtype):
    packed = tensors(dtype)
    x = torch.from_numpy(normal(3, 2, K)).requires_grad_()
    values = packed.values.requires_grad_(dtype == "float32")
    weights = values, packed.meta, packed.scale
    product, check = operator().sparse_matmul, torch.library.opcheck
    check(product, (x, *weights, N))
    if dtype == "bfloat16":
        half = x.detach().bfloat16().requires_grad_()
        check(product, (half, *weights, N))
    for dense_dtype in {"int8": ["int8"], "int4": ["int4", "int3"]}.get(
        dtype, ()
    ):
        dense = with_tensors(pack_dense(normal(K, N), dense_dtype))
        masked = pack_kernel(half_kernel(K, N), dtype, pattern="16:32")
        masked = with_tensors(masked)
        for w in (
            weights,
            (dense.values, None, dense.scale),
            (masked.values, masked.meta, masked.scale),
        ):
            check(product, (x, *w, N, True))
    with torch.no_grad():
        x, values = x.detach(), values.detach()
        dy = torch.ones((3, 2, N))
        check(product, (dy, values, *weights[1:], K, False, True))
        check(operator().sparse_values_gradient, (x, dy, packed.meta))


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_compiled_as_one_graph():
    kernels = [
        tensors(),
        tensors("int8", "int8"),
        *(with_tensors(pack_dense(normal(K, N), d)) for d in ("int4", "int3")),
    ]
    values = kernels[0].values.requires_grad_()

    def function(x):
        return sum(torch.relu(sparse_matmul(2 * x, k)) for k in kernels)

    operator()
    compiled = torch.compile(function, fullgraph=True)
    x = torch.from_numpy(normal(3, K)).requires_grad_()
    y = compiled(x)
    rounded = references.round_activations(2 * normal(3, K))
    expected = 0
    for f, k in zip((2.0 * normal(3, K), *[rounded] * 3), kernels):
        with torch.no_grad():
            w = unpack_kernel(k).astype("float64")
        expected += np.maximum(f @ w, 0)
    assert_close(y.detach(), expected)
    found, expected = (
        torch.autograd.grad(z.sum(), (x, values)) for z in (y, function(x))
    )
    for one, other in zip(found, expected):
        assert_close(one, other.numpy().astype("float64"))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(threads):
    kernel, before = kernel_of(256, 500), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for x in (normal(1, 256), normal(40, 256)):
            # It need not be contiguous.
            given = torch.from_numpy(np.asfortranarray(x))
            y = sparse_matmul(given, pack_kernel(kernel))
            assert_close(y, x.astype("float64") @ kernel)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("values", lambda t: t[:1]),
        ("values", lambda t: t.double()),
        ("values", lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)),
        ("meta", lambda t: t[:, :, :8]),
        ("meta", lambda t: t.long()),
    ],
)
def test_the_operator_reads_no_more_than_there_is(name, change):
    packed = tensors()
    weights = {"values": packed.values, "meta": packed.meta, "scale": None}
    weights[name] = change(weights[name])
    with pytest.raises(ValueError, match=f"`{name}`"):
        operator().sparse_matmul(torch.ones((2, K)), **weights, size=N)


def test_the_operator_refuses_other_types():
    x, multiply = torch.ones((2, K)), operator().sparse_matmul
    sparse = tensors("int8")
    dense = with_tensors(pack_dense(normal(K, N), "int4"))
    values, scale = dense.values, dense.scale
    for weights, match in (
        ((sparse.values, None, sparse.scale), "`values`"),
        ((values, sparse.meta, scale), "`values`"),
        ((values, None, scale.float()), "`scale`"),
        ((values, None, None), r"`scale` .*Received: scale=None"),
    ):
        with pytest.raises(ValueError, match=match):
            multiply(x, *weights, N, True)
    floats = tensors()
    weights = floats.values, floats.meta, None
    with pytest.raises(ValueError, match="`values` must be of int8 or uint8"):
        multiply(x, *weights, N, True)
    with pytest.raises(ValueError, match="must be float32"):
        multiply(x.double(), *weights, N)
    rounded = tensors("bfloat16")
    rounded.values.requires_grad_()
    with pytest.raises(ValueError, match="Only float32 values"):
        sparse_matmul(x, rounded).sum().backward()


def test_second_gradients_and_floats_by_a_dense_matrix():
    kernel = kernel_of(K, K)
    weights = with_tensors(pack_kernel(kernel))
    dense = with_tensors(pack_dense(normal(K, N), "int8"))
    rounded = torch.from_numpy(unpack_kernel(dense))
    x = torch.from_numpy(normal(3, K)).requires_grad_()
    given = dense.values, None, dense.scale, N
    for multiply, matrix in (
        (lambda x: sparse_matmul(x, weights), torch.from_numpy(kernel)),
        (lambda x: operator().sparse_matmul(x, *given), rounded),
    ):
        found = []
        for y in (multiply(x), x @ matrix):
            cubes = torch.sum(y**3)
            (first,) = torch.autograd.grad(cubes, x, create_graph=True)
            found += torch.autograd.grad(torch.sum(first**2), x)
        assert_close(found[0], found[1].numpy())
