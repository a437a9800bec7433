"""A card that is none: its name, its figures, and fakes on a CPU."""

import functools
import json
import sys
import types

import keras
import pytest

from keras_weightmods.native import gpu
from keras_weightmods.native.gpu import dispatch

CARD = "NVIDIA H100 PCIe"


@pytest.fixture
def card(monkeypatch, tmp_path, faked_anywhere):
    """An H100 by its name, with figures of small kernels too."""
    makers = {"jax": jax_card, "torch": torch_card}
    make = makers.get(keras.backend.backend())
    if make is None:
        pytest.skip("products on a GPU are for JAX and torch")
    published = json.loads(dispatch.PUBLISHED.read_text())
    published["least_size"] = 32
    for found in published["cards"]:
        found["least_gains"] = {
            kind: [[16, 1.5]] for kind in found["least_gains"]
        }
    path = tmp_path / "published.json"
    path.write_text(json.dumps(published))
    monkeypatch.setattr(dispatch, "PUBLISHED", path)
    dispatch.plan.cache_clear()
    library, fake = faked_anywhere
    monkeypatch.setattr(gpu, "library", lambda: library)
    forget = make(monkeypatch, library, fake, tmp_path)
    yield fake
    fake.fake_break(0)
    forget()
    dispatch.plan.cache_clear()


def jax_card(monkeypatch, library, fake, tmp_path):
    import jax

    from keras_weightmods.backend.jax import sparse_matmul_gpu as products
    from tests.gpu.xla import build_harness, caller, ffi_call_on_fake

    call = caller(build_harness(tmp_path), library, fake)
    fake_ffi = ffi_call_on_fake(call, products._TARGETS)
    monkeypatch.setattr(jax.ffi, "ffi_call", fake_ffi)
    monkeypatch.setattr(products, "device_name", lambda: CARD)
    cpu = jax.local_devices(backend="cpu")
    monkeypatch.setattr(products, "_devices", lambda: cpu)
    monkeypatch.setattr(products, "reason_unavailable", lambda _: "")
    monkeypatch.setattr(products, "_register", lambda: None)
    # The product of the layers: a CPU stands for the GPU.
    module = sys.modules["keras_weightmods.ops.sparse_matmul"]
    implementations = {"jax": lambda x, packed: products.matmul(x, packed)}
    monkeypatch.setattr(module, "_implementations", implementations)
    products._plan.cache_clear()
    return products._plan.cache_clear


class TorchsCusparselt:
    """torch's two functions, as their documentation has it, on a CPU."""

    broken = 0

    def __init__(self, float32):
        self.float32 = float32

    def fake_break(self, how):
        self.broken = how

    def compress(self, transposed):
        assert transposed.is_contiguous()
        return transposed

    def multiply(
        self, compressed, x, alpha=None, out_dtype=None, transpose_result=False,
        alg_id=0,
    ):  # fmt: skip
        assert transpose_result
        assert x.shape[1] % 16 == 0
        if self.broken == 2:
            raise RuntimeError("an error of fake cuSPARSELt")
        y = (compressed.float() @ x.float()).T.contiguous()
        y[:, 3] += 1000 * (self.broken == 1)
        if alpha is None:
            assert out_dtype is None
            return y.to(x.dtype)
        # A scale for each row of what is compressed.
        assert alpha.shape == (len(compressed),)
        assert alpha.dtype == self.float32
        return (y * alpha).to(out_dtype)


def torch_card(monkeypatch, library, fake, tmp_path):
    import torch

    from keras_weightmods.backend.torch import sparse_matmul_gpu as products

    stand_in = TorchsCusparselt(torch.float32)
    monkeypatch.setattr(fake, "fake_break", stand_in.fake_break)
    monkeypatch.setattr(torch, "_cslt_compress", stand_in.compress)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", stand_in.multiply)
    for name, value in {
        "device_name": lambda: CARD,
        "reason_unavailable": lambda _: "",
        "_name_of": lambda index: CARD,
        "_index_of": lambda x: 0,
        "_device": lambda index: torch.device("cpu"),
        "_plans": {},
        "_chosen": {},
    }.items():
        monkeypatch.setattr(products, name, value)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    # The operator of the layers: a CPU stands for the GPU.
    names = "sparse_matmul", "sparse_matmul_int8"
    operator = types.SimpleNamespace(
        **{name: getattr(products, name) for name in names}
    )
    # Its own two kernels run on the fake, as if its memory was the GPU's.
    on_gpu = types.SimpleNamespace(
        **{
            name: functools.partial(on_first_device, getattr(library, name))
            for name in ("kwm_gpu_decode", "kwm_gpu_round_rows")
        }
    )
    monkeypatch.setattr(gpu, "library", lambda: on_gpu)
    stream = types.SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    module = sys.modules["keras_weightmods.ops.sparse_matmul"]

    def multiply(x, packed):
        """The operator without the conversions for a CPU's kernels."""
        arrays = (packed.values, packed.meta, packed.scale)
        arrays = [None if a is None else a.value for a in arrays]
        rounded = packed.activations == "int8"
        return getattr(operator, names[rounded])(x, *arrays, packed.shape[1])

    monkeypatch.setattr(module, "_implementations", {"torch": multiply})
    return lambda: None


def on_first_device(function, device, *arguments):
    assert device == -1  # of a tensor on a CPU
    return function(0, *arguments)
