import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_weightmods import backend, native
from keras_weightmods.ops import nm_violations, sparsegpt
from tests import references
from tests.backends import breadth
from tests.models import correlated, numpy


def pruned(w, h, n=2, m=4, damping=0.01):
    factor = sparsegpt.inverse_factor(h, damping)
    return numpy(sparsegpt.sparsegpt(w, factor, (n, m)))


@breadth(
    ("size", "n", "m"),
    [(24, 2, 4), (24, 1, 4), (24, 3, 8), (136, 2, 4), (64, 16, 32)],
)
@pytest.mark.parametrize("is_compiled", [True, False])
def test_sparsegpt_is_the_reference(size, n, m, is_compiled, monkeypatch):
    if not is_compiled:
        monkeypatch.setattr(native, "library", lambda: None)
    x, w = correlated(size, 5)
    h = x.T @ x / len(x)
    expected = references.sparsegpt(w, h, n, m)
    actual = pruned(w, h, n, m)
    np.testing.assert_allclose(actual, expected, rtol=2e-3, atol=2e-4)
    np.testing.assert_array_equal(actual == 0, expected == 0)
    assert actual.dtype == np.float32
    assert int(nm_violations(actual, (n, m))) == 0


def test_it_can_be_traced():
    x, w = correlated(24, 5)
    factor = sparsegpt.inverse_factor(x.T @ x / len(x))
    traced = backend.current().compiled(
        lambda matrix: sparsegpt.sparsegpt(matrix, factor), ()
    )
    found = numpy(traced(ops.convert_to_tensor(w, "float32")))
    expected = numpy(sparsegpt.sparsegpt(w, factor))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.one_backend
@pytest.mark.parametrize("size", [12, 200])
def test_the_factor(size):
    x, _ = correlated(size, 1)
    h = x.T @ x / len(x)
    u = sparsegpt.inverse_factor(h, 0.1)
    damped = h + 0.1 * np.trace(h) / size * np.eye(size)
    np.testing.assert_allclose(u.T @ u, np.linalg.inv(damped), rtol=1e-8)
    np.testing.assert_array_equal(u, np.triu(u))
    order = np.random.default_rng(0).permutation(size)
    ordered = sparsegpt.inverse_factor(h, 0.1, order)
    expected = sparsegpt.inverse_factor(h[np.ix_(order, order)], 0.1)
    np.testing.assert_array_equal(ordered, expected)


@pytest.mark.one_backend
@settings(deadline=None, max_examples=15)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 10**6), st.data())
def test_invariants(groups, units, seed, data):
    m = data.draw(st.sampled_from([2, 4, 8]))
    n = data.draw(st.integers(1, m))
    # Also fewer rows than inputs, so that only the damping makes it regular.
    rows = data.draw(st.integers(1, 40))
    x, w = correlated(groups * m, units, rows, seed)
    result = pruned(w, x.T @ x, n, m)
    counts = np.count_nonzero(result.reshape(groups, m, units), axis=1)
    assert (counts <= n).all()
    if n == m:
        np.testing.assert_array_equal(result, w)
    # The scale of the data changes nothing.
    again = pruned(w, 64.0 * (x.T @ x), n, m)
    np.testing.assert_allclose(again, result, rtol=1e-4, atol=1e-5)


def test_wanda_is_the_reference():
    x, w = correlated(24, 5)
    norms = np.sqrt((x**2).mean(axis=0))
    for n, m in ((2, 4), (1, 4), (3, 8)):
        actual = numpy(sparsegpt.wanda(w, norms, (n, m)))
        np.testing.assert_array_equal(actual, references.wanda(w, x, n, m))


@pytest.mark.one_backend
def test_inputs_that_are_always_zero():
    _, w = correlated(8, 3)
    x = np.random.default_rng(0).normal(size=(200, 8))
    x[:, [0, 2]] = 0
    result = pruned(w, x.T @ x)
    # The two live inputs of the first group are kept, and nothing else.
    kept = [[False], [True], [False], [True]]
    np.testing.assert_array_equal(result[:4] != 0, np.tile(kept, (1, 3)))
    result = pruned(w, np.zeros((8, 8)))
    expected = w * references.nm_mask(w, 2, 4, 0)
    np.testing.assert_array_equal(result, expected)


@pytest.mark.one_backend
def test_low_precision_keeps_its_dtype():
    x, w = correlated(16, 4)
    half = ops.cast(w, "bfloat16")
    result = sparsegpt.sparsegpt(half, sparsegpt.inverse_factor(x.T @ x), "2:4")
    assert "bfloat16" in str(result.dtype)
    assert int(nm_violations(result, "2:4")) == 0


@pytest.mark.one_backend
def test_wrong_arguments():
    x, w = correlated(8, 2)
    factor = sparsegpt.inverse_factor(x.T @ x)
    with pytest.raises(ValueError, match="finite"):
        sparsegpt.inverse_factor(np.full((4, 4), np.nan))
    with pytest.raises(ValueError, match="`pattern`"):
        sparsegpt.sparsegpt(w, factor, (5, 4))
    # The compiled function would write beyond its arrays.
    with pytest.raises(ValueError, match="multiple of the group"):
        sparsegpt.sparsegpt(w, factor, "2:3")
    with pytest.raises(ValueError, match=r"`factor` .*\(8, 8\).*\(6, 6\)"):
        sparsegpt.sparsegpt(w, factor[:6, :6], "2:4")
