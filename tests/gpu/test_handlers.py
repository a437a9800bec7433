"""The XLA handlers, called as XLA calls them, over the fake CUDA."""

import ctypes
import pathlib
import shutil
import subprocess

import numpy as np
import pytest

from keras_weightmods.native.packed import pack_kernel
from tests.gpu import test_products
from tests.gpu.kernels import error
from tests.gpu.test_products import TOLERANCE, compress, decode_reference, make

# Of XLA's FFI.
DTYPES = {
    "int8": 2,
    "int32": 4,
    "uint8": 6,
    "float16": 10,
    "float32": 11,
    "bfloat16": 16,
}


class Array(ctypes.Structure):
    _fields_ = [
        ("dtype", ctypes.c_int64),
        ("rank", ctypes.c_int64),
        ("dims", ctypes.c_int64 * 5),
        ("data", ctypes.c_void_p),
    ]

    @classmethod
    def of(cls, array):
        dims = (ctypes.c_int64 * 5)(*array.shape)
        dtype = DTYPES[array.dtype.name]
        return cls(dtype, array.ndim, dims, array.ctypes.data)


@pytest.fixture(scope="module")
def xla(faked, tmp_path_factory):
    library, fake = faked
    if not hasattr(library, "kwm_gpu_xla_decode"):
        pytest.skip("the library was built without the XLA handlers")
    jaxlib = pytest.importorskip("jaxlib", reason="needs its headers")
    include = pathlib.Path(jaxlib.__file__).with_name("include")
    built = tmp_path_factory.mktemp("fake_xla") / "fake_xla.so"
    source = pathlib.Path(__file__).with_name("fake_xla.cc")
    subprocess.run(
        [shutil.which("g++"), "-std=c++17", "-O1", "-shared", "-fPIC"]
        + ["-isystem", include, source, "-o", built],
        check=True,
    )
    harness = ctypes.CDLL(str(built))
    harness.fake_xla_call.restype = ctypes.c_char_p
    harness.fake_xla_allocated.restype = ctypes.c_int64
    harness.fake_xla_traits.restype = ctypes.c_int64

    def call(name, inputs, results, algorithm=None, initialize=False):
        handler = getattr(library, f"kwm_gpu_xla_{name}")
        arrays = [Array.of(a) for a in (*inputs, *results)]
        number = None if algorithm is None else ctypes.c_int64(algorithm)
        failure = harness.fake_xla_call(
            ctypes.cast(handler, ctypes.c_void_p),
            initialize,
            (Array * len(arrays))(*arrays),
            len(arrays),
            len(inputs),
            None if number is None else ctypes.byref(number),
        )
        assert harness.fake_xla_allocated() == 0
        assert fake.fake_context_depth() == 0
        return failure and failure.decode()

    return harness, library, call


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
