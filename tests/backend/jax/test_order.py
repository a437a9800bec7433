"""The order that XLA is told to keep changes no bit."""

import keras
import numpy as np
import pytest

if keras.backend.backend() != "jax":
    pytest.skip("needs JAX", allow_module_level=True)

import jax

from keras_weightmods.backend.jax.order import after, after_all

SPECIAL = np.float32([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -3.0])


@pytest.mark.parametrize("first", SPECIAL)
def test_no_bit_changes(first):
    x = np.concatenate([SPECIAL, np.uint32([0x7FC00123]).view("float32")])
    first = np.float32([first])
    for found in (
        jax.jit(after)(x, first),
        *jax.jit(after_all)([x, x[None], first])[:2],
    ):
        found = np.asarray(found).reshape(-1)
        assert np.array_equal(found.view("uint32"), x.view("uint32"))


def test_nothing_to_wait_for():
    assert after_all([]) == []
