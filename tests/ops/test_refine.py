import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_weightmods import native
from keras_weightmods.ops import nm_project, nm_violations, refine
from tests import references
from tests.backends import breadth
from tests.models import correlated, numpy


def make(size, units, rows=200, seed=0, pattern="2:4"):
    """A second moment with large correlations, a matrix, and it pruned."""
    x, w = correlated(size, units, rows, seed)
    return x.T @ x / rows, w, numpy(nm_project(w, pattern))


def damped(h, damping):
    return h + damping * np.mean(np.diag(h)) * np.eye(len(h))


def errors(w, after, h, damping=0.0):
    """The error of each unit."""
    rest = w.astype("float64") - after
    return np.sum(rest * (damped(h, damping) @ rest), axis=0)


def tensors(*arrays):
    return [ops.convert_to_tensor(np.float32(each)) for each in arrays]


def swapped(w, pruned, h, n=2, m=4, sweeps=1):
    return numpy(refine.swap_mask(*tensors(w, pruned, h), n, m, sweeps))


def refitted(w, pruned, h, damping=0.01, iterations=10):
    h = damped(h, damping) if h.any() else np.eye(len(h))
    return numpy(refine.refit(*tensors(w, pruned, h), iterations))


@breadth(
    ("size", "n", "m"),
    [(24, 2, 4), (136, 2, 4), (24, 1, 4), (24, 3, 8), (64, 16, 32)],
)
@pytest.mark.parametrize("is_compiled", [True, False])
def test_swaps_are_the_reference(size, n, m, is_compiled, monkeypatch):
    if not is_compiled:
        monkeypatch.setattr(native, "library", lambda: None)
    h, w, pruned = make(size, 4, pattern=(n, m))
    expected = references.swap_mask(w, pruned, h, n, m, sweeps=2)
    actual = swapped(w, pruned, h, n, m, sweeps=2)
    np.testing.assert_array_equal(actual == 0, expected == 0)
    np.testing.assert_allclose(actual, expected, rtol=2e-3, atol=2e-3)
    assert (actual != pruned).any()


@pytest.mark.one_backend
def test_units_are_swapped_in_parts(monkeypatch):
    h, w, pruned = make(24, 5)
    expected = swapped(w, pruned, h, sweeps=2)
    monkeypatch.setattr(refine, "_PAIRS", 32)
    found = swapped(w, pruned, h, sweeps=2)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@breadth("size", [8, 24])
def test_refit_is_the_reference(size):
    h, w, pruned = make(size, 5)
    expected = references.refit(w, pruned, h, 0.1)
    actual = refitted(w, pruned, h, 0.1, iterations=3 * size)
    np.testing.assert_allclose(actual, expected, rtol=2e-3, atol=2e-3)
    np.testing.assert_array_equal(actual == 0, pruned == 0)


@pytest.mark.one_backend
@settings(deadline=None, max_examples=15)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 10**6), st.data())
def test_invariants(groups, units, seed, data):
    m = data.draw(st.sampled_from([2, 4, 8]))
    n = data.draw(st.integers(1, m))
    # Also fewer rows than inputs: the second moment is singular then.
    rows = data.draw(st.integers(1, 40))
    h, w, pruned = make(groups * m, units, rows, seed, (n, m))
    # Kept weights may be zero, too.
    pruned[np.random.default_rng(seed).random(pruned.shape) < 0.2] = 0
    slack = 1e-5 * errors(w, 0 * w, h, 0.01)
    by_swaps = swapped(w, pruned, h, n, m, 2)
    assert (errors(w, by_swaps, h) <= errors(w, pruned, h) + slack).all()
    by_refit = refitted(w, pruned, h, iterations=5)
    np.testing.assert_array_equal(by_refit[pruned == 0], 0)
    before = errors(w, pruned, h, 0.01)
    assert (errors(w, by_refit, h, 0.01) <= before + slack).all()
    both = numpy(refine.refined(w, pruned, h, (n, m)))
    assert (errors(w, both, h, 0.01) <= before + slack).all()
    for result in (by_swaps, by_refit, both):
        assert np.isfinite(result).all()
        assert int(nm_violations(result, (n, m))) == 0


@pytest.mark.one_backend
def test_a_weight_of_a_group_that_keeps_all_may_go_alone():
    h = np.eye(2, dtype="float32")
    w = np.array([[3.0], [0.0]], "float32")
    after = swapped(w, w + np.float32([[0], [1e-3]]), h, 2, 2)
    np.testing.assert_array_equal(after, w)


@pytest.mark.one_backend
def test_swaps_end_where_none_is_left():
    h, w, pruned = make(16, 5)
    result = swapped(w, pruned, h, sweeps=100)
    again = references.swap_mask(w, result, h, 2, 4)
    np.testing.assert_allclose(
        errors(w, again, h), errors(w, result, h), rtol=1e-4
    )


@pytest.mark.one_backend
def test_a_kept_weight_of_zero_comes_back():
    w = np.array([[1.0], [2.0], [3.0], [4.0]], "float32")
    pruned = w * [[0], [0], [0], [1]]
    # The group has room for one more, and the third gains most.
    result = swapped(w, pruned, np.eye(4))
    np.testing.assert_allclose(result, w * [[0], [0], [1], [1]])
    # The room is in the place that nm_mask takes first: swapped for itself.
    h = np.diag([100.0, 1.0, 1.0, 1.0])
    np.testing.assert_allclose(swapped(w, pruned, h), w * [[1], [0], [0], [1]])
    np.testing.assert_array_equal(refitted(w, 0 * w, np.eye(4)), 0 * w)


@pytest.mark.one_backend
def test_inputs_that_are_always_zero():
    h, w, pruned = make(8, 3)
    np.testing.assert_array_equal(swapped(w, pruned, 0 * h), pruned)
    # Pulled to the dense weights, where the inputs do not matter.
    result = refitted(w, 2 * pruned, 0 * h)
    np.testing.assert_allclose(result, pruned, rtol=1e-6)
    h[[0, 2]] = 0
    h[:, [0, 2]] = 0
    result = swapped(w, pruned, h, sweeps=9)
    # Both live inputs of the first group end up kept.
    assert (result[[1, 3]] != 0).all()
    # The damping alone makes a dead input count.
    both = numpy(refine.refined(w, pruned, h))
    for after in (result, both):
        assert np.isfinite(after).all()
        assert int(nm_violations(after, "2:4")) == 0


@pytest.mark.one_backend
def test_low_precision_keeps_its_dtype():
    h, w, pruned = make(16, 4)
    half, kept = ops.cast(w, "bfloat16"), ops.cast(pruned, "bfloat16")
    result = refine.refined(half, kept, h)
    assert "bfloat16" in str(result.dtype)
    after = errors(numpy(half), numpy(result), h).sum()
    assert after < errors(numpy(half), numpy(kept), h).sum()


@pytest.mark.one_backend
def test_wrong_arguments():
    h, w, pruned = make(8, 2)
    with pytest.raises(ValueError, match="Received: 4 groups"):
        refine.refined(w, w, h)
    with pytest.raises(ValueError, match="multiple of the group"):
        refine.refined(w, pruned, h, "2:3")
    with pytest.raises(ValueError, match=r"`dense` .*\(8, 2\).*\(8, 1\)"):
        refine.refined(w[:, :1], pruned, h)
