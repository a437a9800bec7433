"""Attention of one query: every instruction set against the definition."""

import numpy as np
import pytest

from tests.native import native_core
from tests.native.test_int8 import isa

pytestmark = pytest.mark.one_backend

if native_core.compiler() is None:
    pytest.skip("no C++ compiler", allow_module_level=True)


def reference(q, keys, values, mask, scale):
    """In float64, query by query."""
    q, keys, values = (x.astype("float64") for x in (q, keys, values))
    groups = q.shape[1] // keys.shape[2]
    out = np.empty_like(q)
    for row in range(q.shape[0]):
        seen = np.ones(keys.shape[1], bool)
        if mask is not None and mask[row].any():
            seen = mask[row] != 0
        for head in range(q.shape[1]):
            scores = keys[row, :, head // groups] @ q[row, head] * scale
            if mask is not None and not mask[row].any():
                scores[:] = 0.0
            scores = np.where(seen, scores, -np.inf)
            weights = np.exp(scores - scores.max())
            weights /= weights.sum()
            out[row, head] = weights @ values[row, :, head // groups]
    return out


def make(rng, batch, places, heads, key_heads, size):
    q = rng.standard_normal((batch, heads, size), "float32")
    keys, values = rng.standard_normal(
        (2, batch, places, key_heads, size), "float32"
    )
    return q, keys, values


@pytest.mark.parametrize("name", native_core.isas())
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1, 16),
        (2, 7, 9, 3, 64),
        (1, 33, 4, 2, 80),
        (3, 192, 5, 1, 32),
        (1, 515, 16, 2, 128),
    ],
)
def test_it_is_the_definition(name, shape):
    rng = np.random.default_rng(sum(shape))
    q, keys, values = make(rng, *shape)
    masks = [None, (rng.random(shape[:2]) < 0.6).astype("uint8")]
    masks[1][0] = 0
    masks.append(
        np.arange(shape[1]) < rng.integers(1, shape[1] + 1, shape[:1])[:, None]
    )
    for mask in masks:
        mask = None if mask is None else np.ascontiguousarray(mask, "uint8")
        # Scores from nearly equal to a single one that counts.
        for scale in (0.0, 0.125, 30.0):
            expected = reference(q, keys, values, mask, scale)
            with isa(name):
                got = native_core.attend(q, keys, values, mask, scale)
            # Scores are rounded to float32.
            terms = scale * shape[-1] * abs(q).max() * abs(keys).max()
            off = (1e-6 + 2e-8 * terms) * abs(values).max()
            np.testing.assert_allclose(got, expected, rtol=0, atol=off)


@pytest.mark.parametrize("name", native_core.isas())
def test_what_is_hidden_at_the_end_is_not_read(name):
    rng = np.random.default_rng(0)
    q, keys, values = make(rng, 1, 40, 2, 1, 16)
    mask = (np.arange(40) < 21).astype("uint8")[None]
    with isa(name):
        expected = native_core.attend(q, keys, values, mask, 0.2)
        keys[:, 21:], values[:, 21:] = np.nan, np.inf
        got = native_core.attend(q, keys, values, mask, 0.2)
    np.testing.assert_array_equal(got, expected)


def test_what_is_not_finite_is_seen():
    rng = np.random.default_rng(0)
    q, keys, values = make(rng, 2, 20, 2, 1, 16)
    keys[0, 3] = np.nan
    got = native_core.attend(q, keys, values, None, 0.2)
    assert np.isnan(got[0]).all()
    assert np.isfinite(got[1]).all()
