"""`sparse_matmul` on NVIDIA GPUs under JAX. Not yet run on a GPU.

Of three products the one that was measured to be the fastest for the kernel's
shape, the types and the number of rows: a decode kernel that reads the packed
arrays, cuSPARSELt, or dense.

cuSPARSELt and dense need the kernel in a form of their own, a companion of the
packed arrays. It is made at load, by `prepare`, and never stored. Without it
cuSPARSELt is out, and the dense product unpacks the kernel in each call.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import keras

from keras_weightmods import native
from keras_weightmods.backend.jax.batching import batches_as_rows
from keras_weightmods.native import gpu
from keras_weightmods.native.gpu import dispatch
from keras_weightmods.native.packed import Packed, dense_matmul, unpack_kernel

_TARGETS = {
    "kwm_gpu_decode": {
        "initialize": "kwm_gpu_xla_decode_initialize",
        "execute": "kwm_gpu_xla_decode",
    },
    "kwm_gpu_compress": {"execute": "kwm_gpu_xla_compress"},
    "kwm_gpu_cusparselt": {
        "initialize": "kwm_gpu_xla_cusparselt_initialize",
        "execute": "kwm_gpu_xla_cusparselt",
    },
}
# cuSPARSELt wants this many rows, or a multiple.
_ROWS = 16


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedPacked(Packed):
    """A packed kernel with its companion, as `prepare` makes it.

    Args:
        companion: Array, tensor or variable, of the shape and type that
            `companion_spec` gives.
        companion_kind: String, `"dense"` or `"cusparselt"`.
        x_dtype: String, type of the activations that it is for.
    """

    companion: Any = None
    companion_kind: str = "dense"
    x_dtype: str = "float32"


def plan(shape, x_dtype, value_dtype):
    """Return the `dispatch.Plan` for a kernel on the GPU that is there."""
    return dispatch.plan("jax", device_name(), shape, x_dtype, value_dtype)


def companion_spec(kind, shape, x_dtype):
    """Shape and type of a companion.

    Args:
        kind: String, `"dense"` or `"cusparselt"`.
        shape: Pair of ints (K, N).
        x_dtype: String, type of the activations.

    Returns:
        Pair of a shape and a type.

    Raises:
        RuntimeError: If there is no GPU, or no cuSPARSELt, which alone knows
            the size of what it compresses.
    """
    if kind == "dense":
        return shape, x_dtype
    _require("cusparselt")
    device = jax.devices("cuda")[0].local_hardware_id
    return (gpu.compressed_size(device, shape, x_dtype),), "uint8"


def prepare(packed, x_dtype, kind=None):
    """Make the companion of a packed kernel.

    Args:
        packed: `Packed`, of concrete arrays.
        x_dtype: String, type of the activations: `"float32"`, `"bfloat16"`,
            `"float16"`, or `"int8"` for int8 values.
        kind: String, `"dense"` or `"cusparselt"`. Defaults to what the
            measured times advise.

    Returns:
        `PreparedPacked`.

    Raises:
        RuntimeError: If cuSPARSELt is asked for and missing, or has failed.
    """
    if kind is None:
        kind = plan(packed.shape, x_dtype, packed.dtype).companion
    fields = {
        f.name: getattr(packed, f.name) for f in dataclasses.fields(Packed)
    }
    prepared = PreparedPacked(**fields, companion_kind=kind, x_dtype=x_dtype)
    return dataclasses.replace(prepared, companion=companion(prepared))


def companion(packed):
    """The companion that belongs to a `PreparedPacked`, of concrete arrays."""
    kernel: Any = unpack_kernel(packed)
    if packed.x_dtype == "int8":
        # What is multiplied are the steps; the scale follows.
        kernel = jnp.rint(kernel / packed_scale(packed))
    kernel = jnp.asarray(kernel, packed.x_dtype)
    if packed.companion_kind == "dense":
        return kernel
    shape, dtype = companion_spec("cusparselt", packed.shape, packed.x_dtype)
    result = jax.ShapeDtypeStruct(shape, dtype)
    call = jax.ffi.ffi_call("kwm_gpu_compress", result)
    return jax.jit(lambda kernel: call(kernel.T))(kernel)


def packed_scale(packed):
    """Return the scale of each column of a packed kernel with int8 values."""
    scale = keras.ops.convert_to_tensor(packed.scale)
    return jnp.ravel(scale)[: packed.shape[1]]


def matmul(x, packed, method=None, algorithm=-1):
    """See `keras_weightmods.ops.sparse_matmul`.

    float32 activations are multiplied in float32. 16-bit ones are multiplied
    by the kernel rounded to their type, with sums in float32, as a dense layer
    of that type does; int8 ones, by int8 values, give float32.

    Args:
        x: Array of shape (..., K).
        packed: `Packed` or `PreparedPacked`.
        method: String, one of `dispatch.METHODS`, to measure and to test.
            Defaults to the fastest.
        algorithm: Int, of cuSPARSELt's, if `method` is given.

    Returns:
        Array of shape (..., N).
    """
    companion, kind = None, None
    if isinstance(packed, PreparedPacked) and packed.x_dtype == x.dtype.name:
        companion = keras.ops.convert_to_tensor(packed.companion)
        kind = packed.companion_kind
    arrays = [
        None if array is None else keras.ops.convert_to_tensor(array)
        for array in (packed.values, packed.meta, packed.scale)
    ]
    product = _Product(packed.shape, packed.dtype, kind, method, algorithm)
    return _matmul(product, x, *arrays, companion)


@dataclasses.dataclass(frozen=True)
class _Product:
    """What of a product is known before it is traced."""

    shape: tuple
    value_dtype: str
    companion_kind: str | None
    method: str | None
    algorithm: int

    def choose(self, rows, x_dtype):
        """Return the method and cuSPARSELt's algorithm."""
        if self.method is not None:
            return self.method, self.algorithm
        # An exported program may leave the number of rows open.
        if not isinstance(rows, int) or rows == 0 or 0 in self.shape:
            return "dense", -1
        method, algorithm = plan(self.shape, x_dtype, self.value_dtype).choose(
            rows, self.companion_kind
        )
        reason = reason_unavailable(method)
        if reason:
            native.warn_dense(reason)
            return "dense", -1
        return method, algorithm

    def packed(self, values, meta, scale):
        return Packed(values, meta, scale, self.shape, self.value_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(product, x, values, meta, scale, companion):
    return _mapped(product)(x, values, meta, scale, companion)


def _matmul_forward(product, *arrays):
    return _matmul(product, *arrays), arrays


def _matmul_backward(product, saved, dy):
    x, values, *others = saved
    if product.value_dtype != "float32":
        _, pull = jax.vjp(lambda x: _dense(product, x, values, *others), x)
        return *pull(dy), None, None, None, None
    meta, scale, _ = others
    _, pull = jax.vjp(
        lambda x, values: dense_matmul(x, product.packed(values, meta, scale)),
        x,
        values,
    )
    return *pull(dy), None, None, None


_matmul.defvjp(_matmul_forward, _matmul_backward)


@functools.cache
def _mapped(product):
    return batches_as_rows(functools.partial(_multiply, product))


def _multiply(product, x, values, meta, scale, companion):
    rows = math.prod(x.shape[:-1])
    method, algorithm = product.choose(rows, x.dtype.name)
    if method == "dense":
        return _dense(product, x, values, meta, scale, companion)
    n = product.shape[1]
    matrix = x.reshape(rows, product.shape[0])
    if method == "decode":
        y = _decode(matrix, values, meta, scale, n)
    else:
        y = _cusparselt(matrix, companion, n, algorithm)
        if x.dtype == jnp.int8:
            y = y * packed_scale(product.packed(values, meta, scale))
    return y.reshape(*x.shape[:-1], n)


def _dense(product, x, values, meta, scale, companion):
    if product.companion_kind != "dense":
        return dense_matmul(x, product.packed(values, meta, scale))
    if x.dtype != jnp.int8:
        return jnp.matmul(x, companion)
    y = jnp.matmul(x, companion, preferred_element_type=jnp.int32)
    return y * packed_scale(product.packed(values, meta, scale))


def _decode(x, values, meta, scale, n):
    _register()
    if scale is None:
        scale = jnp.zeros((0,), jnp.float32)
    result = jax.ShapeDtypeStruct((x.shape[0], n), x.dtype)
    return jax.ffi.ffi_call("kwm_gpu_decode", result)(x, values, meta, scale)


def _cusparselt(x, compressed, n, algorithm):
    _register()
    rows = x.shape[0]
    x = jnp.pad(x, ((0, -rows % _ROWS), (0, 0)))
    dtype = jnp.int32 if x.dtype == jnp.int8 else x.dtype
    result = jax.ShapeDtypeStruct((x.shape[0], n), dtype)
    call = jax.ffi.ffi_call("kwm_gpu_cusparselt", result)
    return call(x, compressed, algorithm=algorithm)[:rows]


@functools.cache
def device_name():
    """Return the name of the GPU; None where JAX has none."""
    try:
        return jax.devices("cuda")[0].device_name
    except RuntimeError:
        return None


@functools.cache
def reason_unavailable(method):
    """Return why a method cannot be used; empty if it can."""
    if method == "dense":
        return ""
    if device_name() is None:
        return "JAX finds no NVIDIA GPU."
    if gpu.library() is None:
        return gpu.reason_unavailable()
    if gpu.xla_handler("kwm_gpu_xla_decode") is None:
        return native.NO_XLA
    load = gpu.load_decode if method == "decode" else gpu.load_cusparselt
    return load(gpu.cuda_of_wheels() or 13)


def _require(method):
    reason = reason_unavailable(method)
    if reason:
        raise RuntimeError(reason)
    _register()


@functools.cache
def _register():
    """Register the custom calls for CUDA; there need not be a GPU."""
    for target, stages in _TARGETS.items():
        handlers = {
            stage: jax.ffi.pycapsule(gpu.xla_handler(name))
            for stage, name in stages.items()
        }
        jax.ffi.register_ffi_target(target, handlers, platform="CUDA")
