"""The kernel of `backend.attention` on JAX: a custom call."""

import jax
import jax.numpy as jnp
import numpy as np

from keras_weightmods.backend.jax import xla_handlers


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
