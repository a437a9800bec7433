import ml_dtypes
import numpy as np
import pytest

from keras_weightmods.patches import tensors
from keras_weightmods.patches.entry import Replacing, Sparse, quantize
from tests.models import assert_same_bits


def rebuild(clean, terms):
    """Return all pieces of the sum of `clean` and the terms."""
    new = np.empty(clean.shape, clean.dtype)
    for _ in tensors.rebuilt_pieces(clean, terms, out=new):
        pass
    return new


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [("float64", 52), ("float32", 23), (ml_dtypes.bfloat16, 7)],
)
def test_rebuild(dtype, bits):
    # Of several pieces, and one that is not whole.
    rng = np.random.default_rng(0)
    size = 2 * tensors._PIECE + 3
    clean, *parts = (rng.normal(size=size) for _ in range(4))
    clean = clean.astype(dtype)
    parts = [part.astype("float32") for part in parts]
    packed = quantize(parts[0], 4, False)
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
    np.testing.assert_allclose(
        got.astype("float64"),
        expected,
        rtol=4 * 2.0**-bits,
        atol=4 * 2.0**-bits,
    )
    assert_same_bits([clean, got], [before, rebuild(clean, terms)])


def test_sparse_terms_change_their_places_alone():
    rng = np.random.default_rng(0)
    size = 2 * tensors._PIECE + 3
    clean = rng.normal(size=size).astype("float32")
    clean[: size // 2] = -0.0
    places = np.flatnonzero(rng.random(size) < 0.05)
    values = rng.normal(size=places.size).astype(ml_dtypes.bfloat16)
    got = rebuild(clean, [(-0.5, Sparse(places, values), 0.0)])
    expected = clean.copy()
    expected[places] += np.float32(-0.5) * values.astype("float32")
    assert_same_bits([got], [expected])
    # The same in the entries at more places.
    more = np.union1d(places, [0, 1, 7, size - 1])
    terms = [(-0.5, Sparse(places, values).at(more), 0.0)]
    assert_same_bits([rebuild(clean[more], terms)], [expected[more]])
    # Beside a dense one.
    dense = rng.normal(size=size).astype("float32")
    got = rebuild(clean, [(1.0, dense, 0.0), (2.0, Sparse(places, values), 0)])
    changed = dense.copy()
    changed[places] += 2 * values.astype("float32")
    assert_same_bits([got], [clean + changed])


@pytest.mark.parametrize("dtype", ["float32", "float16", ml_dtypes.bfloat16])
def test_what_replaces_is_exact_where_it_is_alone(dtype):
    rng = np.random.default_rng(0)
    size = tensors._PIECE + 3
    # Of sizes that no difference gives exactly, zeros of both signs too.
    sizes = 10.0 ** rng.integers(-4, 4, (2, size))
    clean, new = (rng.normal(size=(2, size)) * sizes).astype(dtype)
    new[:9], clean[5:7] = -0.0, np.nan
    places = np.flatnonzero(rng.random(size) < 0.5)
    places[0] = 6
    values = new[places]
    tensor = Replacing(places, values)
    expected = clean.copy()
    expected[places] = values
    got = rebuild(clean, [(1.0, tensor, 0.0)])
    assert_same_bits([got], [expected])
    more = np.union1d(places, [0, 1, 7, size - 1])
    got = rebuild(clean[more], [(1.0, tensor.at(more), 0.0)])
    assert_same_bits([got], [expected[more]])
    # Beside another, exact where that one is not; elsewhere the sum.
    clean = np.where(np.isnan(clean), 1, clean).astype(dtype)
    other = Sparse(places[::3], np.ones(len(places[::3]), "float32"))
    for terms in ([(1.0, tensor, 0.0), (2.0, other, 0.0)],) * 2:
        got = rebuild(clean, terms)
        alone = np.setdiff1d(places, other.places)
        assert_same_bits([got[alone]], [new[alone]])
        both = other.places
        np.testing.assert_allclose(
            got[both].astype("float64"),
            (new[both].astype("float64") + 2).astype(dtype).astype("float64"),
            atol=1e-2 * 10**4,
        )
        terms.reverse()
    # At another scale, the way there.
    w, v = clean.astype("float64"), new.astype("float64")
    got = rebuild(clean, [(0.25, tensor, 0.0)]).astype("float64")
    np.testing.assert_allclose(
        got[places], (0.75 * w + 0.25 * v)[places], rtol=2**-6, atol=2**-5
    )


def test_rebuild_of_shapes():
    for shape in ((), (0,), (2, 0), (2, 3)):
        clean = np.ones(shape, "float16")
        got = rebuild(clean, [(2.0, np.ones(shape, "float32"), 0.0)])
        assert got.shape == shape
        assert np.all(got == 3)
    transposed = np.arange(6, dtype="float32").reshape(2, 3).T
    got = rebuild(transposed, [(1.0, transposed, 0.0)])
    np.testing.assert_array_equal(got, 2 * transposed)


def test_is_finite():
    largest = np.finfo("float32").max
    for dtype in ("float16", "float32", "float64", ml_dtypes.bfloat16):
        assert tensors.is_finite(np.ones(5, dtype))
        for wrong in (np.nan, np.inf, -np.inf):
            assert not tensors.is_finite(np.array([1, wrong], dtype))
        assert not tensors.is_finite(np.array([np.inf, -np.inf], dtype))
        assert tensors.is_finite(np.zeros(0, dtype))
    assert tensors.is_finite(np.full(4, largest, "float32"))


@pytest.mark.parametrize("dtype", ["float32", "float16", ml_dtypes.bfloat16])
def test_is_rebuilt_sees_one_bit(dtype):
    rng = np.random.default_rng(0)
    size = tensors._PIECE + 3
    clean = rng.normal(size=(1, size)).astype(dtype)
    terms = [(0.3, rng.normal(size=(1, size)).astype("float32"), 0.0)]
    written = rebuild(clean, terms)
    assert tensors.is_rebuilt(written, clean, terms)
    for place in (0, size - 1):
        changed = written.copy()
        changed.view(f"u{changed.dtype.itemsize}")[0, place] ^= 1
        assert not tensors.is_rebuilt(changed, clean, terms)
