"""The XLA handlers, called as XLA calls them, over the fake CUDA."""

import ctypes

import ml_dtypes
import numpy as np
import pytest

from keras_weightmods.native.packed import pack_kernel
from tests.gpu import test_products
from tests.gpu.kernels import error, rounded_rows
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
@pytest.mark.parametrize("value_dtype", ["float32", "bfloat16", "int8", "int4"])
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

    is_int8 = dtype == "int8"
    y = np.zeros((16, 32), ml_dtypes.bfloat16 if is_int8 else x.dtype)
    scale = np.linspace(1, 2, 32 if is_int8 else 0).astype("float32")
    product = [x, compressed, scale], [y], 2
    assert call("cusparselt_initialize", *product, initialize=True) is None
    assert call("cusparselt", *product) is None
    reference = x.astype("float64") @ kernel.astype("float64")
    if is_int8:
        reference *= scale
    assert error(y, reference) <= TOLERANCE[dtype]


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("x_dtype", ["float32", "bfloat16", "float16"])
def test_round_rows(xla, x_dtype):
    _, _, call = xla
    x, _ = make(5, 64, 16, x_dtype)
    steps = np.full((16, 64), 99, "int8")
    scale = np.full((5,), 99, "float32")
    product = [x], [steps, scale]
    assert call("round_rows_initialize", *product, initialize=True) is None
    assert call("round_rows", *product) is None
    expected = rounded_rows(x)
    np.testing.assert_array_equal(steps[:5], expected[0])
    np.testing.assert_array_equal(scale, expected[1])
    assert not steps[5:].any()
    for wrong in (
        [steps[:4].copy(), scale],
        [steps[:, :60].copy(), scale],
        [steps, scale[:4].copy()],
    ):
        assert "does not fit" in call("round_rows", [x], wrong)


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
    failure = call("cusparselt", [x, short, empty], [y], -1)
    assert "of another shape or device" in failure
    given = [x, compressed, empty]
    failure = call("cusparselt", given, [y.astype("float32")], -1)
    assert "does not fit" in failure
    given = [x.astype("int8"), compressed, empty]
    failure = call("cusparselt", given, [y.astype(ml_dtypes.bfloat16)], -1)
    assert "the scales do not fit" in failure
    assert "of another size" in call("compress", [kernel.T.copy()], [short])
    product = [x, compressed, empty], [y], 9
    failure = call("cusparselt_initialize", *product, initialize=True)
    assert "choice of the algorithm" in failure


def test_traits(xla):
    harness, library, _ = xla
    # 1: may be recorded into a command buffer, which scratch memory forbids.
    for name, traits in (
        ("decode", 1),
        ("round_rows", 1),
        ("cusparselt", 0),
        ("compress", 0),
    ):
        handler = getattr(library, f"kwm_gpu_xla_{name}")
        found = harness.fake_xla_traits(ctypes.cast(handler, ctypes.c_void_p))
        assert found == traits
