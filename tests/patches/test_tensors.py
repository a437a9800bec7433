import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_weightmods.patches import tensors
from tests.patches import references


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), exponent=st.sampled_from([-170, 0, 150]))
def test_residual(seed, exponent):
    rng = np.random.default_rng(seed)
    init = np.zeros((3, 2))
    clean, robust = rng.normal(size=(2, 3, 2))
    got = tensors.residual(robust, clean * 10.0**exponent)
    np.testing.assert_allclose(
        got, references.rws(init, clean, robust), rtol=1e-9, atol=1e-12
    )
    # What is left has nothing of the reference, and once is enough.
    assert abs(np.vdot(got, clean)) < 1e-12
    np.testing.assert_allclose(
        tensors.residual(got, clean), got, rtol=1e-9, atol=1e-12
    )


def test_residual_of_nothing():
    change = np.array([1.0, -2.0])
    np.testing.assert_array_equal(tensors.residual(change, np.zeros(2)), change)
    assert tensors.residual(np.zeros((0, 2)), np.zeros((0, 2))).shape == (0, 2)


@pytest.mark.parametrize("bits", [8, 4, 2])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 7))
def test_quantize(bits, seed, rows):
    x = np.random.default_rng(seed).normal(size=(rows, 3)).astype("float32")
    x[0, 1] = 0.0
    whole = tensors.quantize(x, bits, per_channel=False)
    codes, scale = references.quantize(list(x.flat), bits)
    assert whole.packed.tobytes() == references.pack(codes, bits)
    assert whole.packed.size == tensors.packed_size(x.size, bits)
    assert whole.scales == np.float32(scale)
    np.testing.assert_allclose(
        whole.dequantized(), np.reshape(codes, x.shape) * scale, rtol=1e-6
    )
    channels = tensors.quantize(x, bits, per_channel=True)
    for column in range(3):
        codes, scale = references.quantize(list(x[:, column]), bits)
        np.testing.assert_allclose(
            channels.dequantized()[:, column],
            np.array(codes) * scale,
            rtol=1e-6,
        )
    assert channels.nbytes == channels.packed.size + 3 * 4


def test_quantize_of_shapes():
    for shape in ((), (3,), (0, 2), (2, 1)):
        x = np.ones(shape, "float32")
        for per_channel in (False, True):
            got = tensors.quantize(x, 4, per_channel)
            np.testing.assert_allclose(got.dequantized(), x, rtol=1e-6)
            channels = len(shape) == 2 and per_channel
            assert got.scales.shape == (shape[-1:] if channels else ())


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
    packed = tensors.quantize(parts[0], 4, False)
    before = clean.copy()
    terms = [(0.5, packed, 0.0), (-2.0, parts[1], 0.25), (1.5, parts[2], 0.5)]
    got = tensors.rebuild(clean, terms)
    w = clean.astype("float64")
    expected = w + sum(
        scale * (each.astype("float64") - pull * w)
        for scale, each, pull in [
            (0.5, packed.dequantized(), 0.0),
            (-2.0, parts[1], 0.25),
            (1.5, parts[2], 0.5),
        ]
    )
    assert got.dtype == clean.dtype
    # In float64 the packed part is the float32 that stands for it.
    np.testing.assert_allclose(
        got.astype("float64"),
        expected,
        rtol=4 * 2.0**-bits,
        atol=4 * 2.0**-bits,
    )
    assert tensors.same_bits(clean, before)
    assert tensors.same_bits(got, tensors.rebuild(clean, terms))


def test_rebuild_of_shapes():
    for shape in ((), (0,), (2, 0), (2, 3)):
        clean = np.ones(shape, "float16")
        got = tensors.rebuild(clean, [(2.0, np.ones(shape, "float32"), 0.0)])
        assert got.shape == shape
        assert np.all(got == 3)
    transposed = np.arange(6, dtype="float32").reshape(2, 3).T
    got = tensors.rebuild(transposed, [(1.0, transposed, 0.0)])
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


def test_same_bits():
    zero = np.zeros(2, "float32")
    assert not tensors.same_bits(zero, -zero)
    nan = np.full(2, np.nan, "float32")
    assert tensors.same_bits(nan, nan.copy())


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 4),
    density=st.sampled_from([0.05, 0.2, 0.5, 1.0]),
)
def test_ties(seed, count, density):
    vectors = np.random.default_rng(seed).normal(size=(count, 10))
    split = [[v[:4].reshape(2, 2), v[4:]] for v in vectors]
    trimmed = [tensors.trimmed(arrays, density) for arrays in split]
    got = [tensors.elected_mean(arrays) for arrays in zip(*trimmed)]
    np.testing.assert_allclose(
        np.concatenate([x.reshape(-1) for x in got]),
        references.ties(vectors, density),
    )


def test_ties_without_a_majority():
    a = np.array([1.0, 0.0, 3.0])
    np.testing.assert_array_equal(
        tensors.elected_mean([a, -a + [0, 0, 1]]), [0.0, 0.0, 3.0]
    )


def test_dare():
    x = np.random.default_rng(0).normal(size=(20, 30))
    got = tensors.dropped(x, 0.9, np.random.default_rng(5))
    uniform = np.random.default_rng(5).random((20, 30))
    expected = references.dare(x.flat, 0.9, uniform.flat)
    np.testing.assert_allclose(got, np.reshape(expected, x.shape))
    assert 0.05 < np.mean(got != 0) < 0.15


@pytest.mark.parametrize("dtype", ["float32", "float16", ml_dtypes.bfloat16])
def test_is_rebuilt_sees_one_bit(dtype):
    rng = np.random.default_rng(0)
    size = tensors._PIECE + 3
    clean = rng.normal(size=(1, size)).astype(dtype)
    terms = [(0.3, rng.normal(size=(1, size)).astype("float32"), 0.0)]
    written = tensors.rebuild(clean, terms)
    assert tensors.is_rebuilt(written, clean, terms)
    for place in (0, size - 1):
        changed = written.copy()
        changed.view(f"u{changed.dtype.itemsize}")[0, place] ^= 1
        assert not tensors.is_rebuilt(changed, clean, terms)


def test_rebuild_into_memory_that_is_there():
    clean = np.ones((3, 5), "float32")
    terms = [(2.0, np.ones((3, 5), "float32"), 0.0)]
    out = tensors.empty_aligned((3, 5), "float32")
    assert out.ctypes.data % 64 == 0
    assert tensors.rebuild(clean, terms, out) is out
    assert (out == 3).all()
