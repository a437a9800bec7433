"""The compiled kernels as XLA custom calls on the CPU."""

import functools

import jax

from keras_weightmods.ops import native

_TARGETS = (
    "kwm_xla_matmul",
    "kwm_xla_matmul_transposed",
    "kwm_xla_values_gradient",
    "kwm_xla_compand",
    "kwm_xla_compand_gradient",
)


def why_not():
    """Why there are none on the CPU; empty if there are."""
    if not native.is_available():
        return native.why_not()
    return "" if _register() else native.NO_XLA


@functools.cache
def _register():
    """Registers the handlers; False if the library has none."""
    if native.xla_handler(_TARGETS[0]) is None:
        return False
    # Registered before the backend is there, a handler that XLA refuses would
    # end the process.
    jax.devices("cpu")
    for name in _TARGETS:
        handler = jax.ffi.pycapsule(native.xla_handler(name))
        jax.ffi.register_ffi_target(name, handler, platform="cpu")
    return True
