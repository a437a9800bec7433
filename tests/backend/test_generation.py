import numpy as np
import pytest
from keras import ops

from keras_weightmods.backend.generation import _argmax, difference


def logits(array, dtype="float32"):
    return ops.cast(ops.convert_to_tensor(array.astype("float32")), dtype)


def test_logits_that_are_rounded_are_not_others():
    rng = np.random.default_rng(0)
    exact = rng.normal(size=(8, 1, 4096))
    rounded = exact * (1 + 0.01 * rng.normal(size=exact.shape))
    rounded[3, 0, 7] = exact[3, 0, 7] + 0.06 * np.abs(exact).max()
    # What is added to a whole row changes no probability.
    rounded[4] += 0.5
    expected = logits(exact, "bfloat16")
    assert not difference(logits(rounded, "bfloat16"), expected, False)
    rounded[3] = exact[4]
    assert difference(logits(rounded, "bfloat16"), expected, False)
    assert not difference(logits(exact * 1.0005), logits(exact), False)
    assert difference(logits(exact * 1.01), logits(exact), False)
    assert not difference(logits(exact * 1.01), logits(exact), True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nan_where_the_model_gives_none_is_a_difference(dtype):
    exact = np.random.default_rng(0).normal(size=(2, 1, 64))
    broken = exact.copy()
    broken[1] = np.nan
    for rounds_inputs in (False, True):
        assert difference(
            logits(broken, dtype), logits(exact, dtype), rounds_inputs
        )
    # Where the model gives it too, there is nothing to compare.
    assert not difference(logits(broken, dtype), logits(broken, dtype), False)


def test_greedy_tokens_are_those_of_argmax():
    rows = np.random.default_rng(0).random((4, 50), "float32")
    rows[1, [7, 30]], rows[2], rows[3] = 2, 0.5, np.nan
    found = _argmax(ops.convert_to_tensor(rows))
    np.testing.assert_array_equal(ops.convert_to_numpy(found), rows.argmax(-1))
