"""`sparse_matmul` on JAX: custom calls, with gradients and a rule for `vmap`.

Eager, under `jit`, `grad` and `vmap`. XLA's thread pool shares the work. XLA
cannot split a custom call by itself: `column_parallel_matmul` does.
"""

import functools

import jax
import jax.numpy as jnp
import keras

from keras_weightmods.backend.jax import sparse_matmul_gpu, xla_handlers
from keras_weightmods.backend.jax.batching import batches_as_rows
from keras_weightmods.native.packed import (
    Packed,
    dense_matmul,
    unpack_tensor,
)


def reason_unavailable():
    """Return why the compiled kernels cannot be used; empty if they can."""
    if jax.default_backend() == "gpu":
        return ""
    return xla_handlers.reason_unavailable()


def sparse_matmul(x, packed):
    """See `keras_weightmods.ops.sparse_matmul`."""
    platform = jax.default_backend()
    if platform == "cpu":
        return _sparse_matmul_on_cpu(x, packed)
    # Arrays may be placed on the CPU of a machine with a GPU too.
    choices = {"default": dense_matmul}
    if not xla_handlers.reason_unavailable():
        choices["cpu"] = _sparse_matmul_on_cpu
    if platform == "gpu" and not _for_cpu_alone(packed):
        choices["cuda"] = sparse_matmul_gpu.matmul
    choices = {
        name: functools.partial(choice, packed=packed)
        for name, choice in choices.items()
    }
    return jax.lax.platform_dependent(x, **choices)


def _for_cpu_alone(packed):
    return packed.activations == "int8" or packed.dtype == "int4"


def _sparse_matmul_on_cpu(x, packed):
    values, meta, scale = _arrays(packed)
    n = packed.shape[1]
    return _multiply(x, values, meta, scale, n, packed.activations)


def _arrays(packed):
    """Return values, meta and scale, empty where there is none."""
    arrays = packed.values, packed.meta, packed.scale
    missing = None, jnp.zeros((0,), jnp.int32), _no_scale()
    return tuple(
        none if array is None else keras.ops.convert_to_tensor(array)
        for array, none in zip(arrays, missing)
    )


def _no_scale():
    return jnp.zeros((0,), jnp.float32)


def _multiply(x, values, meta, scale, n, activations):
    weights = values, meta, scale
    if activations == "int8":
        y = _matmul_int8(x.astype(jnp.float32), *weights, n)
    else:
        y = _matmul(x.astype(jnp.float32), *weights, n, False)
    return y.astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _matmul(x, values, meta, scale, size, transposed):
    """By the kernel or its transpose; `size` entries in the last axis."""
    target = "kwm_xla_matmul_transposed" if transposed else "kwm_xla_matmul"
    return _call(target, size)(x, values, meta, scale)


def _matmul_forward(x, values, meta, scale, size, transposed):
    y = _matmul(x, values, meta, scale, size, transposed)
    return y, (x, values, meta, scale)


def _matmul_backward(size, transposed, saved, dy):
    x, values, meta, scale = saved
    dx = _matmul(dy, values, meta, scale, x.shape[-1], not transposed)
    # XLA drops the call if nobody asks for its result.
    dvalues = None
    if values.dtype == jnp.float32:
        pair = (dy, x) if transposed else (x, dy)
        dvalues = _values_gradient(*pair, meta)
    return dx, dvalues, None, None


_matmul.defvjp(_matmul_forward, _matmul_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _matmul_int8(x, values, meta, scale, n):
    """By int8 activations; an empty meta, in one axis, is a dense matrix."""
    return _call("kwm_xla_matmul_int8", n)(x, values, meta, scale)


def _matmul_int8_forward(x, values, meta, scale, n):
    y = _matmul_int8(x, values, meta, scale, n)
    return y, (x.shape[-1], values, meta, scale)


def _matmul_int8_backward(n, saved, dy):
    k, values, meta, scale = saved
    if meta.ndim == 1:
        dtype = "int8" if values.dtype == jnp.int8 else "int4"
        packed = Packed(values, None, scale, (k, n), dtype, "int8")
        dx = dy @ unpack_tensor(packed).T
    else:
        dx = _matmul(dy, values, meta, scale, k, True)
    return dx, None, None, None


_matmul_int8.defvjp(_matmul_int8_forward, _matmul_int8_backward)


@jax.custom_vjp
def _values_gradient(x, dy, meta):
    blocks, rows, columns = meta.shape
    result = jax.ShapeDtypeStruct((blocks, 16 * rows, columns), jnp.float32)
    call = jax.ffi.ffi_call(
        "kwm_xla_values_gradient", result, vmap_method="sequential"
    )
    return call(x, dy, meta)


def _values_gradient_forward(x, dy, meta):
    return _values_gradient(x, dy, meta), (x, dy, meta)


def _values_gradient_backward(saved, ddvalues):
    x, dy, meta = saved
    weights = ddvalues, meta, _no_scale()
    dx = _matmul(dy, *weights, x.shape[-1], True)
    return dx, _matmul(x, *weights, dy.shape[-1], False), None


_values_gradient.defvjp(_values_gradient_forward, _values_gradient_backward)


@functools.cache
def _call(target, size):
    """The custom call with `size` entries in the last axis of its result."""

    def call(x, values, meta, scale):
        result = jax.ShapeDtypeStruct((*x.shape[:-1], size), jnp.float32)
        return jax.ffi.ffi_call(target, result)(x, values, meta, scale)

    return batches_as_rows(call)


def column_parallel_matmul(x, packed, mesh, axis_name):
    """`sparse_matmul` with the columns of the kernel split over devices.

    Each device multiplies by its own columns; no device receives another's
    weights or activations.

    Args:
        x: Float array of shape (..., K), the same on all devices of the axis.
        packed: `Packed` of a kernel of shape (K, N), N a multiple of 16 times
            the devices of the axis. Its arrays are split on their first axis.
        mesh: `jax.sharding.Mesh`.
        axis_name: String, the axis of the mesh.

    Returns:
        Array of shape (..., N), split on its last axis.

    Raises:
        ValueError: If the columns cannot be split so.
    """
    devices = mesh.shape[axis_name]
    n = packed.shape[1]
    if n % (16 * devices):
        raise ValueError(
            "The columns of a packed kernel are split in blocks of 16, as "
            f"many for each device. Received: {n} columns for {devices} "
            f"devices on the axis {axis_name!r}"
        )
    values, meta, scale = _arrays(packed)
    split = jax.sharding.PartitionSpec(axis_name)
    whole = jax.sharding.PartitionSpec()
    own_shape = packed.shape[0], n // devices

    def multiply(x, values, meta, scale):
        own = Packed(
            values,
            meta if meta.size else None,
            scale if scale.size else None,
            own_shape,
            packed.dtype,
            packed.activations,
        )
        # By the platform of the mesh, which need not be the default one.
        return sparse_matmul(x, own)

    split_columns = jax.shard_map(
        multiply,
        mesh=mesh,
        in_specs=(
            *(whole, split),
            *(whole if a.size == 0 else split for a in (meta, scale)),
        ),
        out_specs=jax.sharding.PartitionSpec(
            *(None,) * (x.ndim - 1), axis_name
        ),
        # Then the gradient of `x`, which is whole, is summed over the devices.
        check_vma=False,
    )
    return split_columns(x, values, meta, scale)
