import keras
import numpy as np
import pytest

from keras_weightmods import native
from keras_weightmods.ops import compand

if keras.backend.backend() != "torch":
    pytest.skip("needs torch", allow_module_level=True)

import torch

if not native.has_vectors():
    pytest.skip(
        native.reason_unavailable() or "no vector unit", allow_module_level=True
    )


def tensors(shape=(40, 30)):
    generator = torch.Generator().manual_seed(0)
    v, upstream = torch.randn((2, *shape), generator=generator)
    a, b = torch.tensor([0.7, 1.3])
    return v, a, b, upstream


def gradients(function, v, a, b, upstream):
    inputs = [x.detach().requires_grad_() for x in (v, a, b)]
    function(*inputs).backward(upstream)
    return [x.grad for x in inputs]


def test_operators():
    v, a, b, upstream = tensors()
    w = compand(v, a, b)
    pair = float(a), float(b)
    ops = torch.ops.keras_weightmods
    for operator, arguments in [
        (ops.compand, (v, *pair)),
        (ops.compand_slope, (v, upstream, *pair)),
        (ops.compand_gradient, (v, w, upstream, *pair)),
    ]:
        torch.library.opcheck(operator.default, arguments)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads(threads):
    v, a, b, upstream = tensors((700, 701))
    expected = compand(v, a, b), *gradients(compand, v, a, b, upstream)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = compand(v, a, b), *gradients(compand, v, a, b, upstream)
    finally:
        torch.set_num_threads(before)
    for got, want in zip(found, expected):
        assert torch.equal(got, want)


def test_strided_tensors():
    v, a, b, upstream = tensors()
    expected = gradients(compand, v.T.contiguous(), a, b, upstream.T)
    for found in (
        gradients(compand, v.T, a, b, upstream.T),
        gradients(compand, v.T, a, b, upstream.T.contiguous()),
    ):
        for got, want in zip(found, expected):
            torch.testing.assert_close(got, want, rtol=0, atol=0)
    one = torch.ones(()).expand(v.shape)
    to_v, _, _ = gradients(compand, v, a, b, one)
    u = np.float64(v) / 1.3
    np.testing.assert_allclose(to_v, 0.7 / 1.3 / (1 + u**2), rtol=1e-6)


def test_compiled():
    v, a, b, upstream = tensors()
    compiled = torch.compile(compand, backend="eager")
    for got, want in zip(
        gradients(compiled, v, a, b, upstream),
        gradients(compand, v, a, b, upstream),
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_is_of_torch_alone():
    v, a, b, _ = tensors()
    traced = torch.jit.trace(lambda v: compand(v, 0.7, 1.3), v)
    assert "keras_weightmods::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(-v), compand(-v, a, b))
