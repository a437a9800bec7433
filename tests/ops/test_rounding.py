import numpy as np
import pytest

from keras_weightmods import native
from keras_weightmods.ops import nm_project, rounding
from keras_weightmods.ops.rounding import Grid, round_kept
from tests import references
from tests.models import correlated, numpy


def make(size, units, rows=200, seed=0, pattern="2:4"):
    """A second moment with large correlations, and a sparse matrix."""
    x, w = correlated(size, units, rows, seed)
    h = (x.T @ x / rows).astype("float32")
    return h, numpy(nm_project(w, pattern))


def damped(h, damping=0.01):
    return h + damping * np.mean(np.diag(h)) * np.eye(len(h), dtype="float32")


def nearest(w, h, grid):
    scales = rounding.search_scales(w, np.diag(damped(h)).copy(), grid)
    return grid.nearest(w, grid.spread(scales, len(w)))


def errors(w, after, h):
    """The error of each unit."""
    rest = w.astype("float64") - after
    return np.sum(rest * (h @ rest), axis=0)


CASES = [(24, 3, 8), (72, 4, 64), (136, 4, 24)]


@pytest.mark.one_backend
@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(("size", "bits", "group_size"), CASES)
def test_each_step_is_its_reference(
    size, bits, group_size, compiled, monkeypatch
):
    if not compiled:
        monkeypatch.setattr(native, "library", lambda: None)
    h, w = make(size, 4)
    grid = Grid(bits, group_size)
    scales = rounding.search_scales(w, np.diag(h).copy(), grid)
    expected = references.search_scales(w, np.diag(h), bits, group_size)
    assert set(np.sign(expected).flat) == {-1, 1}
    np.testing.assert_array_equal(scales, expected)
    values = rounding.gptq(w, scales, h, grid)
    expected = references.gptq(w, scales, h, bits, group_size)
    np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-15)
    rest = values, scales, damped(h)
    found = rounding.descend(w, *rest, grid, 2)
    expected = references.descend(w, *rest, bits, group_size, 2)
    for one, other in zip(found, expected):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    assert (found[0] != values).any()


# Also fewer rows than inputs: the second moment is singular then.
SHAPES = [
    (72, 1, 200, "2:4", 4, 64),
    (36, 4, 20, "1:4", 3, 10),
    (16, 2, 1, "2:2", 2, 64),
]


@pytest.mark.one_backend
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("size", "units", "rows", "pattern", "bits", "group_size"), SHAPES
)
def test_invariants(size, units, rows, pattern, bits, group_size, seed):
    h, w = make(size, units, rows, seed, pattern)
    w[np.random.default_rng(seed).random(w.shape) < 0.2] = 0
    grid = Grid(bits, group_size)
    rounded = round_kept(w, h, grid)
    values = numpy(rounded.values)
    assert references.is_on_grid(values, bits, group_size)
    assert not values[w == 0].any()
    slack = 1e-5 * errors(w, 0 * w, damped(h))
    limit = errors(w, nearest(w, h, grid), damped(h)) + slack
    assert (errors(w, values, damped(h)) <= limit).all()
    scales = numpy(rounded.scales)
    np.testing.assert_array_equal(scales, references.bfloat16(scales))
    spread = np.repeat(scales, group_size, axis=0)[: len(w)]
    integers = np.rint(values / spread)
    np.testing.assert_array_equal(integers.astype("float32") * spread, values)


@pytest.mark.one_backend
def test_sweeps_end_where_none_lowers_the_error():
    h, w = make(72, 8)
    grid = Grid()
    end = round_kept(w, h, grid)
    parts = w, numpy(end.values), numpy(end.scales), damped(h)
    found, scales = rounding.descend(*parts, grid, sweeps=100)
    again, _ = references.descend(w, found, scales, damped(h), 4, 64)
    last = errors(w, nearest(w, h, grid), damped(h)).sum()
    for after, share in ((numpy(end.values), 0.7), (found, 1), (again, 1)):
        now = errors(w, after, damped(h)).sum()
        assert now <= share * last * (1 + 1e-5)
        last = now
    np.testing.assert_array_equal(again, found)


@pytest.mark.one_backend
def test_what_is_on_the_grid_stays():
    h, w = make(128, 4)
    first = round_kept(w, None)
    np.testing.assert_allclose(
        numpy(first.values), references.nearest(w, 4), atol=1e-6
    )
    again = numpy(round_kept(numpy(first.values), h).values)
    np.testing.assert_array_equal(again, numpy(first.values))


@pytest.mark.one_backend
def test_inputs_that_are_always_zero():
    h, w = make(16, 3)
    rounded = round_kept(w, 0 * h)
    change = numpy(rounded.values) - w
    plain = numpy(round_kept(w, None).values) - w
    assert np.sum(change**2) <= np.sum(plain**2)
    h[:4] = h[:, :4] = 0
    values = numpy(round_kept(w, h).values)
    assert np.isfinite(values).all()
    assert references.is_on_grid(values, 4, 64)
    zeros = round_kept(0 * w, h)
    assert not numpy(zeros.values).any()


@pytest.mark.one_backend
def test_scales_of_fewer_bits():
    """A bfloat16 holds such weights without rounding."""
    h, w = make(64, 4)
    values = numpy(round_kept(w, h, Grid(4, 64, 5)).values)
    np.testing.assert_array_equal(values, references.bfloat16(values))
    assert references.is_on_grid(values, 4, 64)


@pytest.mark.one_backend
@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("power", [-111, 127])
def test_the_size_of_the_inputs_does_not_matter(power):
    h, w = make(72, 4)
    expected = round_kept(w, h)
    h = np.ldexp(h, power - np.frexp(h.max())[1])
    for one, other in zip(round_kept(w, h), expected):
        np.testing.assert_array_equal(numpy(one), numpy(other))
