"""int8 activations: every instruction set against the definition."""

import ctypes

import numpy as np
import pytest

from tests.native import native_core

pytestmark = pytest.mark.one_backend

if native_core.compiler() is None:
    pytest.skip("no C++ compiler", allow_module_level=True)

ISAS = native_core.isas()
KINDS = [
    ("int8", False),
    ("int4", False),
    ("int8", True),
    ("int4", True),
]
SHAPES = [(1, 1), (3, 5), (32, 16), (33, 17), (100, 200), (576, 48), (260, 31)]
# Around every tile, and more than one panel.
ROWS = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 16, 17, 31, 50, 515]


def random_weights(rng, k, n, dtype, dense):
    """Any bits are a kernel: its arrays, as the library takes them."""
    library = native_core.load()
    kind = native_core.TYPES[dtype]
    size = library.kwm_dense_values_bytes if dense else library.kwm_values_bytes
    values = rng.integers(0, 256, size(k, n, kind), "uint8")
    if dtype == "int8":
        # pack_kernel makes no -128, and the smallest are the most exacting.
        values = values.view("int8")
        values[values == -128] = 127
        values[rng.random(values.size) < 0.1] = -127
    meta = None
    if not dense:
        size = library.kwm_meta_bytes(k, n) // 4
        meta = rng.integers(0, 2**32, size, "uint32")
    size = library.kwm_scale_bytes(k, n, kind)
    scale = np.exp(rng.standard_normal(size)).astype("float32")
    if dtype == "int8":
        return values, meta, scale[: size // 4]
    return (
        values,
        meta,
        (scale[: size // 2].view("uint32") >> 16).astype("uint16"),
    )


def integers_of(packed, k, n, dtype):
    """The integers of W, int64 (32 KB, n), and the scale of each block.

    From the layout in kwm_native.h.
    """
    values, meta, scale = packed
    row_blocks, blocks = -(-k // 32), -(-n // 16)
    if dtype == "int4":
        words = 4 if meta is None else 2
        values = values.reshape(blocks, row_blocks, words, 16, 4).astype(int)
        low, high = values & 15, values >> 4
        values = np.concatenate([low, high], axis=2)
        values = np.where(values > 7, values - 16, values)
        scale = scale.astype("uint32") << 16
        scale = scale.view("float32").reshape(blocks, -1, 16)
        scale = scale.repeat(2, axis=1)[:, :row_blocks]
    else:
        words = 8 if meta is None else 4
        values = values.reshape(blocks, row_blocks, words, 16, 4).astype(int)
        scale = scale.reshape(blocks, 1, 16).repeat(row_blocks, axis=1)
    kernel = np.zeros((blocks, row_blocks, 32, 16), int)
    if meta is None:
        for row in range(32):
            kernel[:, :, row] = values[:, :, row // 4, :, row % 4]
    else:
        meta = meta.reshape(blocks, row_blocks, 16)
        for slot in range(16):
            place = meta >> np.uint32(2 * slot) & 3
            value = values[:, :, slot % 4, :, slot // 4]
            for i in range(4):
                row = slot // 2 * 4 + i
                kernel[:, :, row] += np.where(place == i, value, 0)
    kernel = kernel.transpose(1, 2, 0, 3).reshape(32 * row_blocks, -1)[:, :n]
    scale = scale.transpose(1, 0, 2).reshape(row_blocks, -1)[:, :n]
    return kernel, scale


def rounded(x):
    """The integers of x, (rows, KB, 32), and the step of each block."""
    rows, k = x.shape
    blocks = np.pad(x, ((0, 0), (0, -k % 32))).reshape(rows, -(-k // 32), 32)
    largest = np.abs(blocks).max(2, keepdims=True, initial=0)
    step = largest / np.float32(127)
    step[step == 0] = 1
    with np.errstate(invalid="ignore"):
        q = np.clip(np.rint(blocks / step), -127, 127)
    bad = ~np.isfinite(largest)
    return np.where(bad, 0, q).astype(int), np.where(bad, np.nan, step)[..., 0]


def reference(x, packed, n, dtype):
    """The product, float64, and what its terms add up to."""
    q, step = rounded(x)
    kernel, scale = integers_of(packed, x.shape[1], n, dtype)
    sums = np.einsum("rbi,bin->rbn", q, kernel.reshape(-1, 32, n))
    terms = sums * step.astype("float64")[..., None] * scale.astype("float64")
    return terms.sum(1), np.abs(terms).sum(1)


def assert_exact(got, x, packed, dtype):
    """Integer sums are exact: what is left is a few roundings a block."""
    expected, size = reference(x, packed, got.shape[1], dtype)
    blocks = -(-x.shape[1] // 32)
    bound = (blocks + 4) * 2.0**-24 * size
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(np.isfinite(got), finite)
    assert (np.abs(got - expected) <= bound)[finite].all()


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize(("dtype", "dense"), KINDS)
@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_product(k, n, dtype, dense, name, rng):
    packed = random_weights(rng, k, n, dtype, dense)
    with native_core.isa(name):
        for rows in ROWS if name != "scalar" else [0, 1, 3, 4, 18]:
            x = rng.standard_normal((rows, k)).astype("float32")
            y = native_core.matmul_int8(x, packed, n, dtype)
            assert_exact(y, x, packed, dtype)


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize(("dtype", "dense"), KINDS)
@pytest.mark.parametrize("rows", [0, 1, 18, 530])
def test_several_of_one_input(rows, dtype, dense, name, rng):
    if name == "scalar" and rows > 20:
        pytest.skip("slow")
    k, sizes = 96, [192, 0, 40, 1, 576]
    matrices = [(random_weights(rng, k, n, dtype, dense), n) for n in sizes]
    x = rng.standard_normal((rows, k)).astype("float32")
    counts = []

    @native_core.ParallelFor
    def one_by_one(pool, count, grain, task, context):
        counts.append(count)
        for i in reversed(range(count)):
            task(context, i, i + 1)

    loop = ctypes.cast(one_by_one, ctypes.c_void_p)
    with native_core.isa(name):
        expected = [
            native_core.matmul_int8(x, packed, n, dtype)
            for packed, n in matrices
        ]
        for threads in (None, loop):
            received = native_core.matmul_int8_many(x, matrices, dtype, threads)
            for each in zip(received, expected, strict=True):
                np.testing.assert_array_equal(*each)
        # The work on all is shared at once.
        if rows > 500 and name in ("avx2", "avx512"):
            assert len(counts) == 2  # of 512 rows, and of the others
        assert native_core.matmul_int8_many(x, [], dtype) == []


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize(("dtype", "dense"), KINDS)
def test_largest_integers_do_not_overflow(dtype, dense, name):
    k, n = 128, 32
    rng = np.random.default_rng(0)
    values, meta, scale = random_weights(rng, k, n, dtype, dense)
    for value in [-127, 127] if dtype == "int8" else [0x88, 0x77]:
        values[:] = value
        for sign in [-1, 1]:
            x = np.full((5, k), sign * 3.0, "float32")
            with native_core.isa(name):
                y = native_core.matmul_int8(x, (values, meta, scale), n, dtype)
            assert_exact(y, x, (values, meta, scale), dtype)


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize(("dtype", "dense"), KINDS)
@pytest.mark.parametrize("k", [64, 70])
def test_extreme_activations(k, dtype, dense, name, rng):
    n = 40
    packed = random_weights(rng, k, n, dtype, dense)
    largest = [0, 1e-45, 2.7e-43, 1e-40, 1e-38, 1e30, np.inf, -np.inf, np.nan]
    for rows in [1, 5]:
        for value in largest:
            x = rng.standard_normal((rows, k)).astype("float32")
            x[-1] = value * rng.uniform(-1, 1, k)
            x[-1, 7] = value
            with native_core.isa(name):
                y = native_core.matmul_int8(x, packed, n, dtype)
            if np.isfinite(value):
                # Below float32 a sum is what is left of it.
                expected, size = reference(x, packed, n, dtype)
                assert (np.abs(y - expected) <= 1e-6 * size + 1e-43).all()
            else:
                assert np.isnan(y[-1]).all()
                assert_exact(y[:-1], x[:-1], packed, dtype)


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize(("dtype", "dense"), KINDS)
def test_outlier_and_nan_stay_in_their_block_and_row(dtype, dense, name, rng):
    k, n = 96, 32
    packed = random_weights(rng, k, n, dtype, dense)
    x = rng.standard_normal((4, k)).astype("float32")
    with native_core.isa(name):
        before = native_core.matmul_int8(x, packed, n, dtype)
        x[1, 40] = np.nan
        x[2, 40] = 1e6
        y = native_core.matmul_int8(x, packed, n, dtype)
    np.testing.assert_array_equal(y[[0, 3]], before[[0, 3]])
    assert np.isnan(y[1]).all()
    # What the two blocks without the outlier lose is half of their own steps.
    kernel, scale = integers_of(packed, k, n, dtype)
    exact = x[2].astype("float64") @ (kernel * scale.repeat(32, axis=0))
    _, step = rounded(x[2:3])
    per_block = np.abs(kernel.reshape(3, 32, n)).sum(1) * scale
    bound = (step[0, :, None] / 2 * per_block).sum(0)
    assert (np.abs(y[2] - exact) <= bound * 1.0001 + 1e-5).all()


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize(("dtype", "dense"), KINDS)
@pytest.mark.parametrize("rows", [1, 3, 16, 70])
def test_threads_do_not_change_a_bit(rows, dtype, dense, name, rng, backwards):
    loop, calls = backwards
    k, n = (1024, 1500) if name != "scalar" else (128, 100)
    packed = random_weights(rng, k, n, dtype, dense)
    # One element behind where NumPy puts an array: aligned no better.
    moved = [
        None if a is None else np.concatenate([a[:1], a])[1:] for a in packed
    ]
    x = rng.standard_normal((rows, k)).astype("float32")
    with native_core.isa(name):
        alone = native_core.matmul_int8(x, packed, n, dtype)
        shared = native_core.matmul_int8(x, moved, n, dtype, loop)
    np.testing.assert_array_equal(alone, shared)
    assert name == "scalar" or calls
    if rows == 1:
        # More than one would cost more than it gives.
        assert len(calls) <= 1
