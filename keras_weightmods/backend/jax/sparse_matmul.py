"""`sparse_matmul` on JAX: custom calls, with gradients and a rule for `vmap`.

Eager, under `jit`, `grad` and `vmap`. XLA's thread pool shares the work. XLA
cannot split a custom call over devices by itself: `split_matmul` does.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import keras

from keras_weightmods.backend.jax import (
    layouts,
    shared_inputs,
    sparse_matmul_gpu,
    xla_handlers,
)
from keras_weightmods.backend.jax.batching import batches_as_rows
from keras_weightmods.native.layout import packed_arrays
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
    if isinstance(packed, layouts.SplitPacked):
        # What XLA can split itself, where the kernels are not for the CPU.
        split = split_matmul if platform == "cpu" else dense_matmul
        return split(x, packed)
    if platform == "cpu":
        return _sparse_matmul_on_cpu(x, packed)
    # Arrays may be placed on the CPU of a machine with a GPU too.
    choices = {"default": dense_matmul}
    if not xla_handlers.reason_unavailable():
        choices["cpu"] = _sparse_matmul_on_cpu
    if platform == "gpu":
        choices["cuda"] = sparse_matmul_gpu.matmul
    choices = {
        name: functools.partial(choice, packed=packed)
        for name, choice in choices.items()
    }
    return jax.lax.platform_dependent(x, **choices)


def _sparse_matmul_on_cpu(x, packed):
    if packed.activations == "int8":
        return shared_inputs.watched_product(x, packed, _matmul_int8_many)
    values, meta, scale = _arrays(packed)
    is_bfloat16 = x.dtype == values.dtype == jnp.bfloat16
    given = x if is_bfloat16 else x.astype(jnp.float32)
    y = _matmul(given, values, meta, scale, packed.shape[1], False)
    return y.astype(x.dtype)


def _matmul_int8_many(x, kernels):
    """The products with several kernels; gradients with one alone."""
    arrays = [_arrays(packed) for packed in kernels]
    sizes = [packed.shape[1] for packed in kernels]
    given = x.astype(jnp.float32)
    if len(kernels) == 1:
        products = [_matmul_int8(given, *arrays[0], sizes[0])]
    else:
        results = [
            jax.ShapeDtypeStruct((*x.shape[:-1], size), jnp.float32)
            for size in sizes
        ]
        call = jax.ffi.ffi_call("kwm_xla_matmul_int8", results)
        products = list(call(given, *itertools.chain(*arrays)))
    return [y.astype(x.dtype) for y in products]


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _matmul(x, values, meta, scale, size, transposed):
    """By the kernel or its transpose; `size` entries in the last axis."""
    if x.dtype == jnp.bfloat16:
        return _call("kwm_xla_matmul_bfloat16", size)(x, values, meta)
    target = "kwm_xla_matmul_transposed" if transposed else "kwm_xla_matmul"
    return _call(target, size)(x, values, meta, scale)


def _matmul_forward(x, values, meta, scale, size, transposed):
    y = _matmul(x, values, meta, scale, size, transposed)
    return y, (x, values, meta, scale)


def _matmul_backward(size, transposed, saved, dy):
    x, values, meta, scale = saved
    given = dy.astype(jnp.float32)
    dx = _matmul(given, values, meta, scale, x.shape[-1], not transposed)
    dx = dx.astype(dy.dtype)
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

    def call(x, *weights):
        result = jax.ShapeDtypeStruct((*x.shape[:-1], size), x.dtype)
        return jax.ffi.ffi_call(target, result)(x, *weights)

    return batches_as_rows(call)


def split_matmul(x, packed):
    """`sparse_matmul` by a kernel that is split over devices.

    Each device multiplies by its own part of the kernel; no device receives
    another's weights. With the rows split, what is exchanged is a sum of
    outputs.

    Args:
        x: Float array of shape (..., K).
        packed: `SplitPacked` of a kernel of shape (K, N).

    Returns:
        Array of shape (..., N), its last axis split as the columns are.
    """
    split = packed.split
    batch = layouts.batch_axis(x, split)
    names = tuple(n for n in _NAMES if getattr(packed, n) is not None)
    call = _split_call(
        split, batch, x.ndim, packed.shape, packed.dtype, names,
        packed.activations,
    )  # fmt: skip
    arrays = [keras.ops.convert_to_tensor(getattr(packed, n)) for n in names]
    return call(x.astype(jnp.float32), *arrays).astype(x.dtype)


_NAMES = ("values", "meta", "scale")


@functools.cache
def _split_call(split, batch, rank, shape, dtype, names, activations):
    arrays = packed_arrays(shape, dtype, is_dense="meta" not in names)
    specs = split.specs(arrays)
    own_shape = (
        shape[0] // split.parts("rows"),
        shape[1] // split.parts("columns"),
    )

    def multiply(x, *arrays):
        given = {"meta": None, "scale": None, **dict(zip(names, arrays))}
        own = Packed(
            **given, shape=own_shape, dtype=dtype, activations=activations
        )
        # By the platform of the mesh, which need not be the default one.
        y = sparse_matmul(x, own)
        return jax.lax.psum(y, split.rows) if split.rows else y

    spec = jax.sharding.PartitionSpec
    leading = (batch, *(None,) * (rank - 2)) if rank > 1 else ()
    return jax.jit(
        jax.shard_map(
            multiply,
            mesh=split.mesh,
            in_specs=(
                spec(*leading, split.rows or None),
                *(specs[name] for name in names),
            ),
            out_specs=spec(*leading, split.columns or None),
            # Then gradients of what is whole are summed over the devices.
            check_vma=False,
        )
    )
