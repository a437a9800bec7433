"""`sparse_matmul` on JAX: custom calls, on a CPU to the C++ kernels.

Eager, under `jit`, `grad` and `vmap`. XLA's thread pool shares the work. XLA
cannot split a custom call over devices by itself: `split_matmul` does.
"""

import functools

import jax
import jax.numpy as jnp
import keras

from keras_weightmods.backend import xla_products
from keras_weightmods.backend.jax import (
    layouts,
    sparse_matmul_gpu,
    xla_calls,
)
from keras_weightmods.native.layout import packed_arrays
from keras_weightmods.native.packed import Packed, dense_matmul


def reason_unavailable():
    """Return why the compiled kernels cannot be used; empty if they can."""
    if jax.default_backend() == "gpu":
        return ""
    return xla_calls.reason_unavailable()


def sparse_matmul(x, packed):
    """See `keras_weightmods.ops.sparse_matmul`."""
    platform = jax.default_backend()
    if platform == "gpu" and not isinstance(packed, layouts.SplitPacked):
        return sparse_matmul_gpu.matmul(x, packed)
    if platform != "cpu":
        # XLA can split this itself.
        return dense_matmul(x, packed)
    if isinstance(packed, layouts.SplitPacked):
        return split_matmul(x, packed)
    return xla_products.sparse_matmul(xla_calls, x, packed)


def split_matmul(x, packed):
    """`sparse_matmul` with a kernel that is split over devices.

    Each device multiplies by its own part of the kernel and receives no other
    weights. If the rows are split, the devices exchange a sum of outputs.

    Args:
        x: Float array of shape (..., K).
        packed: `SplitPacked` of a kernel of shape (K, N).

    Returns:
        Array of shape (..., N), its last axis split as the columns are.
    """
    split = packed.split
    about = packed.shape, packed.dtype, packed.pattern
    arrays = {
        name: keras.ops.convert_to_tensor(getattr(packed, name))
        for name in packed_arrays(*about)
    }
    batch = layouts.batch_axis(x, split)
    call = _split_call(split, batch, x.ndim, *about, packed.activations)
    return call(x.astype(jnp.float32), arrays).astype(x.dtype)


@functools.cache
def _split_call(split, batch, rank, shape, dtype, pattern, activations):
    sides = split.parts("rows"), split.parts("columns")
    own_shape = shape[0] // sides[0], shape[1] // sides[1]
    options = {"dtype": dtype, "activations": activations}

    def multiply(x, arrays):
        arrays = {"meta": None, "scale": None, **arrays}
        y = sparse_matmul(x, Packed(**arrays, shape=own_shape, **options))
        return jax.lax.psum(y, split.rows) if split.rows else y

    spec = jax.sharding.PartitionSpec
    leading = (batch, *(None,) * (rank - 2)) if rank > 1 else ()
    specs = split.specs(packed_arrays(shape, dtype, pattern))
    mapped = jax.shard_map(
        multiply,
        mesh=split.mesh,
        in_specs=(spec(*leading, split.rows or None), specs),
        out_specs=spec(*leading, split.columns or None),
        # Gradients of unsplit tensors are then summed over the devices.
        check_vma=False,
    )
    return jax.jit(mapped)
