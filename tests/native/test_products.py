"""The products of every instruction set against the definition, in float64."""

import ctypes
import dataclasses
import pathlib

import ml_dtypes
import numpy as np
import pytest

from keras_weightmods.native import layout
from keras_weightmods.native.packed import (
    _lines as lines,
)
from keras_weightmods.native.packed import (
    pack_dense,
    pack_kernel,
    unpack_kernel,
)
from tests.native import library
from tests.native.library import matmul

pytestmark = pytest.mark.one_backend

BFLOAT16 = ml_dtypes.bfloat16
ISAS = library.isas()
# The types of activations and of values.
KINDS = [
    *(("float32", dtype) for dtype in ("float32", "bfloat16", "int8", "int4")),
    ("bfloat16", "bfloat16"),
    *(
        ("int8", dtype)
        for dtype in (
            *("int8", "int4", "16:32 int8", "16:32 int4"),
            *(f"dense {i}" for i in layout.INTEGERS),
        )
    ),
]
INTEGERS = KINDS[5:]
SHAPES = [(1, 1), (33, 17), (100, 200), (576, 48), (260, 31)]
# Around every tile, and more than one panel.
ROWS = [0, 1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 17, 27, 28, 31, 50, 95, 129, 530]
kinds = pytest.mark.parametrize("kind", KINDS, ids="-".join)
integers = pytest.mark.parametrize("kind", INTEGERS, ids="-".join)
isas = pytest.mark.parametrize("name", ISAS)


def sparse_kernel(rng, k, n, zeros=0.1):
    """2:4, with groups of no, one and two nonzeros."""
    kernel = rng.standard_normal((k, n)).astype("float32")
    padded = -(-k // 4) * 4
    order = rng.random((padded // 4, 4, n)).argsort(1).reshape(padded, n)
    kernel[order[:k] >= 2] = 0
    kernel[rng.random((k, n)) < zeros] = 0
    return kernel


def half_kernel(rng, k, n):
    """16:32, with columns of no, of few and of 16 nonzeros, in any places."""
    kernel = rng.standard_normal((k, n)).astype("float32")
    padded = -(-k // 32) * 32
    order = rng.random((padded // 32, 32, n)).argsort(1).argsort(1)
    # All in the first half, or in the last one.
    order[rng.random(len(order)) < 0.1] = np.arange(32)[:, None]
    order[rng.random(len(order)) < 0.1] = np.arange(31, -1, -1)[:, None]
    count = rng.integers(0, 17, (len(order), 1, n))
    count[rng.random(count.shape) < 0.7] = 16
    kernel[(order >= count).reshape(padded, n)[:k]] = 0
    return kernel


def make(rng, kind, k, n, any_meta=False):
    activations, dtype = kind
    if dtype.startswith("dense"):
        kernel = rng.standard_normal((k, n)).astype("float32")
        return library.guarded_weights(pack_dense(kernel, dtype.split()[1]))
    held = "int8" if activations == "int8" else "float32"
    if dtype.startswith("16:32"):
        kernel, pattern = half_kernel(rng, k, n), "16:32"
        dtype = dtype.split()[1]
        packed = pack_kernel(kernel, dtype, held, pattern=pattern)
    else:
        packed = pack_kernel(sparse_kernel(rng, k, n), dtype, held)
    if any_meta:
        meta = rng.integers(0, 2**32, packed.meta.shape, "uint32").view("int32")
        packed = dataclasses.replace(packed, meta=meta)
    return library.guarded_weights(packed)


def activations(rng, kind, rows, k):
    x = rng.standard_normal((rows, k)).astype("float32")
    if rows > 2:
        x[1], x[2, 0] = 0, 1e4
    return x.astype(BFLOAT16) if kind[0] == "bfloat16" else x


def rounded(x):
    """The integers of x, (rows, KB, 32), and the step of each block."""
    rows, k = x.shape
    blocks = np.pad(x, ((0, 0), (0, -k % 32))).reshape(rows, -(-k // 32), 32)
    largest = np.abs(blocks).max(2, keepdims=True, initial=0)
    step = largest / np.float32(127)
    step[step == 0] = 1
    q = np.clip(np.rint(blocks / step), -127, 127)
    return q, step.astype("float64")


def by_tiles(rows):
    """Whether the instruction set in use multiplies so many rows by tiles."""
    return rows >= 32 and library.LIBRARY.kwm_isa() == library.ISAS["amx"]


def expected(x, packed, transposed=False):
    """The product, and what it may be off by."""
    if packed.activations == "int8" and by_tiles(len(x)):
        # Of what is rounded to bfloat16, where small numbers count as zero.
        wide = np.clip(x, -3.3895e38, 3.3895e38).astype(BFLOAT16)
        kernel = np.float32(unpack_kernel(packed)).astype(BFLOAT16)
        wide, kernel = wide.astype("float64"), kernel.astype("float64")
        exact, size = wide @ kernel, np.abs(wide) @ np.abs(kernel)
        lost = 1 + len(kernel) + np.abs(kernel).sum(0)
        error = 2.0**-24 * len(kernel) * size + 2.0**-126 * lost
        # By the bound of kwm_native.h.
        steps = rounded(x)[1].repeat(32, 2).reshape(len(x), -1)[:, : x.shape[1]]
        precise = unpack_kernel(packed).astype("float64")
        bound = steps @ np.abs(precise) + error
        assert (np.abs(exact - x.astype("float64") @ precise) <= bound).all()
        return exact, error
    if packed.activations == "int8":
        # Sums of integers are exact: what is left is a few roundings a block.
        q, step = rounded(x)
        scale = np.float32(packed.scale)
        whole = dataclasses.replace(packed, scale=np.ones_like(packed.scale))
        kernel = np.pad(unpack_kernel(whole), ((0, -x.shape[1] % 32), (0, 0)))
        kernel = kernel.reshape(-1, 32, packed.shape[1])
        if packed.dtype != "int8":
            scale = scale.transpose(1, 0, 2).repeat(2, axis=0)[: len(kernel)]
        scale = scale.reshape(-1, kernel.shape[-1] + -kernel.shape[-1] % 16)
        scale = scale[:, : kernel.shape[-1]].astype("float64")
        terms = np.einsum("rbi,bin->rbn", q, kernel) * step * scale
        size = np.abs(terms).sum(1)
        return terms.sum(1), (len(kernel) + 4) * 2.0**-24 * size + 1e-43
    kernel = unpack_kernel(packed).astype("float64")
    kernel = kernel.T if transposed else kernel
    wide = x.astype("float64")
    exact, size = wide @ kernel, np.abs(wide) @ np.abs(kernel)
    if x.dtype != BFLOAT16:
        return exact, 1e-5 * size + 1e-43
    # By the bound of kwm_native.h.
    error = 2.0**-24 * x.shape[1] * size + 2.0**-126 * (
        x.shape[1]
        + np.abs(wide).sum(1, keepdims=True)
        + np.abs(kernel).sum(0, keepdims=True)
    )
    return exact, error + 2.0**-8 * (np.abs(exact) + error)


def assert_close(got, x, packed, transposed=False):
    exact, bound = expected(x, packed, transposed)
    assert got.shape == exact.shape
    assert (np.abs(got.astype("float64") - exact) <= bound).all()


@isas
@kinds
@pytest.mark.parametrize("any_meta", [False, True])
def test_product(any_meta, kind, name, rng):
    shapes, sizes = (
        (SHAPES, ROWS) if name != "scalar" else (SHAPES[1:2], [0, 18])
    )
    with library.isa(name):
        for k, n in shapes:
            packed = make(rng, kind, k, n, any_meta)
            for rows in sizes:
                x = activations(rng, kind, rows, k)
                assert_close(matmul(x, packed), x, packed)


@isas
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_gradients(dtype, name, rng):
    shapes, sizes = (
        (SHAPES, ROWS) if name != "scalar" else (SHAPES[1:2], [0, 18])
    )
    with library.isa(name):
        for k, n in shapes:
            packed = make(rng, ("float32", dtype), k, n, any_meta=True)
            for rows in sizes:
                x = activations(rng, ("float32",), rows, k)
                dy = activations(rng, ("float32",), rows, n)
                dx = matmul(dy, packed, transposed=True)
                assert_close(dx, dy, packed, transposed=True)
                if dtype != "float32":
                    continue
                got = library.values_gradient(x, dy, packed)
                # The values of this kernel are x^T dy at the places in meta.
                wide = x.T.astype("float64")
                values = dataclasses.replace(packed, values=got)
                kept = dataclasses.replace(packed, values=np.ones_like(got))
                error = unpack_kernel(values) - wide @ dy * unpack_kernel(kept)
                size = 2 * np.abs(wide) @ np.abs(dy)
                assert (np.abs(error) <= 1e-5 * size).all()


@isas
@kinds
def test_split_of_the_work_does_not_change_the_result(
    kind, name, rng, backwards
):
    loop, calls = backwards
    k, n = (512, 700) if name != "scalar" else (64, 100)
    packed = make(rng, kind, k, n)
    for rows in (1, 16, 70) if name != "scalar" else (3,):
        calls.clear()
        x = activations(rng, kind, rows, k)
        dy = activations(rng, ("float32",), rows, n)
        with library.isa(name):
            alone = [*products(kind, packed, x, dy)]
            shared = [*products(kind, packed, x, dy, loop)]
        for each in zip(alone, shared, strict=True):
            np.testing.assert_array_equal(*each)
        assert name == "scalar" or rows < 70 or calls
        if kind[0] == "int8" and rows == 1:
            # More than one would cost more than it gives.
            assert len(calls) <= 1


def products(kind, packed, x, dy, loop=None):
    yield matmul(x, packed, loop)
    if kind[0] == "float32":
        yield matmul(dy, packed, loop, transposed=True)
    if kind[1] == "float32":
        yield library.values_gradient(x, dy, packed, loop)


@isas
@kinds
def test_extreme_activations(kind, name, rng):
    k, n = 70, 40
    packed = make(rng, kind, k, n)
    kept = unpack_kernel(packed)[7] != 0
    for rows in (3, 40):
        for value in (0, 1e-45, 1e-40, 1e-38, 1e30, np.inf, -np.inf, np.nan):
            x = np.float32(activations(rng, kind, rows, k))
            x[-1] = value * rng.uniform(-1, 1, k)
            x[-1, 7] = value
            x = x.astype(BFLOAT16 if kind[0] == "bfloat16" else "float32")
            with library.isa(name):
                y = matmul(x, packed)
                if np.isfinite(value):
                    assert_close(y, x, packed)
                    continue
                assert_close(y[:-1], x[:-1], packed)
            y = y[-1].astype("float32")
            if kind[0] == "int8":
                assert np.isnan(y).all()
            else:
                assert not np.isfinite(y[kept]).any()


@isas
@integers
@pytest.mark.parametrize("rows", [0, 1, 18, 530])
def test_several_of_one_input(rows, kind, name, rng):
    if name == "scalar" and rows > 20:
        pytest.skip("slow")
    kernels = [make(rng, kind, 96, n) for n in (192, 0, 40, 1, 576)]
    x = activations(rng, kind, rows, 96)
    counts = []

    @library.ParallelFor
    def one_by_one(pool, count, grain, task, context):
        counts.append(count)
        for i in reversed(range(count)):
            task(context, i, i + 1)

    with library.isa(name):
        alone = [matmul(x, packed) for packed in kernels]
        for loop in (None, ctypes.cast(one_by_one, ctypes.c_void_p)):
            together = library.matmul_int8_many(x, kernels, loop)
            for each in zip(together, alone, strict=True):
                np.testing.assert_array_equal(*each)
    assert library.matmul_int8_many(x, []) == []
    # The work on all is shared at once.
    if rows > 500 and name in ("avx2", "avx512"):
        assert len(counts) == 2  # of 512 rows, and of the others


@isas
@pytest.mark.parametrize("rows", [1, 18])
def test_several_types_of_one_input(rows, name, rng):
    kinds = [kind for kind in INTEGERS if " " in kind[1]]
    kernels = [make(rng, kind, 96, 40) for kind in kinds]
    x = activations(rng, kinds[0], rows, 96)
    with library.isa(name):
        alone = [matmul(x, packed) for packed in kernels]
        for order in (1, -1):
            together = library.matmul_int8_many(x, kernels[::order])
            for each in zip(together[::order], alone, strict=True):
                np.testing.assert_array_equal(*each)


@isas
@integers
def test_largest_integers_do_not_overflow(kind, name, rng):
    packed = make(rng, kind, 128, 32, any_meta=True)
    most = 2 ** (layout.bits_of(packed.dtype) - 1)
    shape = list(packed.values.shape)
    shape[2] = 8 if packed.pattern is None else 4
    for value in (-127, 127) if most == 128 else (-most, most - 1):
        words = np.full(shape, value, "int8")
        packed.values[...] = lines(words, packed.dtype)
        for sign in [-1, 1]:
            x = np.full((5, 128), sign * 3.0, "float32")
            with library.isa(name):
                assert_close(matmul(x, packed), x, packed)


@isas
def test_bfloat16_sums_are_rounded_once(name, rng):
    kernel = np.rint(8 * sparse_kernel(rng, 300, 150))
    packed = pack_kernel(kernel, "bfloat16")
    for rows in (28, 100):
        x = rng.integers(-100, 100, (rows, 300)).astype(BFLOAT16)
        with library.isa(name):
            got = matmul(x, packed)
        exact = (x.astype("float32") @ kernel).astype(BFLOAT16)
        np.testing.assert_array_equal(got, exact)


@isas
def test_bfloat16_that_is_denormal_or_not_finite(name, rng):
    kernel = sparse_kernel(rng, 64, 40, zeros=0)
    x = rng.standard_normal((70, 64))
    for scale_x, scale in [(1e-39, 1), (1, 1e-39), (1e-25, 1e-18)]:
        tiny = (x * scale_x).astype(BFLOAT16)
        packed = pack_kernel(np.float32(kernel * scale), "bfloat16")
        with library.isa(name):
            assert_close(matmul(tiny, packed), tiny, packed)
    packed = pack_kernel(kernel, "bfloat16")
    row = unpack_kernel(packed)[9]
    for value in (np.inf, -np.inf, np.nan):
        held = x.astype(BFLOAT16)
        held[33, 9] = value
        with library.isa(name):
            y = matmul(held, packed)
        np.testing.assert_array_equal(
            y[33, row != 0].astype("float32"), value * row[row != 0]
        )
        # Nor does it touch the columns that keep other rows of its group.
        held[33, 9] = 0
        exact, bound = expected(held, packed)
        y[33, row != 0] = exact[33, row != 0]
        assert (np.abs(y.astype("float64") - exact) <= bound).all()


def test_pairs_are_in_use_where_the_processor_has_them():
    # They alone take a denormal number for zero.
    info = pathlib.Path("/proc/cpuinfo")
    if not info.exists() or "avx512_bf16" not in info.read_text():
        pytest.skip("the processor has no AVX512-BF16")
    kernel = np.zeros((32, 16), "float32")
    kernel[0] = 2.0**100
    packed = pack_kernel(kernel, "bfloat16")
    x = np.full((28, 32), 2.0**-130, BFLOAT16)
    assert (matmul(x[:27], packed) == 2.0**-30).all()
    assert (matmul(x, packed) == 0).all()


def test_set_isa_refuses_what_is_not_there():
    before = library.LIBRARY.kwm_isa()
    missing = [library.ISAS[n] for n in {*library.ISAS} - {*ISAS}]
    for isa in (17, *missing):
        assert library.LIBRARY.kwm_set_isa(isa) == -1
    assert missing
    assert library.LIBRARY.kwm_isa() == before
