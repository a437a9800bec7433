"""The GPU library over a fake CUDA, against slow references in float64.

The decode kernel's own source runs there on a CPU, lane by lane; cuSPARSELt is
a fake that multiplies as its documentation says.
"""

import ctypes

import ml_dtypes
import numpy as np
import pytest

from keras_weightmods import native
from keras_weightmods.native import gpu
from keras_weightmods.native.packed import pack_kernel, unpack_kernel
from tests.gpu.kernels import error, rounded_rows, sparse_kernel
from tests.models import normal

TOLERANCE = {
    "float32": 1e-6,
    "bfloat16": 4e-3,
    "float16": 5e-4,
    "int8": 4e-3,
}


def make(rows, k, n, x_dtype, seed=0):
    x_dtype = np.dtype(getattr(ml_dtypes, x_dtype, None) or x_dtype)
    kernel = sparse_kernel(k, n, seed, further_zeros=0.2)
    return normal(rows, k, seed=seed + 1).astype(x_dtype), kernel


def operands(dtype):
    """Two of cuSPARSELt's; those of int8 are rounded first."""
    x, kernel = make(16, 64, 32, "float32")
    if dtype == "int8":
        x, kernel = np.rint(20 * x), np.rint(20 * kernel)
    dtype = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    return x.astype(dtype), kernel.astype(dtype)


def address(array):
    return None if array is None else ctypes.c_void_p(array.ctypes.data)


def decode_reference(x, packed):
    """In float64, with the weights in the type that x is multiplied in."""
    kernel = unpack_kernel(packed).astype("float64")
    scale = np.ones(packed.shape[1])
    if packed.dtype == "int8":
        scale = packed.scale.ravel()[: packed.shape[1]].astype("float64")
        kernel = np.rint(kernel / scale)
    # int4 is multiplied before it is scaled, in each 64 rows.
    if packed.dtype != "int4":
        kernel = kernel.astype(x.dtype).astype("float64")
    return x.astype("float64") @ kernel * scale


def decode(library, x, packed, device=0):
    # Whatever is not written stays NaN.
    y = np.full((x.shape[0], packed.shape[1]), np.nan, x.dtype)
    failure = library.kwm_gpu_decode(
        device,
        None,
        gpu.X_TYPES[x.dtype.name],
        native.type_code(packed.dtype),
        address(x),
        x.shape[0],
        *packed.shape,
        *map(address, [packed.values, packed.meta, packed.scale, y]),
    )
    return failure, y


class Account(ctypes.Structure):
    """What the emulation found; see emulate.h."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "bad_meta",
            "bad_address",
            "tiles",
            "wavefronts",
            "weight_sectors",
            "x_sectors",
        )
    ]


def account_of(fake):
    fake.fake_account.restype = ctypes.POINTER(Account)
    return fake.fake_account().contents


# (k, n, device): in one tile; odd, on two devices; each warp with more tiles
# than its ring has stages, the last one of half the rows; split over a cluster.
SHAPES = [
    (32, 5, 0),
    (71, 130, 1),
    (8 * 5 * 64 + 24, 70, 1),
    (64 * 16 + 8, 64, 0),
]


@pytest.mark.parametrize("value_dtype", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("x_dtype", ["float32", "bfloat16", "float16"])
def test_decode_equals_reference(faked, x_dtype, value_dtype):
    """Each value and each x reaches its sum, whatever the order of copies."""
    library, fake = faked
    most = library.kwm_gpu_decode_rows(gpu.X_TYPES[x_dtype])
    seed = sum(map(ord, x_dtype + value_dtype))
    random = np.random.default_rng(seed)
    shapes = SHAPES + [(*random.integers(1, 300, 2).tolist(), 0)]
    fake.fake_reset()
    for (k, n, device), rows in zip(shapes, (1, 8, 3, 5, most)):
        x, kernel = make(rows, k, n, x_dtype, seed)
        packed = pack_kernel(kernel, value_dtype)
        results = []
        for eager in (0, 1):
            fake.fake_set_eager(eager)
            failure, y = decode(library, x, packed, device)
            assert failure is None
            results.append(y)
        np.testing.assert_array_equal(*results)
        found = error(y, decode_reference(x, packed))
        assert found <= TOLERANCE[x_dtype], (rows, k, n, found)
    account = account_of(fake)
    assert (account.bad_meta, account.bad_address) == (0, 0)
    assert fake.fake_context_depth() == 0


def test_decode_shares_out_the_rows(faked):
    """Narrow kernels are split over clusters of blocks, where there are any."""
    library, fake = faked
    x, kernel = make(1, 64 * 64, 16, "bfloat16")
    packed = pack_kernel(kernel, "bfloat16")
    shares = []
    for device in (0, 1):
        failure, y = decode(library, x, packed, device)
        assert failure is None
        assert error(y, decode_reference(x, packed)) <= TOLERANCE["bfloat16"]
        shares.append((fake.fake_split(), fake.fake_warps()))
    # The shared memory of an A100 has room for seven rings.
    assert shares == [(8, 4), (1, 7)]


@pytest.mark.parametrize("k", [64, 63])
def test_decode_of_activations_at_any_address(faked, k):
    library, fake = faked
    x, kernel = make(2, k, 16, "bfloat16")
    packed = pack_kernel(kernel)
    _, expected = decode(library, x, packed)
    room = np.zeros(x.size + 1, x.dtype)
    for start in (0, 1):
        moved = room[start : start + x.size].reshape(x.shape)
        moved[:] = x
        failure, y = decode(library, moved, packed)
        assert failure is None
        np.testing.assert_array_equal(y, expected)
    assert account_of(fake).bad_address == 0


def test_decode_takes_any_meta(faked):
    library, _ = faked
    x, kernel = make(2, 40, 16, "float32")
    packed = pack_kernel(kernel)
    packed.meta[:] = -1
    failure, y = decode(library, x, packed)
    assert failure is None
    assert np.isfinite(y).all()


def test_decode_says_what_it_takes(faked):
    library, fake = faked
    x, kernel = make(9, 32, 16, "float32")
    failure, _ = decode(library, x, pack_kernel(kernel))
    assert b"takes 1 to 8 rows of this type, not 9" in failure
    x, kernel = make(1, 32, 16, "bfloat16")
    failure, _ = decode(library, x, pack_kernel(kernel), device=2)
    assert b"cuDeviceGet: an error of the fake driver (101)" in failure
    packed = pack_kernel(kernel)
    shifted = np.empty(packed.meta.nbytes + 8, np.uint8)
    shifted = shifted[8 if shifted.ctypes.data % 16 == 0 else 0 :]
    object.__setattr__(packed, "meta", shifted)
    assert b"aligned to 16 bytes" in decode(library, x, packed)[0]
    assert fake.fake_context_depth() == 0


def compress(library, kernel):
    """Compresses a kernel of the type to multiply in."""
    k, n = kernel.shape
    dtype = gpu.X_TYPES[kernel.dtype.name]
    size, room = ctypes.c_int64(), ctypes.c_int64()
    failure = library.kwm_gpu_compressed_size(
        0, k, n, dtype, ctypes.byref(size), ctypes.byref(room)
    )
    if failure is not None:
        return failure, None
    transposed = np.ascontiguousarray(kernel.T)
    compressed = np.empty(size.value, np.uint8)
    workspace = np.empty(room.value, np.uint8)
    arrays = map(address, [compressed, workspace])
    failure = library.kwm_gpu_compress(
        0, None, address(transposed), k, n, dtype, *arrays
    )
    return failure, compressed


def cusparselt(library, x, compressed, n, algorithm=-1, scale=None):
    is_int8 = x.dtype == np.int8
    y_dtype = ml_dtypes.bfloat16 if is_int8 else x.dtype
    y = np.full((x.shape[0], n), np.nan, y_dtype)
    product = (*x.shape, n, gpu.X_TYPES[x.dtype.name])
    room = ctypes.c_int64()
    failure = library.kwm_gpu_prepare_cusparselt(
        0, *product, algorithm, ctypes.byref(room)
    )
    if failure is not None:
        return failure, None
    workspace = np.empty(room.value, np.uint8)
    arrays = map(address, [compressed, scale, y, workspace])
    failure = library.kwm_gpu_cusparselt(
        0, None, address(x), *product, algorithm, *arrays
    )
    return failure, y


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
@pytest.mark.parametrize("algorithm", [-1, 2])
def test_cusparselt_equals_reference(faked, dtype, algorithm):
    library, fake = faked
    x, kernel = operands(dtype)
    # Of each column of y; int8 alone has them.
    scale = np.linspace(-1, 3, 32).astype("float32")
    failure, compressed = compress(library, kernel)
    assert failure is None
    given = scale if dtype == "int8" else None
    failure, y = cusparselt(library, x, compressed, 32, algorithm, given)
    assert failure is None
    expected = x.astype("float64") @ kernel.astype("float64")
    if dtype == "int8":
        expected *= scale
    assert error(y, expected) <= TOLERANCE[dtype]
    given = None if dtype == "int8" else scale
    failure, _ = cusparselt(library, x, compressed, 32, algorithm, given)
    assert b"int8" in failure
    assert fake.fake_context_depth() == 0


def round_rows(library, x, padded=None, device=0):
    padded = len(x) if padded is None else padded
    steps = np.full((padded, x.shape[1]), 99, np.int8)
    scale = np.full((len(x),), 99, np.float32)
    failure = library.kwm_gpu_round_rows(
        device,
        None,
        gpu.X_TYPES[x.dtype.name],
        address(x),
        len(x),
        padded,
        x.shape[1],
        *map(address, [steps, scale]),
    )
    return failure, steps, scale


@pytest.mark.parametrize("x_dtype", ["float32", "bfloat16", "float16"])
def test_rounded_rows_equal_reference(faked, x_dtype):
    library, fake = faked
    # One warp, several, and more entries than threads.
    for k in (4, 36, 200, 2052):
        x = make(5, k, 16, x_dtype)[0]
        x[1] *= 100
        x[2] = 0
        x[3, 1] = np.inf if k == 36 else np.nan
        x[4] = np.arange(k) % 3
        failure, steps, scale = round_rows(library, x, 7)
        assert failure is None
        expected = rounded_rows(x)
        np.testing.assert_array_equal(steps[:5], expected[0])
        np.testing.assert_array_equal(scale, expected[1])
        assert not steps[5:].any()
        assert np.isnan(scale[3])
        assert not steps[3].any()
    assert fake.fake_context_depth() == 0


def test_rounding_says_what_it_takes(faked):
    library, fake = faked
    failure, *_ = round_rows(library, np.zeros((2, 6), "float32"))
    assert b"a multiple of 4 entries are rounded, not (2, 6)" in failure
    failure, *_ = round_rows(library, np.zeros((2, 8), "float32"), 1)
    assert b"not (2, 8)" in failure
    failure, *_ = round_rows(library, np.zeros((2, 8), "int8"))
    assert b"rounded are float32, bfloat16 and float16" in failure
    room = np.zeros(64, "float16")
    odd = room[1:9].reshape(1, 8)
    assert b"aligned to 8 bytes" in round_rows(library, odd)[0]
    failure, *_ = round_rows(library, odd[:, :4].copy(), device=2)
    assert b"cuDeviceGet" in failure
    assert fake.fake_misaligned() == 0
    assert fake.fake_context_depth() == 0


def test_structures_are_destroyed(faked):
    library, fake = faked
    x, kernel = operands("bfloat16")
    arguments = library, x, compress(library, kernel)[1], 32
    cusparselt(*arguments)
    before = fake.fake_live()
    for _ in range(3):
        compress(library, kernel)
        cusparselt(*arguments)
        test_cusparselt_algorithms(faked)
        # A plan that could not be made.
        assert cusparselt(*arguments, algorithm=7)[0] is not None
    assert fake.fake_live() == before


def test_cusparselt_algorithms(faked):
    library, _ = faked
    count = ctypes.c_int64()
    failure = library.kwm_gpu_cusparselt_algorithms(
        0, 16, 64, 32, gpu.X_TYPES["bfloat16"], ctypes.byref(count)
    )
    assert failure is None
    assert count.value == 5
    assert library.kwm_gpu_cusparselt_version(0) == 1234


def test_cusparselt_says_what_failed(faked):
    library, fake = faked
    x, kernel = make(16, 64, 32, "float32")
    failure, _ = compress(library, kernel)
    assert failure == b"cuSPARSELt multiplies bfloat16, float16 and int8"
    failure, _ = compress(library, kernel[:, :30].astype("float16"))
    expected = b"cuSPARSELt, structured matrix: an error of fake cuSPARSELt (3)"
    assert failure == expected
    x = x.astype("float16")
    _, compressed = compress(library, kernel.astype("float16"))
    failure, _ = cusparselt(library, x, compressed, 32, algorithm=7)
    assert failure.startswith(b"cuSPARSELt, choice of the algorithm: ")
    failure, _ = cusparselt(library, x[:3], compressed, 32)
    assert failure.startswith(b"cuSPARSELt, activations: ")
    assert fake.fake_context_depth() == 0
