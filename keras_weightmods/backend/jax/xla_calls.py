"""Compiled kernels as XLA custom calls on the CPU."""

import functools

import jax

from keras_weightmods import native


def reason_unavailable():
    """Return why the CPU has none; empty if it has."""
    if reason := native.reason_without_xla():
        return reason
    return "" if _register() else "JAX_PLATFORMS leaves out the CPU."


def cpu_devices():
    """Return JAX's CPU devices, none if JAX_PLATFORMS excludes them."""
    try:
        return jax.devices("cpu")
    except RuntimeError:
        return []


@functools.cache
def _register():
    """Register the handlers; False if that cannot be."""
    # Start the backend first: without it, a handler that XLA refuses would end
    # the process.
    if not cpu_devices():
        return False
    for name in native.XLA_TARGETS:
        handler = jax.ffi.pycapsule(native.xla_handler(name))
        jax.ffi.register_ffi_target(name, handler, platform="cpu")
    return True


def call(target, shape, *arguments, **attributes):
    """Return the result of a custom call, of the type of its first argument."""
    result = jax.ShapeDtypeStruct(shape, arguments[0].dtype)
    made = jax.ffi.ffi_call(target, result, vmap_method="sequential")
    return made(*arguments, **attributes)


def with_gradient(function, gradient):
    """Return a function of arrays that has this gradient."""
    call = jax.custom_vjp(function)
    call.defvjp(
        lambda *inputs: (call(*inputs), inputs),
        lambda inputs, dy: gradient(*inputs, dy),
    )
    return call
