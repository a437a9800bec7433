import jax
import keras
import numpy as np
import pytest

from keras_weightmods.backend.jax import generation
from keras_weightmods.core import keras_compat

pytest.importorskip("keras_hub")
import keras_hub

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="needs the JAX backend"
)


def rotary_layers():
    layer = keras_hub.layers.RotaryEmbedding
    return keras.Sequential([layer(), layer(), layer(max_wavelength=100)])


def test_rotations_of_known_places_are_constants():
    model = rotary_layers()
    x = np.random.default_rng(0).normal(size=(2, 5, 3, 8)).astype("float32")

    def turn(x, start):
        by = generation._constant_rotations()
        with keras_compat.rotations_by(model, by):
            return [layer(x, start_index=start) for layer in model.layers]

    expected = [layer(x, start_index=2) for layer in model.layers]
    received = jax.jit(turn, static_argnums=1)(x, 2)
    jax.tree.map(np.testing.assert_allclose, received, expected)
    traced = jax.make_jaxpr(turn, static_argnums=1)(x, 2)
    assert " cos " not in str(traced)
    # A cosine and a sine for each of two wavelengths.
    assert sum(c.ndim == 4 for c in traced.consts) == 4
    # The way of a place that is not known is Keras' own.
    assert " cos " in str(jax.make_jaxpr(turn)(x, 2))
    received = jax.jit(turn)(x, 2)
    jax.tree.map(np.testing.assert_allclose, received, expected)


def test_rotations_come_back():
    model = rotary_layers()
    before = [vars(layer).copy() for layer in model.layers]
    with keras_compat.rotations_by(model, lambda plain: None):
        assert model.layers[0]._compute_cos_sin_embedding is None
    assert [vars(layer) for layer in model.layers] == before
