import dataclasses
import itertools
import math

import keras
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_weightmods.native import packed as module
from keras_weightmods.native.layout import INTEGERS
from keras_weightmods.native.quantize import round_activations
from keras_weightmods.ops import pack_kernel, packed_arrays, unpack_kernel
from tests import references
from tests.backends import breadth

DTYPES = ["float32", "bfloat16", "int8", "int4"]


def kernel_of(k, n, seed=0, density=1.0):
    """A random kernel, at most two nonzeros in each group of a column."""
    rng = np.random.default_rng(seed)
    padded = rng.normal(size=(-(-k // 4) * 4, n)).astype("float32")
    mask = references.nm_mask(padded, 2, 4, 0) if padded.size else padded != 0
    mask &= rng.random(padded.shape) < density
    return (padded * mask)[:k]


@pytest.mark.one_backend
@settings(max_examples=30, deadline=None)
@given(
    shape=st.sampled_from([(64, 16), (101, 21), (5, 2), (0, 3), (4, 0)]),
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
    if dtype == "int4":
        np.testing.assert_array_equal(packed.scale, scale)
        scale = np.repeat(scale.transpose(1, 0, 2), 64, axis=0)
        scale = scale.reshape(len(scale), 16 * scale.shape[1])[:k, :n]
        scale = scale.astype("float32")
        expected = np.clip(np.rint(kernel / scale), -8, 7) * scale
    unpacked = unpack_kernel(packed)
    assert unpacked.dtype == np.float32
    np.testing.assert_array_equal(unpacked, expected)


@breadth(
    "dtype",
    [
        *DTYPES,
        *(f"16:32 {i}" for i in DTYPES),
        *(f"dense {i}" for i in INTEGERS),
    ],
    *(3, 4, 5, 7, 11, 12),
)
def test_tensors_and_variables_unpack_alike(dtype):
    if dtype.startswith("dense"):
        packed = module.pack_dense(kernel_of(100, 20), dtype.split()[1])
    elif dtype.startswith("16:32"):
        kernel = half_kernel(100, 20)
        packed = pack_kernel(kernel, dtype.split()[1], pattern="16:32")
    else:
        packed = pack_kernel(kernel_of(100, 20), dtype)
    expected = unpack_kernel(packed)
    specs = packed_arrays(packed.shape, packed.dtype, packed.pattern)
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


@breadth(
    ("given", "packed"),
    [("bfloat16", "bfloat16"), ("float16", "float32"), ("float32", "float32")],
)
def test_type_of_values_follows_the_kernel(given, packed):
    kernel = keras.ops.cast(kernel_of(8, 3), given)
    result = pack_kernel(kernel)
    assert result.dtype == packed
    np.testing.assert_array_equal(
        unpack_kernel(result),
        keras.ops.convert_to_numpy(keras.ops.cast(kernel, "float32")),
    )


@pytest.mark.one_backend
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
    for dtype in ("int8", "int4"):
        unpacked = unpack_kernel(pack_kernel(kernel, dtype))
        assert np.isnan(unpacked[[1, 5], [0, 1]]).all()
        np.testing.assert_array_equal(unpacked[:, 2], 0)


def grid(k, n, bits=4, seed=0):
    """-8 to 7 times a bfloat16 scale, of either sign, a group and column."""
    most = 2 ** (bits - 1)
    rng = np.random.default_rng(seed)
    scale = rng.normal(size=(-(-k // 64), n)) * 2.0 ** rng.integers(-9, 9, n)
    scale = scale.astype(ml_dtypes.bfloat16).astype("float32")
    least = rng.integers(-most, 1, scale.shape)
    steps = [rng.integers(low, 1 - low) for low in np.repeat(least, 64, 0)[:k]]
    steps = np.clip(steps, -most, most - 1)
    return steps * np.repeat(scale, 64, axis=0)[:k]


@pytest.mark.one_backend
@pytest.mark.parametrize("shape", [(192, 40), (132, 17), (3, 5)])
def test_what_lies_on_a_grid_of_int4_is_kept(shape):
    matrix = grid(*shape).astype("float32")
    kernel = matrix * (kernel_of(*shape) != 0)
    np.testing.assert_array_equal(
        unpack_kernel(pack_kernel(kernel, "int4")), kernel
    )
    for bits in range(2, 7):
        matrix = grid(*shape, bits).astype("float32")
        np.testing.assert_array_equal(
            unpack_kernel(module.pack_dense(matrix, f"int{bits}")), matrix
        )


@pytest.mark.one_backend
def test_int4_at_the_ends_of_float32():
    largest = np.finfo("float32").max
    for size in (largest, largest / 2, 1e-38, 1e-44):
        kernel = kernel_of(64, 16) * (kernel_of(64, 16) > 0)
        kernel = (kernel / kernel.max() * size).astype("float32")
        packed = pack_kernel(kernel, "int4")
        values, _, scale = references.pack_24(kernel, "int4")
        np.testing.assert_array_equal(packed.values, values)
        np.testing.assert_array_equal(packed.scale, scale)
        if size < largest:
            assert np.isfinite(unpack_kernel(packed)).all()


def dense_step(lines, word):
    """An integer of a byte of each line, by the layout."""
    bits = len(lines)
    whole = 8 // bits * bits
    if word < whole:
        step = int(lines[word % bits]) >> word // bits * bits
    else:
        rest = [int(byte) >> i & 1 for byte in lines for i in range(whole, 8)]
        first = (word - whole) * bits
        step = sum(bit << i for i, bit in enumerate(rest[first:][:bits]))
    step %= 2**bits
    return step - 2**bits if step >= 2 ** (bits - 1) else step


@pytest.mark.one_backend
@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("shape", [(64, 16), (101, 21), (5, 2), (0, 3), (4, 0)])
def test_dense_matrices(shape, dtype):
    k, n = shape
    bits = int(dtype[3:])
    matrix = np.random.default_rng(1).normal(size=shape).astype("float32")
    packed = module.pack_dense(matrix, dtype)
    assert packed.activations == "int8"
    expected = np.zeros(shape, "float32")
    for column in range(n):
        block, lane = divmod(column, 16)
        for row in range(k):
            g, q = divmod(row % 32, 4)
            scale = packed.scale[block]
            scale = scale[row // 64, lane] if bits < 8 else scale[lane]
            step = dense_step(packed.values[block, row // 32, :, lane, q], g)
            expected[row, column] = step * np.float32(scale)
        if bits < 8:
            for start in range(0, k, 64):
                group = matrix[start : start + 64, column]
                _, scale = references.round_int4(group, bits)
                assert packed.scale[block, start // 64, lane] == scale
    np.testing.assert_array_equal(unpack_kernel(packed), expected)
    if dtype == "int8":
        largest = np.abs(matrix).max(axis=0, initial=0)
        assert np.all(np.abs(expected - matrix) <= largest / 253)


def half_kernel(k, n, group=32, seed=0):
    """A random kernel with half of each group, and an empty column."""
    rng = np.random.default_rng(seed)
    order = rng.random((-(-k // group), group, n)).argsort(1).argsort(1)
    kept = (order < group // 2).reshape(-1, n)[:k]
    kept[:, -1] = False
    return (rng.normal(size=(k, n)) * kept).astype("float32")


@pytest.mark.one_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [2, 8, 32])
@pytest.mark.parametrize("shape", [(64, 16), (101, 21), (5, 2), (0, 3), (4, 0)])
def test_masks(shape, group, dtype):
    """A bit for each row of a column, and the values one after the other."""
    kernel = half_kernel(*shape, group) if math.prod(shape) else np.ones(shape)
    packed = pack_kernel(kernel, dtype, pattern="16:32")
    assert packed.pattern == "16:32"
    # It takes as many bytes as places of two bits.
    same = pack_kernel(np.zeros(shape), dtype)
    assert packed.values.shape == same.values.shape
    assert packed.meta.nbytes == same.meta.nbytes
    expected = np.zeros(shape)
    blocks, rows = packed.meta.shape[:2]
    for block, row in itertools.product(range(blocks), range(rows)):
        words = packed.meta[block, row].astype("int64") % 2**32
        values = packed.values.reshape(blocks, rows, -1)[block, row]
        count = 0
        for word, lane, q in np.ndindex(8, 16, 4):
            bit = 4 * lane + q
            if not words[word, bit // 32] >> bit % 32 & 1:
                continue
            i, column = 32 * row + 4 * word + q, 16 * block + lane
            if dtype == "int4":
                value = int(values[count % 128]) >> count // 128 * 4 & 15
                value = value - 16 if value > 7 else value
                value *= float(packed.scale[block, row // 2, lane])
            else:
                value = float(values[count])
                value *= packed.scale[block, lane] if dtype == "int8" else 1
            expected[i, column] = value
            count += 1
        assert not values[count:].any() or dtype == "int4"
    unpacked = unpack_kernel(packed)
    np.testing.assert_array_equal(unpacked, expected.astype("float32"))
    if dtype == "float32":
        np.testing.assert_array_equal(unpacked, kernel)
    elif dtype == "bfloat16":
        np.testing.assert_allclose(unpacked, kernel, rtol=2**-8)
    else:
        # Zeros are exact, so that the others round as in a dense matrix.
        dense = unpack_kernel(module.pack_dense(kernel, dtype))
        np.testing.assert_array_equal(unpacked, dense)


@pytest.mark.one_backend
def test_bits_beyond_the_values_are_zero():
    packed = pack_kernel(half_kernel(64, 16), pattern="16:32")
    full = dataclasses.replace(packed, meta=np.full_like(packed.meta, -1))
    unpacked = unpack_kernel(full)
    np.testing.assert_array_equal(
        unpacked.reshape(2, 8, 4, 16).transpose(0, 1, 3, 2).reshape(2, -1),
        np.pad(packed.values.reshape(2, 256), ((0, 0), (0, 256))),
    )
    assert np.array_equal(module.unpack_tensor(full), unpacked)


@pytest.mark.one_backend
def test_not_2_4():
    kernel = kernel_of(36, 5)
    kernel[0:3, 1] = kernel[32:36, 4] = 1.0
    with pytest.raises(
        ValueError, match=r"must be 2:4 .* \(36, 5\) with 2 of 45 groups"
    ):
        pack_kernel(kernel)
    with pytest.raises(ValueError, match="8 of 8 groups"):
        pack_kernel(np.full((16, 2), np.nan))
    kernel = half_kernel(100, 5)
    kernel[32:49, 1] = 1.0
    with pytest.raises(
        ValueError, match=r"must be 16:32 .* \(100, 5\) with 1 of 20 groups"
    ):
        pack_kernel(kernel, pattern="16:32")
    with pytest.raises(ValueError, match=r"`pattern` must be .*'4:8'"):
        pack_kernel(kernel, pattern="4:8")


@pytest.mark.one_backend
def test_wrong_arguments():
    for shape in [(4,), 4, (4, -1), (4.0, 4)]:
        with pytest.raises(ValueError, match="`shape`"):
            packed_arrays(shape, "float32")
    with pytest.raises(ValueError, match="`packed` must be what"):
        unpack_kernel(np.eye(8, dtype="float32"))
    for wrong in np.zeros((4, 4, 4)), np.zeros(2):
        with pytest.raises(ValueError, match=r"must be a matrix .* axes"):
            pack_kernel(wrong)
    for wrong in ("int2", "int7"):
        with pytest.raises(ValueError, match=f"`dtype` must .*dtype='{wrong}'"):
            pack_kernel(np.zeros((4, 4)), wrong)
    with pytest.raises(ValueError, match=r"`dtype` must be .*'bfloat16'"):
        module.pack_dense(np.zeros((4, 4)), "bfloat16")
    with pytest.raises(ValueError, match=r"`activations` .*'bfloat16'"):
        pack_kernel(np.zeros((4, 4)), "int8", "bfloat16")
    with pytest.raises(ValueError, match=r"need values in integers.*bfloat16"):
        pack_kernel(np.zeros((4, 4)), "bfloat16", "int8")


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("dtype", "name", "change"),
    [
        ("float32", "values", lambda a: a[:, :16]),
        ("float32", "values", lambda a: a.astype("float64")),
        ("float32", "meta", lambda a: a.reshape(-1)),
        ("float32", "meta", lambda a: a.view(np.uint32)),
        ("float32", "scale", lambda a: np.ones((2, 16), "float32")),
        *(
            (dtype, name, lambda a: None)
            for dtype in ("int8", "int4")
            for name in ("meta", "scale")
        ),
    ],
)
def test_arrays_that_do_not_fit(dtype, name, change):
    packed = pack_kernel(kernel_of(36, 20), dtype)
    with pytest.raises(ValueError, match=f"`{name}`.*Received"):
        dataclasses.replace(packed, **{name: change(getattr(packed, name))})


@breadth("size", [1, 32, 77], 2)
def test_activations_are_rounded_in_blocks(size):
    x = np.random.default_rng(0).normal(size=(2, 3, size)).astype("float32")
    x[0, 0] = 0
    # An outlier has its own block alone.
    x[1, 1, -1] = 1e6
    found = round_activations(keras.ops.convert_to_tensor(x))
    found = keras.ops.convert_to_numpy(found)
    expected = references.round_activations(x)
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-6)
    bound = np.abs(x).max() / 253 if size < 77 else np.inf
    assert np.abs(found - x).max() <= bound
    assert np.abs(found - x)[..., :64].max() < 0.02 or size == 32
    x[0, 1, 0], x[0, 2, -1] = np.nan, np.inf
    found = round_activations(keras.ops.convert_to_tensor(x))
    found = np.isnan(keras.ops.convert_to_numpy(found))
    assert found[0, 1, :32].all()
    assert found[0, 2, (size - 1) // 32 * 32 :].all()
    assert found.sum() == min(size, 32) + (size - 1) % 32 + 1
