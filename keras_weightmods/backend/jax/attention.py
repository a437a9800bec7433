"""The attention of one query of each sequence, by a compiled kernel on a CPU.

XLA takes keys and values into another order for it, all places of the cache,
and then ten operations. The kernel reads the places that are seen, once.
"""

import jax
import jax.numpy as jnp
import numpy as np

from keras_weightmods import native
from keras_weightmods.backend.jax import xla_handlers


def attend(query, key, value, bias=None, mask=None, scale=None, **options):
    """Return what Keras' `dot_product_attention` does, or None.

    Args:
        query: Array of shape (batch, 1, heads, size).
        key, value: Arrays of shape (batch, places, key heads, size).
        bias, mask, scale, **options: As in Keras; None for what the kernel
            is not made for.
    """
    if bias is not None or any(options.values()):
        return None
    seen = _seen(query, key, mask)
    if seen is None or not _fits(query, key, value):
        return None
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    result = jax.ShapeDtypeStruct(query.shape, query.dtype)
    call = jax.ffi.ffi_call("kwm_xla_attend", result)
    return call(query, key, value, seen, scale=np.float32(scale))


def _fits(query, key, value):
    return (
        query.ndim == key.ndim == 4
        and query.shape[1] == 1
        and query.dtype == key.dtype == value.dtype == jnp.float32
        and key.shape == value.shape
        and query.shape[-1] == key.shape[-1]
        and query.shape[-1] % native.LANES == 0
        and query.shape[2] % key.shape[2] == 0
        and jax.default_backend() == "cpu"
        # XLA cannot split a custom call over devices.
        and len(xla_handlers.cpu_devices()) == 1
        and not xla_handlers.reason_unavailable()
        and native.has_vectors()
    )


def _seen(query, key, mask):
    """A mask of shape (batch, places), the same for all heads; else None."""
    shape = query.shape[0], key.shape[1]
    if mask is None:
        return jnp.ones(shape, bool)
    if mask.ndim != 4 or mask.shape[1:3] != (1, 1) or mask.dtype != bool:
        return None
    return jnp.broadcast_to(mask[:, 0, 0], shape)
