"""A traced function of arrays, rewritten to run faster with the same result.

- A language model's step splits its cache of keys and values by layers, and
  stacks the results into the next cache. This copies the whole cache for each
  token, although only one place is new. Here a stack stays a `Stack` of its
  parts while the function does nothing else with it.
- Values that depend on no argument, such as the cosines and sines of positions,
  are computed once, during the trace. XLA would compute them anew in each
  layer, for each head.
- An attention is computed by the kernel of `backend.jax.attention`.
- Products of one input with several packed kernels and int8 activations become
  one call. It rounds the input once and wakes the threads once.
"""

import collections
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from keras_weightmods.backend import xla_products
from keras_weightmods.backend.jax import attention
from keras_weightmods.backend.stack import Stack, whole

# The most entries of a constant; larger ones are computed at run time.
_LARGEST_CONSTANT = 2**20


jax.tree_util.register_dataclass(
    Stack, data_fields=["parts"], meta_fields=["axis"]
)


def call(function, *args, key_shape=None):
    """Call a function of arrays on arrays and stacks.

    Args:
        function: Takes arrays, and returns a nest of arrays. It is traced.
        *args: Arrays, and stacks in the place of some.
        key_shape: Tuple (places, key heads, size), the shape of the keys whose
            attention the kernel computes; None for none.

    Returns:
        What the function returns, with a stack for each array that it stacked.
    """
    shapes = [jax.ShapeDtypeStruct(x.shape, _dtype(x)) for x in args]
    traced, result = jax.make_jaxpr(function, return_shape=True)(*shapes)
    run = _Run(key_shape)
    results = run(traced.jaxpr, traced.consts, args)
    return jax.tree.unflatten(jax.tree.structure(result), results)


def _dtype(x):
    return jnp.result_type(jax.tree.leaves(x)[0])


class _Run:
    """Evaluates the equations of a trace."""

    def __init__(self, key_shape):
        self.key_shape = key_shape
        # Keep equal constants once: most layers have the same ones.
        self.constants: dict[Any, Any] = {}

    def __call__(self, jaxpr, consts, args):
        known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args]))
        pairs = zip(jaxpr.constvars, consts)
        fixed = {v for v, x in pairs if not isinstance(x, jax.core.Tracer)}
        shape = self.key_shape
        attentions = attention.calls_in(jaxpr, shape) if shape else {}

        def value(atom):
            return atom.val if isinstance(atom, core.Literal) else known[atom]

        equations = _needed(jaxpr, attentions)
        shared = _shared_products(jaxpr, equations)
        for equation in equations:
            out = equation.outvars[0]
            if out in known:
                continue
            if out in shared:
                x = whole(value(equation.invars[0]))
                arrays = [value(a) for e in shared[out] for a in e.invars[1:]]
                outs = [e.outvars[0] for e in shared[out]]
                products = _products(x, arrays, outs)
                known.update(zip(outs, products))
                continue
            if out in attentions:
                *given, scale = attentions[out]
                q, k, v, mask = (x and whole(value(x)) for x in given)
                known[out] = attention.result(q, k, v, mask, scale)
                continue
            values = list(map(value, equation.invars))
            has_stack = any(isinstance(x, Stack) for x in values)
            if _is_constant(equation, fixed):
                results = self.constant(equation, values)
                fixed.update(equation.outvars)
            elif (stack := _stack_of(equation, values)) is not None:
                results = [stack]
            elif has_stack and equation.primitive.name in ("jit", "pjit"):
                inner = equation.params["jaxpr"]
                results = self(inner.jaxpr, inner.consts, values)
            else:
                results = _evaluated(equation, map(whole, values))
            known.update(zip(equation.outvars, results))
        return list(map(value, jaxpr.outvars))

    def constant(self, equation, values):
        names = [id(x) if jnp.shape(x) else str(x) for x in values]
        key = equation.primitive, str(equation.params), *names
        if key not in self.constants:
            with jax.ensure_compile_time_eval():
                # Hold the values too, so that no others get their ids.
                self.constants[key] = values, _evaluated(equation, values)
        return self.constants[key][1]


def _is_constant(equation, fixed):
    inputs = [x for x in equation.invars if not isinstance(x, core.Literal)]
    sizes = [out.aval.size for out in equation.outvars]
    is_small = max(sizes, default=0) <= _LARGEST_CONSTANT
    return is_small and not equation.effects and fixed.issuperset(inputs)


def _needed(jaxpr, attentions):
    """Return the equations that the results depend on."""
    needed = {x for x in jaxpr.outvars if not isinstance(x, core.Literal)}
    found = []
    for equation in reversed(jaxpr.eqns):
        out = equation.outvars[0] if equation.outvars else None
        if equation.effects or needed.intersection(equation.outvars):
            inputs = attentions.get(out, equation.invars)
            needed.update(x for x in inputs if isinstance(x, core.Var))
            found.append(equation)
    return found[::-1]


def _shared_products(jaxpr, equations):
    """Return {result of the first: equations of products with the same input}.

    These are products of `xla_products` with int8 activations.
    """
    known = {*jaxpr.constvars, *jaxpr.invars}
    found = collections.defaultdict(list)
    for equation in equations:
        inner = equation.params.get("call_jaxpr")
        calls = inner.jaxpr.eqns if isinstance(inner, core.ClosedJaxpr) else ()
        if any(e.params.get("target_name") == xla_products.INT8 for e in calls):
            x, *arrays = equation.invars
            # The first product needs them.
            if all(isinstance(a, core.Literal) or a in known for a in arrays):
                # One call takes matrices of all types, but 2:4 ones of one
                # alone.
                values, meta = (a.aval for a in arrays[:2])
                found[x, meta.ndim == 3 and values.dtype].append(equation)
    return {
        group[0].outvars[0]: group for group in found.values() if len(group) > 1
    }


def _products(x, arrays, outs):
    """Return the products by several kernels, in one call."""
    results = [jax.ShapeDtypeStruct(out.aval.shape, "float32") for out in outs]
    call = jax.ffi.ffi_call(xla_products.INT8, results)
    products = call(x.astype("float32"), *arrays)
    return [y.astype(out.aval.dtype) for y, out in zip(products, outs)]


def _evaluated(equation, values):
    primitive = equation.primitive
    bound = primitive.get_bind_params(equation.params)
    # Before jax 0.10 a pair, with functions that are arguments.
    functions, params = bound if isinstance(bound, tuple) else ((), bound)
    results = primitive.bind(*functions, *values, **params)
    return results if primitive.multiple_results else [results]


def _stack_of(equation, values):
    """Return the result of an equation if it is a stack or a part of one."""
    name, params = equation.primitive.name, equation.params
    x: Any = values[0] if values else None
    if name == "stack":
        return Stack(params["axis"], values)
    shape = equation.outvars[0].aval.shape
    if name == "broadcast_in_dim" and jnp.shape(x):
        # It adds an axis of one entry.
        new = {*range(len(shape))} - {*params["broadcast_dimensions"]}
        stack = Stack(min(new, default=0), [x])
        return stack if stack.shape == shape else None
    if not isinstance(x, Stack):
        return None
    axis, parts = x.axis, x.parts
    if name == "concatenate" and params["dimension"] == axis:
        if all(isinstance(v, Stack) and v.axis == axis for v in values):
            return Stack(axis, [part for v in values for part in v.parts])
    elif name == "squeeze" and tuple(params["dimensions"]) == (axis,):
        return parts[0]
    elif name == "slice":
        step = params["strides"][axis] if params["strides"] else 1
        first, last = params["start_indices"], params["limit_indices"]
        cut = Stack(axis, parts[first[axis] : last[axis] : step])
        # Along its own axis alone.
        return cut if cut.parts and cut.shape == shape else None
    return None
