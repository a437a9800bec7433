"""The kernel of `backend.attention` on JAX: a custom call.

A model's function is traced. So is a call of `keras.ops.dot_product_attention`
alone, with the installed Keras and JAX. Where the equations of that call occur
in the model's trace, the kernel takes their place.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from keras import ops

from keras_weightmods.backend import attention
from keras_weightmods.backend.jax import xla_calls

# Stands for the scale of an attention. Any other number would do.
_SCALE = 0.0123456789


def kernel(query, key, value, mask, scale):
    """See `attend` of `backend.attention`."""
    if (
        jax.default_backend() != "cpu"
        # XLA cannot split a custom call over devices.
        or len(xla_calls.cpu_devices()) != 1
        or xla_calls.reason_unavailable()
    ):
        return None
    if mask is None:
        mask = jnp.ones((*query.shape[:2], key.shape[1]), bool)
    given = *(x.astype("float32") for x in (query, key, value)), mask
    call = functools.partial(xla_calls.call, "kwm_xla_attend", query.shape)
    return call(*given, scale=np.float32(scale)).astype(query.dtype)


def result(query, key, value, mask, scale):
    """Return that of a call which `calls_in` has found."""
    if mask is None or mask.ndim == 4:
        mask = mask if mask is None else mask[:, 0]
        return kernel(query, key, value, mask, scale)
    # Where nothing is attended to, the kernel gives the mean.
    attends = mask.any(-1)[:, :, None, None]
    return kernel(query, key, value, mask, scale) * attends


def calls_in(jaxpr, key_shape):
    """Find the attentions in a traced function that the kernel can compute.

    Args:
        jaxpr: `jax.extend.core.Jaxpr`.
        key_shape: Tuple (places, key heads, size) of the keys in a cache.

    Returns:
        Dict from the variable of a result to the variables of query, key,
        value and mask, or None, with the keys not repeated, and the scale. The
        mask has the axes batch, queries and places, or a second one of size 1.
    """
    producers = _producers(jaxpr)
    found = {}
    for out in producers:
        shape = getattr(out.aval, "shape", ())
        if len(shape) != 4 or shape[3] != key_shape[2]:
            continue
        for template in _templates(shape, key_shape, out.aval.dtype):
            known, scales = _matched(template, producers, out)
            if len(scales) == 1:
                inputs = [known.get(x) for x in template.invars]
                query, key, value, mask = *inputs, *[None] * (4 - len(inputs))
                found[out] = query, key, value, mask, *scales
                break
    return found


@functools.lru_cache(maxsize=64)
def _templates(query_shape, key_shape, dtype):
    """Return the traces of an attention, as models call it."""
    batch, queries, heads, _ = query_shape
    places, key_heads, _ = key_shape
    query = jax.ShapeDtypeStruct(query_shape, dtype)
    key = jax.ShapeDtypeStruct((batch, *key_shape), dtype)
    mask = jax.ShapeDtypeStruct((batch, 1, queries, places), bool)
    # None where the kernel does not apply.
    is_possible = jax.eval_shape(
        lambda *inputs: attention.attend(kernel, *inputs), query, key, key
    )
    found: list[Any] = []
    if is_possible is None:
        return found
    group = heads // key_heads
    for masks in ([mask], []):
        for repeats in dict.fromkeys([group, 1]):

            def call(query, key, value, mask=None, repeats=repeats):
                if repeats > 1:
                    key = ops.repeat(key, repeats, axis=2)
                    value = ops.repeat(value, repeats, axis=2)
                return ops.dot_product_attention(
                    query, key, value, mask=mask, scale=_SCALE
                )

            traced = jax.make_jaxpr(call)(query, key, key, *masks)
            found.append(traced.jaxpr)

    def by_groups(query, key, value, mask):
        mask = mask[:, None, None]
        return attention.by_groups(query, key, value, mask, _SCALE)

    mask = jax.ShapeDtypeStruct((batch, queries, places), bool)
    found.append(jax.make_jaxpr(by_groups)(query, key, key, mask).jaxpr)
    return found


def _producers(jaxpr):
    return {
        out: (equation, i)
        for equation in jaxpr.eqns
        for i, out in enumerate(equation.outvars)
    }


def _matched(template, producers, out):
    """Match a variable with the result of a template.

    Returns:
        Dict from variables of the template to those that they are, and the set
        of the numbers in the place of `_SCALE`, empty where they differ.
    """
    made = _producers(template)
    known: dict[Any, Any] = {}
    scales: set[float] = set()

    def is_same(expected, x):
        is_literal = isinstance(expected, core.Literal)
        if (
            is_literal is not isinstance(x, core.Literal)
            or expected.aval.shape != x.aval.shape
            or expected.aval.dtype != x.aval.dtype
        ):
            return False
        if is_literal:
            return is_number(expected, x)
        if expected in made and expected not in known:
            equation, place = made[expected]
            other, other_place = producers.get(x, (None, None))
            if (
                other is None
                or place != other_place
                or equation.primitive is not other.primitive
                or len(equation.invars) != len(other.invars)
                or str(equation.params) != str(other.params)
                or not all(map(is_same, equation.invars, other.invars))
            ):
                return False
        return known.setdefault(expected, x) is x

    def is_number(expected, x):
        dtype = expected.aval.dtype
        number = np.asarray(expected.val, dtype)
        is_float = jnp.issubdtype(dtype, jnp.floating)
        if is_float and number == np.asarray(_SCALE, dtype):
            scales.add(float(x.val))
            return True
        return bool(number == x.val)

    same = is_same(template.outvars[0], out)
    return known, scales if same else set()
