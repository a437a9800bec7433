import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_weightmods.patches.entry import code_bytes, quantize
from tests.patches import references


@pytest.mark.parametrize("bits", [8, 4, 2])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 7))
def test_quantize(bits, seed, rows):
    x = np.random.default_rng(seed).normal(size=(rows, 3)).astype("float32")
    x[0, 1] = 0.0
    whole = quantize(x, bits, per_channel=False)
    codes, scale = references.quantize(list(x.flat), bits)
    assert whole.packed.tobytes() == references.pack(codes, bits)
    assert whole.packed.size == code_bytes(x.size, bits)
    assert whole.scales == np.float32(scale)
    expected = np.reshape(codes, x.shape) * scale
    np.testing.assert_allclose(whole.dequantized(), expected, rtol=1e-6)
    channels = quantize(x, bits, per_channel=True)
    for column in range(3):
        codes, scale = references.quantize(list(x[:, column]), bits)
        np.testing.assert_allclose(
            channels.dequantized()[:, column],
            np.array(codes) * scale,
            rtol=1e-6,
        )
    assert channels.nbytes == channels.packed.size + 3 * 4


def test_quantize_of_shapes():
    for shape in ((), (3,), (0, 2), (2, 1)):
        x = np.ones(shape, "float32")
        for per_channel in (False, True):
            got = quantize(x, 4, per_channel)
            np.testing.assert_allclose(got.dequantized(), x, rtol=1e-6)
            channels = len(shape) == 2 and per_channel
            assert got.scales.shape == (shape[-1:] if channels else ())
