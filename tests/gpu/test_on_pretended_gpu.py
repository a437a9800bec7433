"""test_on_gpu.py itself, on tensors that only say they are on a GPU.

Its helpers must bring what they compare to the CPU, and ask each device for its
own products. torch alone: NumPy reads arrays of JAX wherever they are.
"""

import importlib
import sys
import types

import keras
import numpy as np
import pytest

from keras_weightmods.native import gpu
from keras_weightmods.native.packed import dense_matmul, pack_kernel
from tests.gpu.cards import CARD, TorchsCusparselt
from tests.gpu.kernels import sparse_kernel
from tests.models import normal, numpy

if keras.backend.backend() != "torch":
    pytest.skip("torch alone", allow_module_level=True)

import torch

from keras_weightmods.backend.torch import sparse_matmul_gpu as products
from tests.gpu.pretended import Pretended

if torch.cuda.is_available():
    pytest.skip("there is a GPU", allow_module_level=True)


@pytest.fixture
def devices(monkeypatch, faked):
    """Two GPUs that are none; the ordinals that the kernels ran on."""
    library, _ = faked
    used = []

    def decode(device, *arguments):
        used.append(device)
        return library.kwm_gpu_decode(device, *arguments)

    def round_rows(device, *arguments):
        used.append(device)
        return library.kwm_gpu_round_rows(device, *arguments)

    stand_in = types.SimpleNamespace(
        kwm_gpu_decode=decode,
        kwm_gpu_round_rows=round_rows,
        kwm_gpu_decode_rows=library.kwm_gpu_decode_rows,
    )
    cusparselt = TorchsCusparselt(torch.float32)
    stream = types.SimpleNamespace(cuda_stream=0)
    for owner, name, value in (
        (gpu, "library", lambda: stand_in),
        (products, "device_name", lambda: CARD),
        (products, "reason_unavailable", lambda method: ""),
        (torch, "_cslt_compress", cusparselt.compress),
        (torch, "_cslt_sparse_mm", cusparselt.multiply),
        (torch.cuda, "current_stream", lambda device: stream),
        (torch.cuda, "device_count", lambda: 2),
    ):
        monkeypatch.setattr(owner, name, value)
    with keras.device("gpu:0"), Pretended():
        yield used


@pytest.fixture
def on_gpu(devices, monkeypatch):
    """The module, which is skipped where there is no GPU."""
    name = "tests.gpu.test_on_gpu"
    # Put back at the end.
    monkeypatch.setitem(sys.modules, name, None)
    del sys.modules[name]
    return importlib.import_module(name)


def test_numpy_reads_no_tensor_on_a_gpu(devices):
    """Or all that is below would show nothing."""
    tensor = keras.ops.ones((2, 3))
    assert tensor.device == torch.device("cuda:0")
    for read in (np.asarray, np.linalg.norm):
        with pytest.raises(TypeError, match="can't convert cuda:0"):
            read(tensor)
    with pytest.raises(RuntimeError, match="tensors on GPUs"):
        tensor + tensor.to("cuda:1")
    np.testing.assert_array_equal((2 * tensor).cpu(), np.full((2, 3), 2))


@pytest.mark.parametrize("value_dtype", ["float32", "bfloat16", "int8", "int4"])
def test_products(on_gpu, value_dtype):
    for method, x_dtype in (
        ("decode", "float32"),
        ("decode", "bfloat16"),
        ("cusparselt", "bfloat16"),
        ("dense", "float32"),
    ):
        on_gpu.check(method, 5, 64, 48, x_dtype, value_dtype)


@pytest.mark.parametrize("method", ["cusparselt", "decode", "dense"])
def test_second_gpu(on_gpu, devices, method):
    on_gpu.test_second_gpu(method)
    assert devices == [1] * (method == "decode")


@pytest.mark.parametrize("method", ["cusparselt", "decode", "dense"])
def test_int8_activations(on_gpu, method):
    on_gpu.test_int8_activations(method, 4)


def test_rounded_blocks_stay_on_their_gpu(devices):
    packed = pack_kernel(sparse_kernel(64, 32), "int8", "int8")
    arrays = packed.values, packed.meta, packed.scale
    arrays = [torch.as_tensor(array, device="cuda:1") for array in arrays]
    x = normal(5, 64)
    given = torch.as_tensor(x, device="cuda:1")
    y = products.sparse_matmul_int8(given, *arrays, 32, "blocks")
    assert y.device == torch.device("cuda:1")
    with keras.device("cpu"):
        expected = numpy(dense_matmul(keras.ops.convert_to_tensor(x), packed))
    np.testing.assert_allclose(y.cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("asked", "floats"),
    [
        ("", ["bfloat16", "float32", "float16"]),
        ("bfloat16,int8,float32", ["bfloat16", "float32"]),
        ("float16", ["float16"]),
    ],
)
def test_types_that_are_asked_for(on_gpu, monkeypatch, asked, floats):
    monkeypatch.setenv("KERAS_WEIGHTMODS_GPU_TYPES", asked)
    module = importlib.reload(on_gpu)
    assert floats == module.X_DTYPES
    assert ("int8" in module.ASKED) == (asked != "float16")


def test_the_others(on_gpu):
    on_gpu.test_decode_of_poisoned_memory()
    on_gpu.test_trial_of_a_new_card("bfloat16")
    on_gpu.test_trial_of_a_new_card("int8")
    on_gpu.test_wrong_arguments_name_the_reason()
