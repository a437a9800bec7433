import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_weightmods import ops
from tests import references
from tests.backends import breadth
from tests.models import numpy

ON_TORCH = keras.backend.backend() == "torch"


@st.composite
def cases(draw):
    m = draw(st.integers(1, 12))
    n = draw(st.integers(1, m))
    rank = draw(st.integers(1, 4))
    count = draw(st.integers(1, rank))
    axes = draw(st.permutations(range(rank)))[:count]
    shape = [draw(st.integers(1, 3)) for _ in range(rank)]
    shape[axes[-1]] = m * draw(st.integers(1, 2))
    levels = draw(st.sampled_from([2, 1000]))  # 2: nearly all are ties
    seed = draw(st.integers(0, 2**16))
    x = np.random.default_rng(seed).integers(-levels, levels + 1, shape)
    axis = axes[0] if count == 1 and draw(st.booleans()) else tuple(axes)
    return x.astype("float32"), n, m, axis


def compute(x, pattern, axis):
    mask = ops.nm_mask(x, pattern, axis)
    projected = ops.nm_project(x, pattern, axis)
    violations = ops.nm_violations(projected, pattern, axis)
    again = ops.nm_project(projected, pattern, axis)
    packed = ops.pack_bits(mask)
    return (
        *(mask, projected, violations, again, packed),
        ops.unpack_bits(packed, tuple(x.shape)),
    )


if keras.backend.backend() == "jax":  # which compiles much for each shape
    import jax

    compute = jax.jit(compute, static_argnums=(1, 2))


@settings(max_examples=30 if ON_TORCH else 5, deadline=None)
@given(cases())
def test_mask_equals_reference_and_projection_is_idempotent(case):
    x, n, m, axis = case
    mask, projected, violations, again, packed, unpacked = (
        numpy(each) for each in compute(x, (n, m), axis)
    )
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, references.nm_mask(x, n, m, axis))
    assert mask.sum() * m == mask.size * n
    np.testing.assert_array_equal(projected, np.where(mask, x, 0))
    assert violations == 0
    np.testing.assert_array_equal(again, projected)
    assert packed.shape == (-(-mask.size // 8),)
    np.testing.assert_array_equal(unpacked, mask)


@breadth("m", [8, 32, 128])
def test_large_groups_with_ties(m):
    x = np.random.default_rng(m).integers(-3, 4, (2 * m, 5)).astype("float32")
    mask = numpy(ops.nm_mask(x, (m // 2, m)))
    np.testing.assert_array_equal(mask, references.nm_mask(x, m // 2, m, 0))


@breadth("dtype", ["bfloat16", "float32", "float16"])
def test_dtypes_and_nonfinite_values(dtype):
    x = np.array([[np.nan, np.inf, -np.inf, 5.0, 0.0, 0.0, 0.0, -0.0]]).T
    x = keras.ops.cast(x, dtype)
    mask = numpy(ops.nm_mask(x, "2:4", 0))[:, 0]
    assert np.flatnonzero(mask).tolist() == [0, 1, 4, 5]
    projected = ops.nm_project(x, "2:4", 0)
    assert keras.backend.standardize_dtype(projected.dtype) == dtype
    assert np.isnan(numpy(projected)[0, 0])
    assert int(ops.nm_violations(projected, "2:4", 0)) == 0


@pytest.mark.one_backend
def test_violations_counts_groups():
    x = np.zeros((8, 3), "float32")
    x[:3, 0] = 1.0  # 3 of 4
    x[4:6, 1] = 1.0  # 2 of 4
    x[:, 2] = 1.0  # 4 of 4, twice
    assert int(ops.nm_violations(x, "2:4", 0)) == 3
    assert int(ops.nm_violations(x, "3:4", 0)) == 2
    assert int(ops.nm_violations(x, "1:4", 0)) == 4


@pytest.mark.one_backend
@pytest.mark.parametrize(
    "pattern",
    ["4:2", "5:4", "0:4", "2", "2:4:8", "a:b", "", None, (2,), (2.0, 4), 4],
)
def test_wrong_pattern(pattern):
    with pytest.raises(ValueError, match=r"`pattern` must be 'n:m'"):
        ops.parse_pattern(pattern)


@pytest.mark.one_backend
def test_wrong_size():
    with pytest.raises(ValueError, match="multiple of the group size m=4"):
        ops.nm_mask(np.ones((6, 2), "float32"), "2:4", 0)
