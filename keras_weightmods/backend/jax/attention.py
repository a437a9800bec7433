"""The kernel of `backend.attention` on JAX: a custom call.

A function of a model is traced, and in its equations those of a call of
`keras.ops.dot_product_attention` are looked for: as they come where that call
alone is traced, with whatever versions of Keras and JAX are there.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from keras import ops

from keras_weightmods.backend import attention
from keras_weightmods.backend.jax import xla_handlers

# Stands for the scale of an attention; as good as any other number.
_SCALE = 0.0123456789


def kernel(query, key, value, mask, scale):
    """See `attend` of `backend.attention`."""
    if (
        jax.default_backend() != "cpu"
        # XLA cannot split a custom call over devices.
        or len(xla_handlers.cpu_devices()) != 1
        or xla_handlers.reason_unavailable()
    ):
        return None
    if mask is None:
        mask = jnp.ones((*query.shape[:2], key.shape[1]), bool)
    result = jax.ShapeDtypeStruct(query.shape, "float32")
    call = jax.ffi.ffi_call("kwm_xla_attend", result)
    floats = (x.astype("float32") for x in (query, key, value))
    return call(*floats, mask, scale=np.float32(scale)).astype(query.dtype)


def calls_in(jaxpr, key_shape):
    """Find the attentions in a traced function that the kernel can compute.

    Args:
        jaxpr: `jax.extend.core.Jaxpr`.
        key_shape: Tuple (places, key heads, size) of the keys in a cache.

    Returns:
        Dict from the variable of a result to the variables of query, key,
        value and mask, or None, with the keys not repeated, and the scale.
    """
    producers = _producers(jaxpr)
    found = {}
    for out, (equation, _) in producers.items():
        shape = getattr(out.aval, "shape", ())
        if len(shape) != 4 or shape[3] != key_shape[2]:
            continue
        for template in _templates(shape, key_shape, out.aval.dtype):
            if equation.primitive is not template.eqns[-1].primitive:
                continue
            match = _Match(_producers(template), producers)
            if match.is_same(template.outvars[0], out):
                inputs = [match.known.get(x) for x in template.invars]
                query, key, value, *mask = inputs
                arguments = query, key, value, mask[0] if mask else None
                found[out] = (*arguments, match.scale)
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
    # None for what the kernel is not made for.
    is_possible = jax.eval_shape(
        lambda *inputs: attention.attend(kernel, *inputs), query, key, key
    )
    found: list[Any] = []
    for masks in ([mask], []) if is_possible is not None else ():
        for repeats in dict.fromkeys([heads // key_heads, 1]):

            def call(query, key, value, mask=None, repeats=repeats):
                if repeats > 1:
                    key = ops.repeat(key, repeats, axis=2)
                    value = ops.repeat(value, repeats, axis=2)
                return ops.dot_product_attention(
                    query, key, value, mask=mask, scale=_SCALE
                )

            traced = jax.make_jaxpr(call)(query, key, key, *masks)
            found.append(traced.jaxpr)
    return found


def _producers(jaxpr):
    return {
        out: (equation, i)
        for equation in jaxpr.eqns
        for i, out in enumerate(equation.outvars)
    }


class _Match:
    """Whether a variable is computed as one of a template is.

    Attributes:
        known: Dict from variables of the template to those that they are.
        scale: Float, the number in the place of `_SCALE`.
    """

    def __init__(self, template, producers):
        self.template = template
        self.producers = producers
        self.known: dict[Any, Any] = {}
        self.scale = None

    def is_same(self, expected, x):
        if expected.aval.shape != x.aval.shape:
            return False
        if expected.aval.dtype != x.aval.dtype:
            return False
        if isinstance(expected, core.Literal) or isinstance(x, core.Literal):
            return self._is_same_number(expected, x)
        if expected in self.known:
            return self.known[expected] is x
        if expected in self.template:
            equation, place = self.template[expected]
            other, other_place = self.producers.get(x, (None, None))
            if (
                other is None
                or place != other_place
                or equation.primitive is not other.primitive
                or len(equation.invars) != len(other.invars)
                or str(equation.params) != str(other.params)
                or not all(map(self.is_same, equation.invars, other.invars))
            ):
                return False
        self.known[expected] = x
        return True

    def _is_same_number(self, expected, x):
        if not isinstance(expected, core.Literal):
            return False
        if not isinstance(x, core.Literal):
            return False
        dtype = np.asarray(expected.val).dtype
        numbers = (expected.val, x.val, _SCALE)
        expected, x, stand_in = (np.asarray(y, dtype) for y in numbers)
        is_float = jnp.issubdtype(expected.dtype, jnp.floating)
        if not is_float or expected != stand_in:
            return bool(expected == x)
        is_first = self.scale is None
        self.scale = float(x) if is_first else self.scale
        return is_first or self.scale == float(x)
