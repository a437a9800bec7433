"""bfloat16 activations: every instruction set against the definition."""

import pathlib

import numpy as np
import pytest

from tests.native import native_core
from tests.native.test_core import (
    ISAS,
    bfloat16,
    reference_unpack,
    sparse_kernel,
)

pytestmark = pytest.mark.one_backend

SHAPES = [(1, 1), (3, 5), (33, 17), (100, 200), (576, 48), (260, 31)]
# Around every tile, and more than one panel.
ROWS = [0, 1, 27, 28, 33, 40, 64, 95, 129, 515]


def bits(x):
    return (np.asarray(x, "float32").view("uint32") >> 16).astype("uint16")


def floats(x):
    return (x.astype("uint32") << 16).view("float32")


def random_packed(rng, k, n):
    """Packed arrays, and the kernel that they hold."""
    kernel = sparse_kernel(rng, k, n)
    *packed, _ = native_core.pack(kernel, "bfloat16")
    return packed, bfloat16(kernel).astype("float64")


def multiply(x, packed, n, **kwargs):
    return floats(native_core.matmul_bfloat16(bits(x), packed, n, **kwargs))


def assert_close(got, x, kernel):
    """By the bound of kwm_native.h."""
    x = x.astype("float64")
    exact = x @ kernel
    size = np.abs(x) @ np.abs(kernel)
    error = 2.0**-24 * x.shape[1] * size + 2.0**-126 * (
        x.shape[1]
        + np.abs(x).sum(1, keepdims=True)
        + np.abs(kernel).sum(0, keepdims=True)
    )
    error += 2.0**-8 * (np.abs(exact) + error)
    assert got.shape == exact.shape
    assert (np.abs(got - exact) <= error).all()


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize(("k", "n"), SHAPES)
def test_product(k, n, name, rng):
    packed, kernel = random_packed(rng, k, n)
    with native_core.isa(name):
        for rows in ROWS if name != "scalar" else [0, 3, 64]:
            x = bfloat16(rng.standard_normal((rows, k)))
            assert_close(multiply(x, packed, n), x, kernel)


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("rows", [28, 100])
def test_exact_sums_are_rounded_once(rows, name, rng):
    k, n = 300, 150
    kernel = np.rint(8 * sparse_kernel(rng, k, n))
    *packed, _ = native_core.pack(kernel, "bfloat16")
    x = rng.integers(-100, 100, (rows, k)).astype("float32")
    with native_core.isa(name):
        got = multiply(x, packed, n)
    np.testing.assert_array_equal(got, bfloat16(x @ kernel))


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_stays_in_its_row(value, name, rng):
    k, n, rows = 64, 40, 70
    kernel = rng.standard_normal((k, n))
    kernel[rng.random((k // 4, 4, n)).argsort(1).reshape(k, n) >= 2] = 0
    kernel = bfloat16(kernel)
    *packed, _ = native_core.pack(kernel, "bfloat16")
    x = bfloat16(rng.standard_normal((rows, k)))
    x[33, 9] = value
    with native_core.isa(name):
        y = multiply(x, packed, n)
    kept = kernel[9] != 0
    assert kept.any()
    np.testing.assert_array_equal(y[33, kept], value * kernel[9, kept])
    # Nor does it touch the columns that keep other rows of its group.
    kernel = kernel.astype("float64")
    x[33, 9] = 0
    assert_close(y[33:34, ~kept], x[33:34], kernel[:, ~kept])
    others = np.arange(rows) != 33
    assert_close(y[others], x[others], kernel)


@pytest.mark.parametrize("name", ISAS)
def test_denormal_numbers(name, rng):
    k, n, rows = 64, 40, 70
    x = bfloat16(rng.standard_normal((rows, k)))
    kernel = bfloat16(sparse_kernel(rng, k, n))
    with native_core.isa(name):
        for scale_x, scale in [(1e-39, 1), (1, 1e-39), (1e-25, 1e-18)]:
            tiny = bfloat16(x * np.float32(scale_x))
            held = bfloat16(kernel * np.float32(scale))
            *packed, _ = native_core.pack(held, "bfloat16")
            y = multiply(tiny, packed, n)
            assert_close(y, tiny, held.astype("float64"))
        # Among others.
        x[:, ::3] *= np.float32(1e-39)
        x = bfloat16(x)
        *packed, _ = native_core.pack(kernel, "bfloat16")
        assert_close(multiply(x, packed, n), x, kernel.astype("float64"))


def test_pairs_are_in_use_where_the_processor_has_them():
    # They alone take a denormal number for zero.
    info = pathlib.Path("/proc/cpuinfo")
    if not info.exists() or "avx512_bf16" not in info.read_text():
        pytest.skip("the processor has no AVX512-BF16")
    kernel = np.zeros((32, 16), "float32")
    kernel[0] = 2.0**100
    *packed, _ = native_core.pack(kernel, "bfloat16")
    x = np.full((28, 32), 2.0**-130, "float32")
    assert (multiply(x[:27], packed, 16) == 2.0**-30).all()
    assert (multiply(x, packed, 16) == 0).all()


@pytest.mark.parametrize("name", ISAS)
def test_any_meta_is_a_kernel(name, rng):
    k, n, rows = 75, 300, 40
    packed, _ = random_packed(rng, k, n)
    values, meta = packed[:2]
    random = rng.integers(0, 2**32, meta.shape, "uint32")
    # Of all columns, and of one where the others are as kwm_pack has them.
    one = meta.copy()
    one[170] = 0
    x = bfloat16(rng.standard_normal((rows, k)))
    with native_core.isa(name):
        for each in (random, one):
            held = values, each, None
            kernel = reference_unpack(held, k, n, "bfloat16")
            assert_close(multiply(x, held, n), x, kernel)


@pytest.mark.parametrize("name", ISAS)
@pytest.mark.parametrize("rows", [30, 70, 200])
def test_split_of_the_work_does_not_change_the_result(
    name, rows, rng, backwards
):
    loop, calls = backwards
    k, n = (512, 700) if name != "scalar" else (64, 100)
    packed, _ = random_packed(rng, k, n)
    # One element behind where NumPy puts an array: aligned no better.
    moved = [np.concatenate([a[:1], a])[1:] for a in packed[:2]]
    x = rng.standard_normal((rows, k))
    with native_core.isa(name):
        expected = multiply(x, packed, n)
        got = multiply(x, moved, n, parallel_for=loop)
    np.testing.assert_array_equal(got, expected)
    assert name == "scalar" or calls
