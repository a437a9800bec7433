"""The attention of one query on JAX, by the kernel and without it."""

import keras
import numpy as np
import pytest

if keras.backend.backend() != "jax":
    pytest.skip("of JAX alone", allow_module_level=True)

import jax
import jax.numpy as jnp
from keras.src.backend.jax.nn import dot_product_attention

from keras_weightmods.backend.jax import xla_handlers
from keras_weightmods.backend.jax.attention import attend_by

pytestmark = pytest.mark.skipif(
    bool(xla_handlers.reason_unavailable()), reason="no compiled kernels"
)


def inputs(batch=2, queries=1, heads=6, places=21, key_heads=3, size=32):
    rng = np.random.default_rng(0)
    q = rng.standard_normal((batch, queries, heads, size), "float32")
    keys, values = rng.standard_normal(
        (2, batch, places, key_heads, size), "float32"
    )
    return jnp.array(q), jnp.array(keys), jnp.array(values)


def calls(function, *arguments):
    """The kernel's calls in a function, as XLA gets it."""
    lowered = jax.jit(function).lower(*arguments).as_text()
    return lowered.count("kwm_xla_attend")


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_it_is_what_keras_gives(masked, scale):
    arrays = inputs()
    mask = None
    if masked:
        mask = jnp.arange(21) < jnp.array([[5], [21]])
        mask = mask[:, None, None]

    def attend(*arrays):
        return attend_by(dot_product_attention)(*arrays, mask=mask, scale=scale)

    assert calls(attend, *arrays) == 1
    expected = dot_product_attention(*arrays, mask=mask, scale=scale)
    got = jax.jit(attend)(*arrays)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        ({"queries": 2}, {}),
        ({"size": 24}, {}),
        ({}, {"bias": jnp.zeros((1, 1, 1, 21))}),
        ({}, {"attn_logits_soft_cap": 5.0}),
        ({}, {"is_causal": True}),
        ({}, {"mask": jnp.ones((1, 6, 1, 21), bool)}),
    ],
)
def test_what_it_is_not_made_for_goes_to_keras(shapes, options):
    arrays = inputs(**shapes)

    def attend(*arrays):
        return attend_by(dot_product_attention)(*arrays, **options)

    assert calls(attend, *arrays) == 0
    np.testing.assert_array_equal(
        attend(*arrays), dot_product_attention(*arrays, **options)
    )


def test_other_types_go_to_keras():
    arrays = [x.astype("bfloat16") for x in inputs()]
    assert calls(attend_by(dot_product_attention), *arrays) == 0
