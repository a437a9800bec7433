import dataclasses

import keras
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keras_weightmods import native
from keras_weightmods.native import packed as module
from keras_weightmods.ops import pack_kernel, unpack_kernel
from tests import references

DTYPES = ["float32", "bfloat16", "int8"]


@pytest.fixture(params=["library", "numpy"], autouse=True)
def packer(request, monkeypatch):
    """Each test with the compiled library and without."""
    if request.param == "numpy":
        monkeypatch.setattr(native, "_loaded", (None, "switched off"))
    elif not native.is_available():
        pytest.skip(native.reason_unavailable())


def kernel_of(k, n, seed=0, density=1.0):
    """A random kernel, at most two nonzeros in each group of a column."""
    rng = np.random.default_rng(seed)
    padded = rng.normal(size=(-(-k // 4) * 4, n)).astype("float32")
    mask = references.nm_mask(padded, 2, 4, 0) if padded.size else padded != 0
    mask &= rng.random(padded.shape) < density
    return (padded * mask)[:k]


@settings(
    max_examples=30,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    # Few, as JAX compiles for each.
    shape=st.sampled_from([(64, 16), (37, 21), (5, 2), (0, 3), (4, 0)]),
    dtype=st.sampled_from(DTYPES),
    density=st.sampled_from([0.3, 1.0]),
    seed=st.integers(0, 99),
)
def test_pack_equals_reference_and_comes_back(shape, dtype, density, seed):
    k, n = shape
    kernel = kernel_of(k, n, seed, density)
    packed = pack_kernel(kernel, dtype)
    assert packed.shape == (k, n)
    assert packed.dtype == dtype
    values, meta, scale = references.pack_24(kernel, dtype)
    np.testing.assert_array_equal(packed.meta, meta)
    np.testing.assert_array_equal(
        packed.values.astype("float64"),
        values.astype(packed.values.dtype).astype("float64"),
    )
    expected = kernel
    if dtype == "bfloat16":
        expected = kernel.astype(ml_dtypes.bfloat16).astype("float32")
    if dtype == "int8":
        np.testing.assert_allclose(packed.scale, scale, rtol=1e-6)
        scale = packed.scale.reshape(-1)[:n]
        expected = np.rint(kernel / scale) * scale
        assert np.all(np.abs(expected - kernel) <= 0.5001 * scale)
    unpacked = unpack_kernel(packed)
    assert unpacked.dtype == np.float32
    np.testing.assert_array_equal(unpacked, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_and_variables_unpack_alike(dtype):
    packed = pack_kernel(kernel_of(36, 20), dtype)
    expected = unpack_kernel(packed)
    specs = module.packed_arrays((36, 20), dtype)
    tensors = {
        name: keras.ops.convert_to_tensor(getattr(packed, name))
        for name in specs
    }
    variables = {
        name: keras.Variable(tensor, dtype=specs[name][1], trainable=False)
        for name, tensor in tensors.items()
    }
    for arrays in (tensors, variables):
        same = dataclasses.replace(packed, **arrays)
        np.testing.assert_array_equal(unpack_kernel(same), expected)
        np.testing.assert_array_equal(
            keras.ops.convert_to_numpy(module.unpack_tensor(same)), expected
        )


@pytest.mark.parametrize(
    ("given", "packed"),
    [("float32", "float32"), ("float16", "float32"), ("bfloat16", "bfloat16")],
)
def test_type_of_values_follows_the_kernel(given, packed):
    kernel = keras.ops.cast(kernel_of(8, 3), given)
    result = pack_kernel(kernel)
    assert result.dtype == packed
    np.testing.assert_array_equal(
        unpack_kernel(result),
        keras.ops.convert_to_numpy(keras.ops.cast(kernel, "float32")),
    )


def test_not_finite_values_stay_in_their_place():
    kernel = np.zeros((8, 3), "float32")
    kernel[[1, 2], 0] = np.nan, -np.inf
    kernel[5, 1] = np.inf
    for dtype in ("float32", "bfloat16"):
        packed = pack_kernel(kernel, dtype)
        np.testing.assert_array_equal(unpack_kernel(packed), kernel)
        np.testing.assert_array_equal(
            keras.ops.convert_to_numpy(module.unpack_tensor(packed)), kernel
        )
    # A scale has no room for them: the column says so.
    unpacked = unpack_kernel(pack_kernel(kernel, "int8"))
    assert np.isnan(unpacked[[1, 5], [0, 1]]).all()
    np.testing.assert_array_equal(unpacked[:, 2], 0)


def test_not_2_4():
    kernel = kernel_of(36, 5)
    kernel[0:3, 1] = kernel[32:36, 4] = 1.0
    with pytest.raises(
        ValueError, match=r"must be 2:4 .* \(36, 5\) with 2 of 45 groups"
    ):
        pack_kernel(kernel)
    with pytest.raises(ValueError, match="8 of 8 groups"):
        pack_kernel(np.full((16, 2), np.nan))


def test_wrong_arguments():
    for wrong in np.zeros((4, 4, 4)), [[1.0, 0.0]], None:
        with pytest.raises(ValueError, match=r"must be a matrix .* axes"):
            pack_kernel(wrong)
    with pytest.raises(ValueError, match=r"`dtype` must be .*dtype='int4'"):
        pack_kernel(np.zeros((4, 4)), "int4")
    for shape in [(4,), [4, 4], (4, -1), (4.0, 4)]:
        with pytest.raises(ValueError, match="`shape` must be a pair"):
            module.packed_arrays(shape, "float32")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("values", lambda a: a[:, :16]),
        ("values", lambda a: a.astype("float64")),
        ("meta", lambda a: a.reshape(-1)),
        ("meta", lambda a: a.view(np.uint32)),
        ("meta", lambda a: None),
        ("scale", lambda a: np.ones((2, 16), "float32")),
    ],
)
def test_arrays_that_do_not_fit(name, change):
    packed = pack_kernel(kernel_of(36, 20))
    with pytest.raises(ValueError, match=f"`{name}`.*Received"):
        dataclasses.replace(packed, **{name: change(getattr(packed, name))})


def test_int8_needs_its_scale():
    packed = pack_kernel(kernel_of(36, 20), "int8")
    with pytest.raises(ValueError, match=r"`scale` .* must be an array"):
        dataclasses.replace(packed, scale=None)


def test_unpack_of_what_is_not_packed():
    with pytest.raises(ValueError, match="`packed` must be what"):
        unpack_kernel(np.eye(8, dtype="float32"))
