"""`compand` on JAX in training: the compiled kernels on a CPU.

One pass over the kernel for each direction. XLA takes two more for each of the
gradients of a and b.
"""

import functools

import jax
import jax.numpy as jnp

from keras_weightmods import native
from keras_weightmods.backend.jax import xla_handlers


def is_native(v):
    """Return whether `compand` can be taken."""
    return (
        v.dtype == jnp.float32
        and native.has_vectors()
        # XLA cannot split a custom call over devices.
        and len(xla_handlers.cpu_devices()) == 1
        and not jax.sharding.get_abstract_mesh().manual_axes
        and not xla_handlers.reason_unavailable()
    )


def compand(v, a, b, forward, backward):
    """`a * arctan(v / b)`, float32.

    Args:
        v: Array.
        a, b: Arrays of shape ().
        forward, backward: The same by XLA, with the arguments `(v, a, b)` and
            `(v, w, upstream, a, b)`.
    """
    return _functions(forward, backward)(v, a, b)


@functools.cache
def _functions(forward, backward):
    @jax.custom_vjp
    def apply(v, a, b):
        call = jax.ffi.ffi_call(
            "kwm_xla_compand", _float32(v.shape), vmap_method="sequential"
        )
        return jax.lax.platform_dependent(v, a, b, cpu=call, default=forward)

    @jax.custom_vjp
    def differentiate(v, w, upstream, a, b):
        call = jax.ffi.ffi_call(
            "kwm_xla_compand_gradient",
            (_float32(v.shape), _float32(), _float32()),
            vmap_method="sequential",
            # The gradient of v in the place of that of w.
            input_output_aliases={2: 0},
        )
        arguments = v, w, upstream, a, b
        return jax.lax.platform_dependent(
            *arguments,
            cpu=lambda *arguments: tuple(call(*arguments)),
            default=backward,
        )

    def remember(v, a, b):
        w = apply(v, a, b)
        return w, (v, w, a, b)

    apply.defvjp(
        remember,
        lambda saved, upstream: differentiate(*saved[:2], upstream, *saved[2:]),
    )
    differentiate.defvjp(
        lambda *arguments: (differentiate(*arguments), arguments),
        lambda saved, upstreams: jax.vjp(backward, *saved)[1](upstreams),
    )
    return apply


def _float32(shape=()):
    return jax.ShapeDtypeStruct(shape, jnp.float32)
