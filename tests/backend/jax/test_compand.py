import keras
import numpy as np
import pytest

import keras_weightmods as kwm
from keras_weightmods.backend import backend_module
from keras_weightmods.ops import compand

if keras.backend.backend() != "jax":
    pytest.skip("needs JAX", allow_module_level=True)

import jax
import jax.numpy as jnp


@pytest.fixture
def arrays():
    v = jnp.float32(np.random.default_rng(0).normal(size=(6, 5)))
    if not backend_module("compand").is_native(v):
        pytest.skip("no compiled kernels")
    return v, jnp.linspace(0.5, 1.0, 6), jnp.linspace(1.0, 2.0, 6)


def loss(v, a, b, training=True):
    return jnp.sum(jnp.sin(compand(v, a, b, training=training)))


gradients = jax.grad(loss, (0, 1, 2))


@pytest.mark.parametrize("axes", [(0, None, None), (0, 0, 0), (None, 0, None)])
def test_vmap(axes, arrays):
    arguments = [
        x if axis == 0 or i == 0 else x[0]
        for i, (x, axis) in enumerate(zip(arrays, axes))
    ]
    found = jax.jit(jax.vmap(gradients, axes))(*arguments)
    for row in range(6):
        one = [x[row] if axis == 0 else x for x, axis in zip(arguments, axes)]
        for got, expected in zip(found, gradients(*one)):
            np.testing.assert_allclose(got[row], expected, rtol=1e-5, atol=1e-6)


def test_third_derivatives(arrays):
    def norm(function):
        return lambda x: jnp.sum(jax.grad(function)(x) ** 2)

    def third(v, training):
        return jax.grad(norm(norm(lambda v: loss(v, 0.7, 1.3, training))))(v)

    expected = third(arrays[0], False)
    np.testing.assert_allclose(
        third(arrays[0], True), expected, rtol=1e-4, atol=1e-4
    )


def test_shard_map(arrays):
    v = arrays[0]
    mesh = jax.make_mesh((1,), ("x",), (jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("x")
    fixed = jax.grad(lambda v: loss(v, 0.5, 1.0))
    mapped = jax.shard_map(fixed, mesh=mesh, in_specs=(spec,), out_specs=spec)
    np.testing.assert_allclose(mapped(v), fixed(v), rtol=1e-5, atol=1e-6)


def test_inference_can_be_exported():
    model = keras.Sequential([keras.Input((6,)), kwm.CompanderDense(4)])
    x = jnp.ones((2, 6))
    # An error where there is a custom call that XLA does not know.
    exported = jax.export.export(jax.jit(lambda x: model(x)))(x)
    np.testing.assert_allclose(exported.call(x), model(x), rtol=1e-6)


def test_where_jax_has_no_cpu(monkeypatch):
    """As with JAX_PLATFORMS=cuda."""

    def devices(platform=None):
        raise RuntimeError("Unknown backend cpu")

    monkeypatch.setattr(jax, "devices", devices)
    assert not backend_module("compand").is_native(jnp.ones(3))
