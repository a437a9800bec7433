"""The Adam that trains blocks: zeros stay, and 16 bits lose no step."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_weightmods.calibration.block_reconstruction import SparseAdam
from tests.models import numpy


def test_the_optimizer_is_adam_but_for_zeros():
    own, plain = variables = [keras.Variable(np.ones((2, 3))) for _ in "ab"]
    kept = np.arange(6).reshape(2, 3) % 2 == 0
    sparse = {id(own): (0.5, ops.convert_to_tensor(kept))}
    optimizers = (
        SparseAdam(0.1, sparse),
        keras.optimizers.Adam(0.05),
    )
    for optimizer, variable in zip(optimizers, variables):
        for gradient in np.linspace(1e-7, 1.0, 18).reshape(3, 2, 3):
            gradient = ops.convert_to_tensor(np.float32(gradient))
            optimizer.apply([gradient], [variable])
    expected = np.where(kept, numpy(plain), 1.0)
    np.testing.assert_allclose(numpy(own), expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_steps_below_the_precision_of_16_bits_add_up(dtype):
    """Keras' Adam in bfloat16 takes no step at all: its beta_2 is 1 there."""
    kept = np.arange(6).reshape(2, 3) % 2 == 0
    own, wide = (
        keras.Variable(np.ones((2, 3)), dtype=each)
        for each in (dtype, "float32")
    )
    optimizers = (
        SparseAdam(1e-3, {id(own): (0.5, ops.convert_to_tensor(kept))}),
        keras.optimizers.Adam(0.5e-3),
    )
    for optimizer, variable in zip(optimizers, (own, wide)):
        for gradient in np.linspace(0.5, 1.0, 120).reshape(20, 2, 3):
            gradient = ops.convert_to_tensor(gradient)
            gradient = ops.cast(ops.cast(gradient, dtype), variable.dtype)
            optimizer.apply([gradient], [variable])
    expected = np.where(kept, numpy(wide), 1.0)
    assert numpy(wide).max() < 0.995
    step = 2.0**-8 if dtype == "bfloat16" else 2.0**-11
    np.testing.assert_allclose(numpy(own), expected, rtol=step / 2 * 1.01)
