"""The XLA handlers, called as XLA calls them, over the fake CUDA."""

import ctypes

import numpy as np
import pytest

from keras_weightmods.native.packed import pack_kernel
from tests.gpu import test_products
from tests.gpu.kernels import error
from tests.gpu.test_products import TOLERANCE, compress, decode_reference, make
from tests.gpu.xla import build_harness, caller


@pytest.fixture(scope="module")
def xla(faked, tmp_path_factory):
    library, fake = faked
    if not hasattr(library, "kwm_gpu_xla_decode"):
        pytest.skip("the library was built without the XLA handlers")
    harness = build_harness(tmp_path_factory.mktemp("fake_xla"))
    return harness, library, caller(harness, library, fake)


@pytest.fixture(params=[0, 1])
def device(xla, request):
    """The ordinal of the device that XLA calls the handlers on."""
    xla[0].fake_xla_set_device(request.param)
    yield request.param
    xla[0].fake_xla_set_device(0)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("value_dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("x_dtype", ["float32", "bfloat16", "float16"])
def test_decode(xla, x_dtype, value_dtype):
    _, _, call = xla
    x, kernel = make(3, 70, 21, x_dtype)
    packed = pack_kernel(kernel, value_dtype)
    empty = np.zeros((0,), "float32")
    scale = empty if packed.scale is None else packed.scale
    y = np.full((3, 21), np.nan, x.dtype)
    inputs = x, packed.values, packed.meta, scale
    assert call("decode_initialize", inputs, [y], initialize=True) is None
    assert call("decode", inputs, [y]) is None
    assert error(y, decode_reference(x, packed)) <= TOLERANCE[x_dtype]


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
def test_compress_and_multiply(xla, dtype):
    _, library, call = xla
    x, kernel = test_products.operands(dtype)
    _, expected = compress(library, kernel)
    compressed = np.zeros_like(expected)
    transposed = np.ascontiguousarray(kernel.T)
    assert call("compress", [transposed], [compressed]) is None
    np.testing.assert_array_equal(compressed, expected)

    y = np.zeros((16, 32), "int32" if dtype == "int8" else x.dtype)
    product = [x, compressed], [y], 2
    assert call("cusparselt_initialize", *product, initialize=True) is None
    assert call("cusparselt", *product) is None
    reference = x.astype("float64") @ kernel.astype("float64")
    assert error(y, reference) <= TOLERANCE[dtype]


def test_wrong_shapes(xla):
    _, library, call = xla
    x, kernel = make(16, 64, 32, "float16")
    packed = pack_kernel(kernel)
    empty = np.zeros((0,), "float32")
    y = np.zeros((16, 32), x.dtype)
    for bad_x, bad_y, meta in (
        (x[:, :32].copy(), y, packed.meta),
        (x, y[:5].copy(), packed.meta),
        (x, y.astype("float32"), packed.meta),
        (x, y, packed.meta[:1].copy()),
    ):
        failure = call("decode", [bad_x, packed.values, meta, empty], [bad_y])
        assert "do not fit the activations" in failure
    kernel, short = kernel.astype("float16"), np.zeros(10, "uint8")
    _, compressed = compress(library, kernel)
    failure = call("cusparselt", [x, short], [y], -1)
    assert "of another shape or device" in failure
    failure = call("cusparselt", [x, compressed], [y.astype("float32")], -1)
    assert "does not fit" in failure
    assert "of another size" in call("compress", [kernel.T.copy()], [short])
    product = [x, compressed], [y], 9
    failure = call("cusparselt_initialize", *product, initialize=True)
    assert "choice of the algorithm" in failure


def test_traits(xla):
    harness, library, _ = xla
    # 1: may be recorded into a command buffer, which scratch memory forbids.
    for name, traits in (("decode", 1), ("cusparselt", 0), ("compress", 0)):
        handler = getattr(library, f"kwm_gpu_xla_{name}")
        found = harness.fake_xla_traits(ctypes.cast(handler, ctypes.c_void_p))
        assert found == traits
