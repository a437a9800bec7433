import keras
import pytest

from keras_weightmods import native
from keras_weightmods.native.packed import pack_dense, pack_kernel
from keras_weightmods.ops import sparse_matmul
from tests.models import normal
from tests.native.test_packed import kernel_of

if keras.backend.backend() != "torch" or not native.is_available():
    pytest.skip("torch and the compiled kernels", allow_module_level=True)

import torch

from keras_weightmods.backend.torch import recorded_call


def calls_in(recorded):
    nodes = recorded.graph.graph.nodes
    names = [getattr(node.target, "__name__", "") for node in nodes]
    return names.count("products")


def test_products_of_one_input_share_a_call():
    # Those of 2:4 kernels, which have one type, and all others.
    kernels = [
        *(pack_kernel(kernel_of(64, n), "int8", "int8") for n in (64, 16, 40)),
        *(pack_dense(normal(64, n), "int8") for n in (16, 8)),
        *(pack_dense(normal(64, 8), dtype) for dtype in ("int4", "int3")),
    ]

    def pure(_, x):
        return [sparse_matmul(x, packed) for packed in kernels]

    def writing(_, x):
        products = pure(_, x)
        x.add_(1.0)
        return [*products, sparse_matmul(x, kernels[0])]

    for function, calls in ((pure, 2), (writing, 8)):
        recorded, _ = recorded_call.record(function, [torch.randn(3, 64)], [])
        assert calls_in(recorded) == calls
        x = torch.randn(3, 64)
        expected = function(None, x.clone())
        for y, z in zip(recorded(x.clone()), expected, strict=True):
            torch.testing.assert_close(y, z, rtol=0, atol=0)


def test_a_result_that_an_input_has_become_is_that_input():
    def function(weights, x, cache):
        cache[:, 1].copy_(x @ weights[0])
        return cache[:, 1].sum(), torch.stack([cache[:, 0], cache[:, 1]], 1)

    weights = [torch.randn(4, 4)]
    inputs = [torch.randn(2, 4), torch.zeros(2, 2, 4)]
    recorded, _ = recorded_call.record(function, inputs, weights)
    weights[0].mul_(2)  # which is seen
    x, cache = torch.randn(2, 4), torch.randn(2, 2, 4)
    expected = function(weights, x, cache.clone())
    total, written = recorded(x, cache)
    assert written is cache
    torch.testing.assert_close(written, expected[1])
    torch.testing.assert_close(total, expected[0])


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda _, x: x * float(x.max()), "reads a number out of a tensor"),
        (lambda _, x: x[x > 0], "whose shape depends on the numbers"),
        (lambda weights, x: weights[0].add_(x), "from outside of the call"),
    ],
)
def test_what_cannot_be_repeated_is_refused(function, reason):
    weights = [torch.ones(3)]
    with pytest.raises(recorded_call.NotRecordable, match=reason):
        recorded_call.record(function, [torch.ones(3)], weights)
