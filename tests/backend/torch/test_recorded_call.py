import keras
import numpy as np
import pytest

from keras_weightmods import native
from keras_weightmods.native.packed import pack_dense, pack_kernel
from keras_weightmods.ops import nm_project, sparse_matmul

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "torch" or not native.is_available(),
    reason="needs the torch backend and the compiled kernels",
)


def test_what_is_written_into_shares_no_call():
    import torch

    from keras_weightmods.backend.torch import recorded_call

    rng = np.random.default_rng(0)

    def weights(n):
        return rng.normal(size=(64, n)).astype("float32")

    sparse = [
        pack_kernel(
            np.asarray(nm_project(weights(n), "2:4", 0)), "int8", "int8"
        )
        for n in (64, 16, 40)
    ]
    kernels = [*sparse, pack_dense(weights(8), "int8")]

    def function(weights, x):
        products = [sparse_matmul(x, packed) for packed in kernels]
        # After it has been written into, it is another input.
        x.add_(1.0)
        return [*products, sparse_matmul(x, sparse[0])]

    x = torch.randn(3, 64)
    recorded, _ = recorded_call.record(function, [x.clone()], [])
    calls = [n for n in recorded.graph.graph.nodes if n.meta.get("rounds")]
    assert len(calls) == 5
    expected = function(None, x.clone())
    for y, z in zip(recorded(x.clone()), expected, strict=True):
        torch.testing.assert_close(y, z, rtol=0, atol=0)


def test_products_of_one_input_and_type_share_a_call():
    import torch

    from keras_weightmods.backend.torch import recorded_call

    rng = np.random.default_rng(0)
    kernels = [
        pack_dense(rng.normal(size=(64, n)).astype("float32"), dtype)
        for n, dtype in ((16, "int8"), (24, "int8"), (16, "int4"), (8, "int4"))
    ]

    def function(weights, x):
        return [sparse_matmul(x, packed) for packed in kernels]

    x = torch.randn(2, 3, 64)
    recorded, _ = recorded_call.record(function, [x], [])
    calls = [n for n in recorded.graph.graph.nodes if n.meta.get("rounds")]
    assert len(calls) == 2  # one a type
    y = torch.randn(2, 3, 64)
    for received, expected in zip(recorded(y), function(None, y), strict=True):
        torch.testing.assert_close(received, expected, rtol=0, atol=0)
