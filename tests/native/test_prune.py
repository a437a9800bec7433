"""Pruning and swapping in order: every instruction set against float64."""

import numpy as np
import pytest

from keras_weightmods.ops.sparsegpt import inverse_factor
from tests import references
from tests.models import correlated
from tests.native import library
from tests.native.test_round import call

pytestmark = pytest.mark.one_backend
sizes = pytest.mark.parametrize(
    ("rows", "units", "n", "m"),
    [(4, 1, 2, 4), (24, 70, 1, 4), (64, 130, 16, 32), (128, 64, 3, 128)],
)


def made(rows, units):
    x, w = correlated(rows, units, 300)
    return w.astype("float32"), (x.T @ x / 300).astype("float32")


@pytest.mark.parametrize("name", library.isas())
@sizes
def test_prunes_as_sparsegpt(name, rows, units, n, m):
    w, h = made(rows, units)
    factor = np.ascontiguousarray(inverse_factor(h), "float32")
    empty = np.empty_like(w), np.empty_like(w)
    with library.isa(name):
        *_, pruned, errors = call(
            "kwm_prune_in_order", w, factor, rows, units, m, n, *empty
        )
    expected = references.sparsegpt(w, h, n, m)
    np.testing.assert_array_equal(pruned == 0, expected == 0)
    np.testing.assert_allclose(pruned, expected, rtol=2e-3, atol=2e-3)
    # Each change comes from the errors of the rows above it, and its own.
    np.testing.assert_allclose(w - factor.T @ errors, pruned, atol=1e-3)


@pytest.mark.parametrize("name", library.isas())
def test_nan_counts_as_the_largest(name):
    w = np.array([[3.0], [np.nan], [1.0], [2.0]], "float32")
    empty, factor = (np.empty_like(w), np.empty_like(w)), np.eye(4)
    with library.isa(name):
        *_, pruned, _ = call(
            *("kwm_prune_in_order", w, factor.astype("float32")),
            *(4, 1, 4, 2, *empty),
        )
    np.testing.assert_array_equal(pruned[:, 0], [3.0, np.nan, 0.0, 0.0])


@pytest.mark.parametrize("name", library.isas())
@sizes
def test_swaps_as_one_sweep(name, rows, units, n, m):
    w, h = made(rows, units)
    ranks = np.argsort(np.argsort(-np.abs(w).reshape(-1, m, units), 1), 1)
    pruned = np.where(ranks.reshape(w.shape) < n, w, 0)
    inverse, slope = 1 / h.diagonal(), h @ (w - pruned)
    with library.isa(name):
        *_, slopes, swapped = call(
            *("kwm_swap_in_order", pruned, w, h, inverse),
            *(rows, units, m, n, slope, np.empty_like(w)),
        )
    expected = references.swap_mask(w, pruned, h, n, m, sweeps=1)
    np.testing.assert_array_equal(swapped == 0, expected == 0)
    np.testing.assert_allclose(swapped, expected, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(slopes, h @ (w - swapped), atol=2e-3)
