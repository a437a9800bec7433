"""The fast selections against the singular value decomposition itself."""

import importlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_weightmods.ops import low_rank, principal_mask
from keras_weightmods.ops.random_places import random_places
from tests import references
from tests.backends import breadth
from tests.models import normal

# The function has taken the module's name.
module = importlib.import_module("keras_weightmods.ops.principal_mask")


def numpy_mask(*args, **kwargs):
    return ops.convert_to_numpy(principal_mask(*args, **kwargs))


@breadth("method", low_rank.METHODS, 1)
@breadth("shape", [(24, 40), (40, 24), (30, 30), (1, 9)])
def test_equals_the_rule(shape, method):
    x = normal(*shape)
    rank = min(3, *shape)
    mask = numpy_mask(x, density=0.2, filter_rank=rank, method=method)
    count = round(0.2 * x.size)
    assert mask.dtype == bool
    assert np.array_equal(mask, references.principal_mask(x, count, rank))


@breadth(
    ("shape", "axes", "stack"),
    [
        ((3, 8, 5), (0, 1), ()),
        ((4, 12, 3), (1,), ()),
        ((3, 3, 4, 6), (0, 1, 2), ()),
        ((2, 8, 10), (1,), (0,)),
        ((8, 2, 10), (0,), (1,)),
        ((2, 3, 4, 6), (3,), (0, 1)),
    ],
    5,
)
def test_axes(shape, axes, stack):
    x = normal(*shape)
    mask = numpy_mask(
        x, density=0.25, filter_rank=2, contraction_axes=axes, stack_axes=stack
    )
    for place in np.ndindex(*(shape[axis] for axis in stack)):
        at = [slice(None)] * x.ndim
        for axis, index in zip(stack, place):
            at[axis] = index
        piece = x[tuple(at)]
        others = [axis for axis in range(x.ndim) if axis not in stack]
        rows = tuple(others.index(axis) for axis in axes)
        expected = references.principal_mask(piece, piece.size // 4, 2, rows)
        assert np.array_equal(mask[tuple(at)], expected)


@pytest.mark.one_backend
@settings(max_examples=15, deadline=None)
@given(
    shape=st.sampled_from([(1, 1), (3, 7), (8, 8)]),
    rank=st.integers(1, 6),
    criterion=st.sampled_from(module.CRITERIA),
    levels=st.integers(1, 3),
    seed=st.integers(0, 9),
)
def test_count_is_exact(shape, rank, criterion, levels, seed):
    """Also where many entries are equal."""
    x = np.random.default_rng(seed).integers(levels, size=shape)
    given = {"rank": rank, "criterion": criterion}
    if criterion == "gradient":
        given["gradient"] = x
    mask = numpy_mask(x.astype("float32"), **given)
    assert mask.sum() == min(sum(shape) * rank, x.size)


@breadth("criterion", ["magnitude", "gradient", "random"])
def test_selections_for_comparison(criterion):
    x, g = normal(10, 20), normal(10, 20, seed=1)
    arguments = {"density": 0.1, "criterion": criterion}
    if criterion == "gradient":
        arguments["gradient"] = g
    mask, again = (numpy_mask(x, **arguments, seed=3) for _ in range(2))
    assert mask.sum() == 20
    assert np.array_equal(mask, again)
    if criterion != "random":
        scores = np.abs(x if criterion == "magnitude" else g)
        assert scores[mask].min() > scores[~mask].max()
        return
    other = numpy_mask(x, density=0.1, criterion=criterion, seed=4)
    assert not np.array_equal(mask, other)


@pytest.mark.one_backend
def test_places_at_random_are_in_the_order_of_the_kernel():
    x = normal(4, 6, 5)
    candidates = np.random.default_rng(1).random(x.shape) < 0.5
    at = np.flatnonzero(candidates)
    for axes in (0, 1, 2, (0, 1), (0, 2)):
        arguments = {"density": 0.1, "criterion": "random", "seed": 3}
        arguments["contraction_axes"] = axes
        mask = numpy_mask(x, **arguments)
        places = random_places(3, x.size, 12)
        assert np.array_equal(np.flatnonzero(mask), places)
        mask = numpy_mask(x, candidates=candidates, **arguments)
        places = at[random_places(3, at.size, 12)]
        assert np.array_equal(np.flatnonzero(mask), places)
    # Each matrix of a stack has as many, from a stream of its own.
    mask = numpy_mask(
        x,
        density=0.1,
        criterion="random",
        contraction_axes=1,
        stack_axes=(0,),
        seed=3,
    )
    for stream, matrix in enumerate(mask):
        places = random_places(3, matrix.size, 3, stream)
        assert np.array_equal(np.flatnonzero(matrix), places)


@pytest.mark.one_backend
def test_candidates():
    x = normal(12, 16)
    candidates = np.random.default_rng(1).random((12, 16)) < 0.3
    mask = numpy_mask(x, density=0.1, filter_rank=2, candidates=candidates)
    expected = references.principal_mask(x, 19, 2, candidates=candidates)
    assert np.array_equal(mask, expected)
    with pytest.raises(ValueError, match="as many candidates"):
        principal_mask(x, density=0.9, candidates=candidates)


SPECTRA = {
    "decaying": lambda n: 10.0 ** (-np.arange(n) / 20),
    "with a spike": lambda n: np.r_[1e4, np.linspace(1.5, 0.5, n - 1)],
    "of low rank": lambda n: np.r_[np.linspace(2, 1, 20), np.zeros(n - 20)],
    "of low rank and noise": lambda n: np.r_[np.ones(6), np.full(n - 6, 1e-7)],
    "zero": np.zeros,
}


def with_spectrum(values):
    random = np.random.default_rng(0)
    size = len(values), len(values)
    u, v = (np.linalg.qr(random.normal(size=size))[0] for _ in "uv")
    return (u * values) @ v.T


@pytest.mark.one_backend
@pytest.mark.parametrize("spectrum", [*SPECTRA])
def test_krylov_on_hard_spectra(spectrum):
    x = with_spectrum(SPECTRA[spectrum](160))
    found, exact = (
        numpy_mask(x, density=0.05, filter_rank=8, method=method)
        for method in ("krylov", "exact")
    )
    assert np.count_nonzero(found & exact) >= 0.99 * exact.sum()


@pytest.mark.one_backend
def test_krylov_on_a_flat_spectrum():
    # Where no block changes much, and all of them together do.
    x = with_spectrum(np.linspace(1, 0.5, 500))
    found = numpy_mask(x, density=0.05, filter_rank=6, method="krylov")
    exact = references.principal_mask(x, found.sum(), 6)
    assert np.count_nonzero(found & exact) >= 0.98 * exact.sum()


@pytest.mark.one_backend
def test_half_precision_is_selected_in_float32():
    x = ops.cast(normal(16, 24), "bfloat16")
    mask = numpy_mask(x, density=0.1, filter_rank=2)
    wide = ops.convert_to_numpy(ops.cast(x, "float32"))
    assert np.array_equal(mask, references.principal_mask(wide, 38, 2))


def test_default_rank_of_the_filter():
    assert module.Selection(rank=5).rank_of_filter(40, 60) == 5
    assert module.Selection(density=0.05).rank_of_filter(4096, 4096) == 102
    assert module.Selection(density=0.05).rank_of_filter(3, 3) == 1
    assert module.Selection(rank=50).rank_of_filter(40, 60) == 40


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({}, "Give one of `rank`"),
        ({"rank": 2, "density": 0.1}, "Give one of `rank`"),
        ({"rank": 0}, "`rank` must be an int >= 1"),
        ({"density": 1.5}, "`density` must be a finite float"),
        ({"density": 0.001}, "Not one entry"),
        ({"rank": 1, "filter_rank": 0}, "`filter_rank` must be an int"),
        ({"rank": 1, "criterion": "largest"}, "`criterion` must be one of"),
        ({"rank": 1, "method": "svd"}, "`method` must be one of"),
        ({"rank": 1, "seed": -1}, "`seed` must be"),
        ({"rank": 1, "criterion": "gradient"}, "`gradient` must be a tensor"),
    ],
)
def test_errors(arguments, match):
    with pytest.raises(ValueError, match=match):
        principal_mask(normal(6, 8), **arguments)
    with pytest.raises(ValueError, match="must be finite"):
        principal_mask(np.full((6, 8), np.nan), rank=1)


@breadth("levels", [3, 1000])
def test_the_largest_of_host_and_device(levels):
    x = np.random.default_rng(0).integers(-1, levels, size=500)
    x = x.astype("float32")
    for count in (1, 100, 499):
        order = np.argsort(-x, kind="stable")
        expected = np.zeros(500, bool)
        expected[order[:count]] = True
        scores = ops.convert_to_tensor(x)
        on_host = module._largest(scores, count)
        assert np.array_equal(ops.convert_to_numpy(on_host), expected)
        found = module._largest_on_device(scores, count)
        # What comes in the place of ties is left to the host.
        is_tied = x[expected].min() == x[~expected].max()
        assert (found is None) == is_tied
        assert is_tied or np.array_equal(ops.convert_to_numpy(found), expected)
