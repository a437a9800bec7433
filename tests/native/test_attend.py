"""Attention: every instruction set against the definition."""

import numpy as np
import pytest

from tests.native import library

pytestmark = pytest.mark.one_backend


def reference(q, keys, values, mask, scale):
    """In float64, query by query."""
    q, keys, values = (x.astype("float64") for x in (q, keys, values))
    batch, queries, heads, _ = q.shape
    groups = heads // keys.shape[2]
    out = np.empty_like(q)
    for row, query, head in np.ndindex(batch, queries, heads):
        scores = keys[row, :, head // groups] @ q[row, query, head] * scale
        if mask is not None:
            seen = mask[row, query] != 0
            scores = np.where(seen, scores, -np.inf if seen.any() else 0.0)
        weights = np.exp(scores - scores.max())
        weights /= weights.sum()
        out[row, query, head] = weights @ values[row, :, head // groups]
    return out


def make(rng, batch, queries, places, heads, key_heads, size):
    q = rng.standard_normal((batch, queries, heads, size), "float32")
    keys, values = rng.standard_normal(
        (2, batch, places, key_heads, size), "float32"
    )
    return q, keys, values


@pytest.mark.parametrize("name", library.isas())
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1, 1, 16),
        (2, 1, 7, 9, 3, 64),
        (1, 1, 215, 16, 2, 128),
        (2, 7, 7, 3, 3, 80),
        # More heads of one query than a tile of queries has.
        (1, 1, 20, 49, 1, 16),
        # More than one tile of queries.
        (2, 53, 65, 2, 1, 64),
    ],
)
def test_it_is_the_definition(name, shape):
    rng = np.random.default_rng(sum(shape))
    q, keys, values = make(rng, *shape)
    shape_of_mask = shape[:3]
    masks = [None, (rng.random(shape_of_mask) < 0.6).astype("uint8")]
    masks[1][0, 0] = 0
    lengths = rng.integers(1, shape[2] + 1, shape[:2])
    masks.append(np.arange(shape[2]) < lengths[..., None])
    masks.append(np.tri(*shape_of_mask[1:])[None].repeat(shape[0], 0))
    for mask in masks:
        mask = None if mask is None else np.ascontiguousarray(mask, "uint8")
        # Scores from nearly equal to a single one that counts.
        for scale in (0.0, 0.125, 30.0):
            expected = reference(q, keys, values, mask, scale)
            with library.isa(name):
                got = library.attend(q, keys, values, mask, scale)
            # Scores are rounded to float32.
            terms = scale * shape[-1] * abs(q).max() * abs(keys).max()
            off = (1e-6 + 2e-8 * terms) * abs(values).max()
            np.testing.assert_allclose(got, expected, rtol=0, atol=off)


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("name", library.isas())
def test_what_is_hidden_at_the_end_is_not_read_and_nan_is_seen(name, queries):
    rng = np.random.default_rng(0)
    q, keys, values = make(rng, 1, queries, 40, 2, 1, 16)
    mask = (np.arange(40) < 21).astype("uint8") * np.ones(
        (1, queries, 1), "uint8"
    )
    with library.isa(name):
        expected = library.attend(q, keys, values, mask, 0.2)
        keys[:, 21:], values[:, 21:] = np.nan, np.inf
        got = library.attend(q, keys, values, mask, 0.2)
        np.testing.assert_array_equal(got, expected)
        q, keys, values = make(rng, 2, queries, 20, 2, 1, 16)
        keys[0, 3] = np.nan
        got = library.attend(q, keys, values, None, 0.2)
    assert np.isnan(got[0]).all()
    assert np.isfinite(got[1]).all()


@pytest.mark.parametrize("queries", [1, 50])
@pytest.mark.parametrize("name", library.isas())
def test_split_of_the_work_does_not_change_the_result(
    name, queries, rng, backwards
):
    loop, calls = backwards
    q, keys, values = make(rng, 3, queries, 300, 8, 4, 64)
    with library.isa(name):
        expected = library.attend(q, keys, values, None, 0.125)
        got = library.attend(q, keys, values, None, 0.125, loop)
    np.testing.assert_array_equal(got, expected)
    assert calls
