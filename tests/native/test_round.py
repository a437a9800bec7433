"""Rounding to multiples of scales: every instruction set against NumPy."""

import numpy as np
import pytest

from tests.native import library

pytestmark = pytest.mark.one_backend
LOW, HIGH = -4, 3


def made(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def positive(*shape):
    return np.abs(made(*shape, seed=1)) + np.float32(0.25)


def nearest(ratios):
    return np.clip(np.rint(ratios), LOW, HIGH)


def call(name, *arguments):
    """Call a function with arrays that end where no memory may be read."""
    arguments = [
        library.guarded(x) if isinstance(x, np.ndarray) else x
        for x in arguments
    ]
    getattr(library.LIBRARY, name)(
        *(x.ctypes.data if isinstance(x, np.ndarray) else x for x in arguments)
    )
    return arguments


@pytest.mark.parametrize("name", library.isas())
@pytest.mark.parametrize(("rows", "units"), [(1, 1), (7, 70), (24, 128)])
@pytest.mark.parametrize("from_before", [False, True])
def test_in_order(name, rows, units, from_before):
    targets, coupling = 2 * made(rows, units), made(rows, rows, seed=2) / 8
    kept = (made(rows, units, seed=3) > -1).astype("float32")
    scales = positive(rows, units)
    before = made(rows, units, seed=4) if from_before else None
    empty = np.empty_like(targets), np.empty_like(targets)
    arrays = targets, coupling, kept, scales, before
    with library.isa(name):
        results = call(
            "kwm_round_in_order", *arrays, rows, units, LOW, HIGH, *empty
        )
    rounded, moved = results[-2:]
    for i in range(rows):
        change = coupling[i, :i].astype("float64") @ moved[:i]
        wanted = (targets[i] - change) * kept[i]
        ratio = wanted / scales[i]
        # Where it is next to a half, float32 may round to the other side.
        clear = np.abs(np.abs(ratio - np.floor(ratio)) - 0.5) > 1e-4
        expected = nearest(ratio) * scales[i]
        np.testing.assert_allclose(
            rounded[i][clear], expected[clear], rtol=1e-6
        )
        start = wanted if before is None else before[i]
        np.testing.assert_allclose(moved[i], rounded[i] - start, atol=1e-5)


@pytest.mark.parametrize("name", library.isas())
@pytest.mark.parametrize(("size", "group", "units"), [(5, 4, 3), (64, 32, 70)])
def test_scales_are_the_best_of_the_candidates(name, size, group, units):
    matrix, weights = made(size, units), positive(size)
    matrix[:group, 0] = 0
    factors = np.array([-0.3, -0.25, 0.2, 0.4], "float32")
    empty = np.empty((-(-size // group), units), "float32")
    with library.isa(name):
        *_, scales = call(
            *("kwm_search_scales", matrix, weights, size, group, units),
            *(factors, len(factors), LOW, HIGH, 2**16, empty),
        )
    for row, (g, j) in zip(scales.ravel(), np.ndindex(scales.shape)):
        part = slice(g * group, (g + 1) * group)
        w = matrix[part, j].astype("float64")
        if not w.any():
            assert row == 1
            continue
        tried = (w[np.argmax(np.abs(w))] * factors).astype("float32")
        tried = tried.astype("bfloat16").astype("float64")
        errors = [weights[part] @ (w - nearest(w / s) * s) ** 2 for s in tried]
        assert row == tried[np.argmin(errors)]


@pytest.mark.parametrize("name", library.isas())
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 8, 21), (2, 64, 128)])
def test_multiples_and_their_gradients(name, shape):
    groups, _, units = shape
    weights, slope = 2 * made(*shape), made(*shape, seed=5)
    scales = positive(groups, 1, units)
    limits = *shape, LOW, HIGH
    with library.isa(name):
        values = call(
            *("kwm_multiples", weights, scales, *limits),
            *(np.empty_like(weights), None, None),
        )[-3]
        by_weight, by_scale = call(
            *("kwm_multiples_gradient", slope, weights, scales, *limits),
            *(np.empty_like(weights), np.empty_like(scales), None, None),
        )[-4:-2]
    ratios = weights / scales
    integers = nearest(ratios)
    inside = (ratios >= LOW) & (ratios <= HIGH)
    assert inside.size == 1 or not inside.all()
    np.testing.assert_allclose(values, integers * scales, rtol=1e-6)
    np.testing.assert_array_equal(by_weight, np.where(inside, slope, 0))
    each = slope.astype("float64") * (integers - np.where(inside, ratios, 0))
    np.testing.assert_allclose(
        by_scale, each.sum(axis=1, keepdims=True), atol=1e-4
    )
