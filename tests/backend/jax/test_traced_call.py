import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest

from keras_weightmods.backend.jax import traced_call
from keras_weightmods.backend.stack import Stack, split_like, whole

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="needs the JAX backend"
)


def step(x, cache, place):
    layers = []
    for i in range(cache.shape[1]):
        keys, values = cache[:, i][:, 0], cache[:, i][:, 1]
        keys = jax.lax.dynamic_update_slice(keys, x[:, None], (0, place, 0))
        values = jax.nn.relu(values) + i
        x = x + keys.sum(1) * values.mean(1)
        layers.append(jnp.stack([keys, values], axis=1))
    return x, jnp.stack(layers, axis=1)


def arrays():
    rng = np.random.default_rng(0)
    cache = rng.normal(size=(2, 3, 2, 5, 4)).astype("float32")
    return jnp.ones((2, 4)), jnp.array(cache), jnp.int32(2)


def test_a_cache_in_parts_gives_the_same():
    x, cache, place = arrays()
    expected, expected_cache = step(x, cache, place)
    _, parts = traced_call.call(step, x, cache, place)
    assert isinstance(parts, Stack)
    assert parts.shape == cache.shape
    assert all(isinstance(part, Stack) for part in parts.parts)
    cache = split_like(cache, parts)
    # Stacks go through `jit` as nests of arrays.
    y, parts = jax.jit(lambda *args: traced_call.call(step, *args))(
        x, cache, place
    )
    np.testing.assert_allclose(y, expected, rtol=1e-6)
    np.testing.assert_allclose(whole(parts), expected_cache, rtol=1e-6)
    assert jax.tree.structure(parts) == jax.tree.structure(cache)
    # Nothing whole is made.
    traced = jax.make_jaxpr(lambda *args: traced_call.call(step, *args))(
        x, cache, place
    )
    sizes = [v.aval.size for e in traced.jaxpr.eqns for v in e.outvars]
    assert max(sizes) == 2 * 5 * 4


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x[:, 1:].sum(1),
        lambda x: x[:, :, 0],
        lambda x: x[:, ::2],
        lambda x: jnp.concatenate([x, x], axis=1) + 1,
        lambda x: jnp.concatenate([x, x], axis=2),
        lambda x: jnp.expand_dims(x[:, 0], 1) * 2,
        lambda x: jnp.broadcast_to(x[:, :1], (2, 3, 4)),
        jnp.sin,
    ],
)
def test_what_is_no_stack_is_made_whole(function):
    x = jnp.arange(24.0).reshape(2, 3, 4)
    stack = split_like(x, Stack(1, [x[:, i] for i in range(3)]))
    found = traced_call.call(function, stack)
    np.testing.assert_array_equal(whole(found), function(x))


def test_what_depends_on_no_argument_is_computed_once():
    def function(x, place):
        layers = []
        for _ in range(2):
            turned = jnp.cos(jnp.arange(5.0) * 3)[None]
            layers.append(x * turned + jnp.sin(jnp.arange(5.0) + place))
        return layers

    def run(x, place):
        return traced_call.call(function, x, place)

    x, place = jnp.ones((3, 5)), jnp.float32(2)
    traced = jax.make_jaxpr(run)(x, place)
    assert " cos " not in str(traced)
    assert str(traced).count(" sin ") == 2
    assert [c.shape for c in traced.consts].count((1, 5)) == 1
    jax.tree.map(
        np.testing.assert_allclose, jax.jit(run)(x, place), function(x, place)
    )
