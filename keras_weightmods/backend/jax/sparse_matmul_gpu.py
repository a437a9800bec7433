"""`sparse_matmul` on NVIDIA GPUs under JAX. Not yet run on a GPU.

Products use cuSPARSELt or are dense, whichever a trial on the card found faster
for the number of rows (`native.gpu.trial`). Both need the kernel in a form of
their own, a companion of the packed arrays. It is made at load and never
stored. Without companions each call unpacks the kernel. int8 activations are
rounded as on a CPU, and multiplied dense.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import keras

from keras_weightmods import native
from keras_weightmods.backend.jax import xla_calls
from keras_weightmods.native import gpu
from keras_weightmods.native.gpu import trial as trials
from keras_weightmods.native.packed import (
    Packed,
    dense_matmul,
    unpack_kernel,
    unpack_tensor,
)

TARGETS = ("kwm_gpu_compress", "kwm_gpu_cusparselt")


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedPacked(Packed):
    """A packed kernel with its companions.

    Args:
        companions: Dict from `"dense"` or `"cusparselt"` to an array, tensor
            or variable, of the shape and type that `companion_spec` gives.
        x_dtype: String, type of the activations that they are for.
    """

    companions: Any = None
    x_dtype: str = "float32"


@functools.cache
def plan(shape, kind):
    """Return the `trial.Plan` for a kernel on the GPU in use.

    The first call for a shape and a type of activations tries both products.
    """
    attempt = functools.partial(_try, shape, kind)
    return trials.plan(shape, kind, _reason_not_to_try, attempt)


def _reason_not_to_try():
    if jax.process_count() > 1:
        # All run one program, but their trials may differ.
        return "several processes share the program"
    return reason_unavailable()


def _try(shape, x_dtype):
    with jax.ensure_compile_time_eval(), jax.default_device(_devices()[0]):
        x, kernel = (
            jnp.asarray(array, x_dtype)
            for array in trials.sample(max(trials.ROWS), shape)
        )
        sparse = jax.jit(functools.partial(_cusparselt, n=shape[1]))
        return trials.trial(
            x,
            (jax.jit(jnp.matmul), kernel),
            (sparse, _compress(kernel)),
            jax.block_until_ready,
        )


def companion_spec(kind, shape, x_dtype):
    """Return the shape and the type of a companion.

    Args:
        kind: String, `"dense"` or `"cusparselt"`.
        shape: Pair of ints (K, N).
        x_dtype: String, type of the activations.
    """
    if kind == "dense":
        return shape, x_dtype
    ordinal = _devices()[0].local_hardware_id
    return (gpu.compressed_size(ordinal, shape, x_dtype),), "uint8"


def companion(kind, packed, x_dtype):
    """Return the companion of a packed kernel of concrete arrays."""
    kernel = jnp.asarray(unpack_kernel(packed), x_dtype)
    return kernel if kind == "dense" else _compress(kernel)


def _compress(kernel):
    """Compress a kernel, a concrete array, for cuSPARSELt."""
    spec = companion_spec("cusparselt", kernel.shape, kernel.dtype.name)
    result = jax.ShapeDtypeStruct(*spec)
    call = jax.ffi.ffi_call("kwm_gpu_compress", result)
    return jax.jit(lambda kernel: call(kernel.T))(kernel)


def matmul(x, packed, method=None):
    """See `keras_weightmods.ops.sparse_matmul`.

    float32 activations are multiplied in float32. 16-bit ones are multiplied
    by the kernel rounded to their type, with sums in float32, as a dense layer
    of that type does.

    Args:
        x: Float array of shape (..., K).
        packed: `Packed` or `PreparedPacked`.
        method: String, `"dense"` or `"cusparselt"`, to measure and to test.
            Defaults to the plan's.

    Returns:
        Array of shape (..., N).
    """
    if packed.activations == "int8":
        with jax.default_matmul_precision("highest"):
            return dense_matmul(x, packed)
    if not isinstance(packed, PreparedPacked) or packed.x_dtype != x.dtype.name:
        # In the type of x, as a companion is.
        return _dense(x, unpack_tensor(packed).astype(x.dtype))
    k, n = packed.shape

    def unpacked(arrays, dtype):
        given = Packed(**arrays, shape=packed.shape, dtype=packed.dtype)
        return unpack_tensor(given).astype(dtype)

    def gradient(x, companions, arrays, dy):
        return _dense(dy, unpacked(arrays, dy.dtype).T), None, None

    def product(x, companions, arrays):
        rows = math.prod(x.shape[:-1])
        matrix, chosen = x.reshape(rows, k), method
        # An exported program may leave the number of rows open.
        if chosen is None and isinstance(rows, int) and rows > 0:
            chosen = plan(packed.shape, x.dtype.name).method(rows)
        if chosen == "cusparselt" and chosen in companions:
            y = _cusparselt(matrix, companions[chosen], n)
        else:
            kernel = companions.get("dense")
            if kernel is None:
                kernel = unpacked(arrays, x.dtype)
            y = _dense(matrix, kernel)
        return y.reshape(*x.shape[:-1], n)

    names = "values", "meta", "scale"
    given = packed.companions, {name: getattr(packed, name) for name in names}
    companions, arrays = keras.tree.map_structure(
        lambda a: a if a is None else keras.ops.convert_to_tensor(a), given
    )
    multiply = xla_calls.with_gradient(product, gradient)
    return multiply(x, companions, arrays)


def _dense(x, kernel):
    # By default a GPU rounds the factors of a float32 product to TF32.
    precision = "highest" if x.dtype == jnp.float32 else None
    return jnp.matmul(x, kernel, precision=precision)


def _cusparselt(x, compressed, n):
    rows = x.shape[0]
    x = jnp.pad(x, ((0, -rows % trials.MULTIPLE), (0, 0)))
    shape = x.shape[0], n
    return xla_calls.call("kwm_gpu_cusparselt", shape, x, compressed)[:rows]


def _devices():
    """Return the GPUs of this process; none where JAX has none."""
    try:
        return jax.local_devices(backend="cuda")
    except RuntimeError:
        return []


def has_gpu():
    """Return whether JAX has an NVIDIA GPU."""
    return bool(_devices())


@functools.cache
def reason_unavailable():
    """Return why cuSPARSELt cannot be used; empty if it can."""
    if not has_gpu():
        return "JAX finds no NVIDIA GPU."
    if reason := gpu.load_cusparselt():
        return reason
    for target in TARGETS:
        handler = jax.ffi.pycapsule(native.xla_handler(target))
        jax.ffi.register_ffi_target(target, handler, platform="CUDA")
    return ""
