import keras
import numpy as np
import pytest

from keras_weightmods.native.quantize import round_activations
from tests import references


@pytest.mark.parametrize("size", [1, 32, 77])
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
