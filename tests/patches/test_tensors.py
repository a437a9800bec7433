"""Sums on NumPy arrays, and arrays in few bits."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_weightmods.patches import tensors
from keras_weightmods.patches.entry import (
    Replacing,
    Sparse,
    code_bytes,
    quantize,
)
from tests.models import assert_same_bits
from tests.patches import references

pytestmark = pytest.mark.one_backend

# Several pieces, and one that is not whole.
SIZE = 2003


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(tensors, "_PIECE", 1000)


def rebuild(clean, terms):
    """Return all pieces of the sum of `clean` and the terms."""
    new = np.empty(clean.shape, clean.dtype)
    for _ in tensors.rebuilt_pieces(clean, terms, new):
        pass
    return new


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [("float64", 52), ("float32", 23), (ml_dtypes.bfloat16, 7)],
)
def test_rebuild(dtype, bits):
    rng = np.random.default_rng(0)
    clean, *parts = (rng.normal(size=SIZE) for _ in range(4))
    clean = clean.astype(dtype)
    parts = [part.astype("float32") for part in parts]
    packed = quantize(parts[0], 4)
    before = clean.copy()
    terms = [(0.5, packed, 0.0), (-2.0, parts[1], 0.25), (1.5, parts[2], 0.5)]
    got = rebuild(clean, terms)
    # In float64 the packed part is the float32 that stands for it.
    arrays = packed.dequantized(), *parts[1:]
    w = clean.astype("float64")
    expected = w + sum(
        scale * (array.astype("float64") - replaced * w)
        for (scale, _, replaced), array in zip(terms, arrays)
    )
    assert got.dtype == clean.dtype
    near = 4 * 2.0**-bits
    np.testing.assert_allclose(
        got.astype("float64"), expected, rtol=near, atol=near
    )
    assert_same_bits([clean, got], [before, rebuild(clean, terms)])
    # One bit is seen, wherever it is.
    assert tensors.is_rebuilt(got, clean, terms)
    for place in (0, SIZE - 1):
        changed = got.copy()
        changed.view(f"u{changed.dtype.itemsize}")[place] ^= 1
        assert not tensors.is_rebuilt(changed, clean, terms)


def test_sparse_terms_change_their_places_alone():
    rng = np.random.default_rng(0)
    clean = rng.normal(size=SIZE).astype("float32")
    clean[: SIZE // 2] = -0.0
    places = np.flatnonzero(rng.random(SIZE) < 0.05)
    values = rng.normal(size=places.size).astype(ml_dtypes.bfloat16)
    got = rebuild(clean, [(-0.5, Sparse(places, values), 0.0)])
    expected = clean.copy()
    expected[places] += np.float32(-0.5) * values.astype("float32")
    assert_same_bits([got], [expected])
    # The same in the entries at more places.
    more = np.union1d(places, [0, 1, 7, SIZE - 1])
    terms = [(-0.5, Sparse(places, values).at(more), 0.0)]
    assert_same_bits([rebuild(clean[more], terms)], [expected[more]])
    # Beside a dense one.
    dense = rng.normal(size=SIZE).astype("float32")
    got = rebuild(clean, [(1.0, dense, 0.0), (2.0, Sparse(places, values), 0)])
    changed = dense.copy()
    changed[places] += 2 * values.astype("float32")
    assert_same_bits([got], [clean + changed])


@pytest.mark.parametrize("dtype", ["float32", "float16", ml_dtypes.bfloat16])
def test_what_replaces_is_exact_where_it_is_alone(dtype):
    rng = np.random.default_rng(0)
    # Sizes that no difference gives exactly, and zeros of both signs.
    sizes = 10.0 ** rng.integers(-4, 4, (2, SIZE))
    clean, new = (rng.normal(size=(2, SIZE)) * sizes).astype(dtype)
    new[:9], clean[5:7] = -0.0, np.nan
    places = np.flatnonzero(rng.random(SIZE) < 0.5)
    places[0] = 6
    tensor = Replacing(places, new[places])
    expected = clean.copy()
    expected[places] = new[places]
    assert_same_bits([rebuild(clean, [(1.0, tensor, 0.0)])], [expected])
    more = np.union1d(places, [0, 1, 7, SIZE - 1])
    got = rebuild(clean[more], [(1.0, tensor.at(more), 0.0)])
    assert_same_bits([got], [expected[more]])
    # Beside another, exact where that one is not; elsewhere the sum.
    clean = np.where(np.isnan(clean), 1, clean).astype(dtype)
    w, v = clean.astype("float64"), new.astype("float64")
    both = places[::3]
    other = Sparse(both, np.ones(len(both), "float32"))
    alone = np.setdiff1d(places, both)
    terms = [(1.0, tensor, 0.0), (2.0, other, 0.0)]
    for each in (terms, terms[::-1]):
        got = rebuild(clean, each)
        assert_same_bits([got[alone]], [new[alone]])
        np.testing.assert_allclose(
            got[both].astype("float64"), v[both] + 2, atol=100
        )
    # At another scale, the way there.
    got = rebuild(clean, [(0.25, tensor, 0.0)]).astype("float64")
    np.testing.assert_allclose(
        got[places], (0.75 * w + 0.25 * v)[places], rtol=2**-6, atol=2**-5
    )


def test_is_finite():
    for dtype in ("float16", "float32", "float64", ml_dtypes.bfloat16):
        assert tensors.is_finite(np.ones(5, dtype))
        for wrong in (np.nan, -np.inf):
            assert not tensors.is_finite(np.array([1, wrong], dtype))
    assert tensors.is_finite(np.full(4, np.finfo("float32").max, "float32"))


@pytest.mark.parametrize("bits", [8, 4, 2])
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 7))
def test_quantize(bits, seed, rows):
    x = np.random.default_rng(seed).normal(size=(rows, 3)).astype("float32")
    x[0, 1] = 0.0
    got = quantize(x, bits)
    codes, scale = references.quantize(list(x.flat), bits)
    assert got.packed.tobytes() == references.pack(codes, bits)
    assert got.packed.size == code_bytes(x.size, bits)
    assert got.scale == np.float32(scale)
    expected = np.reshape(codes, x.shape) * scale
    np.testing.assert_allclose(got.dequantized(), expected, rtol=1e-6)
    assert got.nbytes == got.packed.size + 4


@pytest.mark.parametrize("shape", [(), (0,), (2, 0), (2, 3)])
def test_shapes(shape):
    got = rebuild(np.ones(shape, "float16"), [(2.0, np.ones(shape), 0.0)])
    assert got.shape == shape
    assert np.all(got == 3)
    for x in (np.ones(shape, "float32"), np.zeros(shape, "float32")):
        got = quantize(x, 4).dequantized()
        assert got.shape == shape
        np.testing.assert_allclose(got, x, rtol=1e-6)
