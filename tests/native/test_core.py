import numpy as np
import pytest

from tests import references
from tests.native import native_core

pytestmark = pytest.mark.one_backend

if native_core.compiler() is None:
    pytest.skip("no C++ compiler", allow_module_level=True)

ISAS = native_core.isas()
DTYPES = list(native_core.TYPES)
SHAPES = [(1, 1), (3, 5), (32, 16), (33, 17), (576, 48), (100, 200), (260, 31)]
# Around every tile: of AVX2 and NEON (4), AVX-512 (16), the lanes of the
# transposed product, and more than one panel.
ROWS = [0, 1, 2, 3, 4, 5, 7, 8, 13, 16, 17, 31, 50, 129, 515]


def sparse_kernel(rng, k, n):
    """2:4, with groups of no, one and two nonzeros."""
    kernel = rng.standard_normal((k, n)).astype("float32")
    padded = -(-k // 4) * 4
    order = rng.random((padded // 4, 4, n)).argsort(1).reshape(padded, n)
    kernel[order[:k] >= 2] = 0
    kernel[rng.random((k, n)) < 0.1] = 0
    return kernel


def bfloat16(x):
    """Rounded to nearest even, still float32."""
    bits = np.asarray(x, "float32").view("uint32").astype("uint64")
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return bits.astype("uint32").view("float32")


def reference_unpack(packed, k, n, dtype):
    """The layout of kwm_native.h, slot by slot, float64."""
    values, meta, scale = packed
    row_blocks = -(-k // 32)
    meta = meta.reshape(-1, row_blocks, 16)
    kernel = np.zeros((k, n))
    for column in range(n):
        block, lane = divmod(column, 16)
        for row_block in range(row_blocks):
            for slot in range(16):
                index = int(meta[block, row_block, lane]) >> (2 * slot) & 3
                row = 32 * row_block + slot // 2 * 4 + index
                if row >= k:
                    continue
                if dtype == "float32":
                    v = values.reshape(-1, row_blocks, 16, 16)
                    value = v[block, row_block, slot, lane]
                elif dtype == "bfloat16":
                    v = values.reshape(-1, row_blocks, 8, 16, 2)
                    half = v[block, row_block, slot // 2, lane, slot % 2]
                    value = np.uint32(int(half) << 16).view("float32")
                elif dtype == "int8":
                    v = values.reshape(-1, row_blocks, 4, 16, 4)
                    value = v[block, row_block, slot % 4, lane, slot // 4]
                    value = float(value) * scale[column]
                else:
                    v = values.reshape(-1, row_blocks, 2, 16, 4)
                    byte = v[block, row_block, slot % 2, lane, slot // 4]
                    half = int(byte) >> 4 if slot % 4 >= 2 else int(byte) & 15
                    s = scale.reshape(-1, -(-row_blocks // 2), 16)
                    bits = np.uint32(int(s[block, row_block // 2, lane]) << 16)
                    step = bits.view("float32")
                    value = (half - 16 if half > 7 else half) * float(step)
                kernel[row, column] += value
    return kernel


def assert_close(got, a, b):
    """`got` is a @ b, to 1e-5 of the largest and of what the terms add to."""
    a, b = a.astype("float64"), b.astype("float64")
    assert got.shape == (a.shape[0], b.shape[1])
    if got.size == 0:
        return
    expected = a @ b
    error = np.abs(got - expected)
    assert np.isfinite(got).all()
    assert (error <= 1e-5 * (np.abs(a) @ np.abs(b)) + 1e-44).all()
    assert error.max() <= 1e-5 * np.abs(expected).max() + 1e-44


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_pack(k, n, dtype, rng):
    kernel = sparse_kernel(rng, k, n)
    *packed, bad = native_core.pack(kernel, dtype)
    assert bad == 0
    got = native_core.unpack(packed, k, n, dtype)
    np.testing.assert_allclose(
        got, reference_unpack(packed, k, n, dtype), rtol=1e-6
    )
    if dtype == "float32":
        np.testing.assert_array_equal(got, kernel)
    elif dtype == "bfloat16":
        np.testing.assert_array_equal(got, bfloat16(kernel))
    elif dtype == "int4":
        for got, want in zip(packed, references.pack_24(kernel, dtype)):
            np.testing.assert_array_equal(
                got.view("uint8"), want.ravel().view("uint8")
            )
    else:
        step = np.abs(kernel).max(0) / 127
        np.testing.assert_allclose(packed[2][:n], np.where(step, step, 1))
        np.testing.assert_array_equal(packed[2][n:], 1)
        assert (np.abs(got - kernel) <= step * 0.5001).all()

    # Padding is zero; indices rise.
    values, meta, _ = packed
    assert np.count_nonzero(values) <= np.count_nonzero(kernel)
    slots = meta[:, None] >> np.arange(0, 32, 2, dtype="uint32") & 3
    assert (slots[:, ::2] < slots[:, 1::2]).all()


def test_sizes():
    library = native_core.load()
    assert library.kwm_abi_version() == native_core.native._ABI_VERSION
    # 576 x 1536: bytes over those of dense float32.
    dense = 576 * 1536 * 4
    meta = library.kwm_meta_bytes(576, 1536)
    for kind, share in [(0, 0.53125), (1, 0.28125), (2, 0.15625)]:
        size = library.kwm_values_bytes(576, 1536, kind) + meta
        assert size == share * dense
    size = library.kwm_values_bytes(576, 1536, 3) + meta
    assert 8 * (size + library.kwm_scale_bytes(576, 1536, 3)) == (
        3.25 * 576 * 1536
    )
    assert library.kwm_dense_values_bytes(576, 1536, 2) == 576 * 1536
    assert library.kwm_dense_values_bytes(576, 1536, 3) == 576 * 1536 // 2
    assert library.kwm_dense_values_bytes(576, 1536, 0) == -1
    assert library.kwm_scale_bytes(65, 17, 2) == 4 * 32
    assert library.kwm_scale_bytes(65, 17, 3) == 2 * 2 * 32
    assert library.kwm_values_bytes(576, 1536, 4) == -1
    assert library.kwm_values_bytes(0, 5, 0) == 0


def test_set_isa_refuses_what_is_not_there():
    library = native_core.load()
    before = library.kwm_isa()
    assert library.kwm_set_isa(17) == -1
    missing = set(native_core.ISAS) - set(ISAS)
    assert missing
    for name in missing:
        assert library.kwm_set_isa(native_core.ISAS[name]) == -1
    assert library.kwm_isa() == before


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_products(k, n, dtype, name, rng):
    *packed, _ = native_core.pack(sparse_kernel(rng, k, n), dtype)
    kernel = native_core.unpack(packed, k, n, dtype)
    rows_here = ROWS if name != "scalar" else [0, 1, 3, 4, 18]
    with native_core.isa(name):
        for rows in rows_here:
            x = rng.standard_normal((rows, k)).astype("float32")
            assert_close(native_core.matmul(x, packed, n, dtype), x, kernel)
            dy = rng.standard_normal((rows, n)).astype("float32")
            dx = native_core.matmul(dy, packed, k, dtype, transposed=True)
            assert_close(dx, dy, kernel.T)


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("largest", [0, 1e-38, 1e-30, 1e30, np.inf, np.nan])
def test_extreme_activations(largest, dtype, name, rng):
    k, n, rows = 64, 16, 3
    *packed, _ = native_core.pack(sparse_kernel(rng, k, n), dtype)
    kernel = native_core.unpack(packed, k, n, dtype)
    x = rng.standard_normal((rows, k)).astype("float32")
    x[1] = largest * rng.uniform(-1, 1, k)
    x[1, 7] = largest
    with native_core.isa(name):
        y = native_core.matmul(x, packed, n, dtype)
    assert_close(y[[0, 2]], x[[0, 2]], kernel)
    if np.isfinite(largest):
        assert_close(y[1:2], x[1:2], kernel)
    else:
        # Where the column has a nonzero for that row, at least.
        assert not np.isfinite(y[1, kernel[7] != 0]).any()


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_values_gradient(k, n, name, rng):
    kernel = sparse_kernel(rng, k, n)
    _, meta, _, _ = native_core.pack(kernel)
    with native_core.isa(name):
        for rows in [0, 1, 5, 515 if name != "scalar" else 20]:
            x = rng.standard_normal((rows, k)).astype("float32")
            dy = rng.standard_normal((rows, n)).astype("float32")
            got = native_core.values_gradient(x, dy, meta)
            # As values of a kernel they are x^T dy where meta points to.
            dense = native_core.unpack((got, meta, None), k, n)
            expected = x.T.astype("float64") @ dy
            kept = native_core.unpack((np.ones_like(got), meta, None), k, n)
            size = np.abs(x.T.astype("float64")) @ np.abs(dy)
            assert (np.abs(dense - expected * kept) <= 1e-5 * size).all()
            assert np.isfinite(got).all()


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_meta_is_a_kernel(name, dtype, rng):
    k, n = 75, 40
    values, meta, scale, _ = native_core.pack(sparse_kernel(rng, k, n), dtype)
    meta = rng.integers(0, 2**32, meta.shape, "uint32")
    packed = values, meta, scale
    kernel = reference_unpack(packed, k, n, dtype)
    x = rng.standard_normal((9, k)).astype("float32")
    dy = rng.standard_normal((9, n)).astype("float32")
    with native_core.isa(name):
        np.testing.assert_allclose(
            native_core.unpack(packed, k, n, dtype), kernel, atol=1e-5
        )
        assert_close(native_core.matmul(x, packed, n, dtype), x, kernel)
        dx = native_core.matmul(dy, packed, k, dtype, transposed=True)
        assert_close(dx, dy, kernel.T)


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("rows", [1, 16, 70])
@pytest.mark.parametrize("dtype", DTYPES)
def test_split_of_the_work_does_not_change_the_result(
    dtype, rows, name, rng, backwards
):
    loop, calls = backwards
    k, n = (1024, 1500) if name != "scalar" else (64, 100)
    *packed, _ = native_core.pack(sparse_kernel(rng, k, n), dtype)
    # One element behind where NumPy puts an array: aligned no better.
    moved = [
        None if a is None else np.concatenate([a[:1], a])[1:] for a in packed
    ]
    x = rng.standard_normal((rows, k)).astype("float32")
    dy = rng.standard_normal((rows, n)).astype("float32")
    with native_core.isa(name):
        results = [
            (
                native_core.matmul(x, weights, n, dtype, how),
                native_core.matmul(dy, weights, k, dtype, how, transposed=True),
                native_core.values_gradient(x, dy, weights[1], how),
            )
            for weights, how in ((packed, None), (moved, loop))
        ]
    for got, want in zip(*results):
        np.testing.assert_array_equal(got, want)
    assert name == "scalar" or len(calls) >= 3
