import numpy as np
import pytest

from keras_weightmods import WeightSignature
from keras_weightmods.patches.combine import elected_mean
from tests.models import make_signature
from tests.patches import references

pytestmark = pytest.mark.one_backend


def test_ties_without_a_majority():
    a = np.array([1.0, 0.0, 3.0])
    got = elected_mean([a, -a + [0, 0, 1]], [1.0, 1.0])
    np.testing.assert_array_equal(got, [0.0, 0.0, 3.0])


def test_algebra(model):
    a, b = (make_signature(model, seed) for seed in (1, 2))
    c, small, tiny = a.truncate(1), a.quantize(8), b.quantize(4)

    def whole(signature):
        found = np.zeros(200)
        for entry in signature:
            start = 10 * entry.info.position
            flat = entry.dequantized().reshape(-1)[:10]
            found[start : start + flat.size] = flat
        return found

    mean = 0.75 * whole(a) + 0.25 * whole(b)
    cases = [
        (a + b, whole(a) + whole(b)),
        (a - c, whole(a) - whole(c)),
        (c - a, whole(c) - whole(a)),
        (2 * a, 2 * whole(a)),
        (np.float64(0.5) * a, whole(a) / 2),
        (a * 3, 3 * whole(a)),
        (a / 4, whole(a) / 4),
        (-a, -whole(a)),
        (WeightSignature.sum([a, b, c]), whole(a) + whole(b) + whole(c)),
        (WeightSignature.sum([a, b], weights=[2, -1]), 2 * whole(a) - whole(b)),
        (WeightSignature.sum((a, b), "mean", np.array([3, 1])), mean),
        (WeightSignature.sum([a], "dare", drop_rate=0), whole(a)),
        (WeightSignature.sum([a], "ties", density=1), whole(a)),
        (small + tiny, whole(small) + whole(tiny)),
    ]
    for got, expected in cases:
        np.testing.assert_allclose(whole(got), expected, rtol=1e-5, atol=1e-6)
        assert got.architecture == a.architecture
    assert not np.any(whole(a - a))
    assert (2 * a).method == "rws"
    assert (a + b).method == "sum"


@pytest.mark.parametrize("density", [0.1, 0.4])
def test_ties_merges_whole_signatures(model, density):
    parts = [make_signature(model, seed) for seed in (1, 2, 3)]
    weights = [1.0, 2.0, 0.5]
    vectors = [flat(each) for each in parts]
    got = WeightSignature.sum(parts, "ties", weights, density=density)
    expected = references.ties(vectors, density, weights)
    np.testing.assert_allclose(flat(got), expected, rtol=1e-5)


def test_dare_is_seeded(model):
    a, b = (make_signature(model, seed) for seed in (1, 2))
    got, again, other = (
        WeightSignature.sum([a, b], "dare", drop_rate=0.9, seed=seed)
        for seed in (3, 3, 4)
    )
    assert got.digest == again.digest != other.digest
    generator = np.random.default_rng(3)

    def dropped(tensor):
        uniform = generator.random(tensor.shape).flat
        found = references.dare(tensor.flat, 0.9, uniform)
        return np.reshape(found, tensor.shape)

    expected = [[dropped(e.tensor) for e in each] for each in (a, b)]
    for entry, x, y in zip(got, *expected):
        np.testing.assert_allclose(entry.tensor, x + y, rtol=1e-5, atol=1e-6)


def flat(entries):
    return np.concatenate([entry.tensor.reshape(-1) for entry in entries])


def test_cosine_similarity(model):
    a, b = (make_signature(model, seed) for seed in (1, 2))
    x, y = flat(a), flat(b)
    expected = x @ y / np.sqrt((x @ x) * (y @ y))
    assert a.cosine_similarity(b) == pytest.approx(expected, rel=1e-5)
    assert a.cosine_similarity(-3 * a) == pytest.approx(-1)
    # What one of them lacks counts as zero.
    assert 0 < a.truncate(1).cosine_similarity(a) < 1
    assert (a - a).cosine_similarity(b) == 0
    shifted = make_signature(model, 1, statistics="replace")
    assert shifted.cosine_similarity(a) == pytest.approx(1)
