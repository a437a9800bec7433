"""`sparse_matmul` on NVIDIA GPUs under JAX. Not yet run on a GPU.

By cuSPARSELt, or dense: whichever a trial on the card found faster for the
number of rows (`native.gpu.trial`). Both need the kernel in a form of their
own, a companion of the packed arrays, which is made at load and never stored.
Without companions the kernel is unpacked in each call.

With int8 activations each row is rounded to multiples of max |x| / 127, at any
number of rows and by either product; cuSPARSELt multiplies the integers, scales
the columns in its epilogue and gives bfloat16. Where cuSPARSELt is never
faster, activations are rounded in blocks as on a CPU.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

from keras_weightmods import native
from keras_weightmods.backend.jax.batching import batches_as_rows
from keras_weightmods.native import gpu
from keras_weightmods.native.gpu import trial as trials
from keras_weightmods.native.packed import (
    Packed,
    dense_matmul,
    unpack_kernel,
    unpack_tensor,
)

TARGETS = ("kwm_gpu_compress", "kwm_gpu_cusparselt")
# cuSPARSELt wants this many rows, or a multiple.
_ROWS = 16


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedPacked(Packed):
    """A packed kernel with its companions, as `prepare` makes it.

    Args:
        companions: Dict from `"dense"` or `"cusparselt"` to an array, tensor
            or variable, of the shape and type that `companion_spec` gives.
        x_dtype: String, type of the activations that they are for.
    """

    companions: Any = None
    x_dtype: str = "float32"


def plan(shape, x_dtype, value_dtype, activations="float32"):
    """Return the `trial.Plan` for a kernel on the GPU that is there.

    The first call for a shape and type tries both products.
    """
    kind = _multiplied("cusparselt", x_dtype, activations)
    return _plan(tuple(shape), kind, value_dtype)


@functools.cache
def _plan(shape, kind, value_dtype):
    reason = trials.reason_for_dense(shape, kind, value_dtype)
    if not reason and jax.process_count() > 1:
        # They run one program, and their trials may differ.
        reason = "several processes share the program"
    if not reason:
        reason = reason_unavailable()
        if reason:
            native.warn_dense(reason)
    return trials.Plan((), reason) if reason else _try(shape, kind)


def _try(shape, kind):
    x_dtype = "bfloat16" if kind == "int8" else kind
    with jax.ensure_compile_time_eval(), jax.default_device(_devices()[0]):
        x, steps, scale = map(
            jnp.asarray, trials.sample(max(trials.ROWS), shape)
        )
        kernel = steps.astype(x_dtype) * scale.astype(x_dtype)
        no_scale = jnp.zeros((0,), jnp.float32)
        if kind == "int8":
            weights = _compress(steps), scale
        else:
            weights = _compress(kernel), no_scale
        product = functools.partial(_cusparselt, kind == "int8", shape[1])
        dense, sparse = (
            trials.Product(
                jax.jit(multiply),
                [
                    first,
                    *(jax.tree.map(jnp.copy, first) for _ in range(count - 1)),
                ],
            )
            for multiply, first, count in (
                (jnp.matmul, kernel, trials.copies(kernel.nbytes)),
                (
                    lambda x, weights: product(x, *weights),
                    weights,
                    trials.copies(weights[0].nbytes),
                ),
            )
        )
        return trials.trial(
            lambda rows: x[:rows].astype(x_dtype),
            dense,
            sparse,
            trials.seconds_by(jax.block_until_ready),
            trials.ROWS,
        )


def _multiplied(kind, x_dtype, activations):
    """Return the type that a companion is multiplied in."""
    is_int8 = kind == "cusparselt" and activations == "int8"
    return "int8" if is_int8 else x_dtype


def companion_spec(kind, shape, x_dtype, activations="float32"):
    """Return the shape and the type of a companion.

    Args:
        kind: String, `"dense"` or `"cusparselt"`.
        shape: Pair of ints (K, N).
        x_dtype: String, type of the activations.
        activations: String, as of `Packed`.

    Raises:
        RuntimeError: If there is no GPU, or no cuSPARSELt, which alone knows
            the size of what it compresses.
    """
    if kind == "dense":
        return shape, x_dtype
    if reason := reason_unavailable():
        raise RuntimeError(reason)
    ordinal = _devices()[0].local_hardware_id
    dtype = _multiplied(kind, x_dtype, activations)
    return (gpu.compressed_size(ordinal, shape, dtype),), "uint8"


def prepare(packed, x_dtype, kinds=None):
    """Make the companions of a packed kernel.

    Args:
        packed: `Packed`, of concrete arrays.
        x_dtype: String, type of the activations: `"float32"`, `"bfloat16"`
            or `"float16"`.
        kinds: Tuple of `"dense"` and `"cusparselt"`. Defaults to those of the
            plan.

    Returns:
        `PreparedPacked`.

    Raises:
        RuntimeError: If cuSPARSELt is asked for and missing, or has failed.
    """
    if kinds is None:
        about = packed.shape, x_dtype, packed.dtype, packed.activations
        kinds = plan(*about).companions
    made = {kind: companion(kind, packed, x_dtype) for kind in kinds}
    return PreparedPacked(**vars(packed), companions=made, x_dtype=x_dtype)


def companion(kind, packed, x_dtype):
    """Return the companion of a packed kernel of concrete arrays."""
    kernel: Any = unpack_kernel(packed)
    dtype = _multiplied(kind, x_dtype, packed.activations)
    if dtype == "int8":
        # What is multiplied are the steps; the scale follows.
        scale = keras.ops.convert_to_numpy(packed.scale).ravel()
        kernel = np.rint(kernel / scale[: packed.shape[1]])
    kernel = jax.device_put(kernel.astype(dtype), _device_of(packed.values))
    return kernel if kind == "dense" else _compress(kernel)


def _compress(kernel):
    """Compress a kernel, a concrete array, for cuSPARSELt."""
    spec = companion_spec("cusparselt", kernel.shape, kernel.dtype.name)
    result = jax.ShapeDtypeStruct(*spec)
    call = jax.ffi.ffi_call("kwm_gpu_compress", result)
    return jax.jit(lambda kernel: call(kernel.T))(kernel)


def _device_of(array):
    """Return the one device that an array is on; None for the default."""
    array = getattr(array, "value", array)
    devices = array.devices() if isinstance(array, jax.Array) else ()
    return next(iter(devices)) if len(devices) == 1 else None


def matmul(x, packed, method=None):
    """See `keras_weightmods.ops.sparse_matmul`.

    float32 activations are multiplied in float32. 16-bit ones are multiplied
    by the kernel rounded to their type, with sums in float32, as a dense layer
    of that type does. With `packed.activations == "int8"` the result has the
    precision of bfloat16.

    Args:
        x: Float array of shape (..., K).
        packed: `Packed` or `PreparedPacked`.
        method: String, `"dense"` or `"cusparselt"`, to measure and to test.
            Defaults to the plan's.

    Returns:
        Array of shape (..., N).
    """
    if not isinstance(packed, PreparedPacked) or packed.x_dtype != x.dtype.name:
        if packed.activations == "int8":
            with jax.default_matmul_precision("highest"):
                return dense_matmul(x, packed)
        # In the type of x, as a companion is.
        return _dense(x, unpack_tensor(packed).astype(x.dtype))
    companions, arrays = (
        {
            name: keras.ops.convert_to_tensor(array)
            for name, array in given.items()
            if array is not None
        }
        for given in (
            packed.companions,
            {
                name: getattr(packed, name)
                for name in ("values", "meta", "scale")
            },
        )
    )
    about = packed.shape, packed.dtype, packed.activations, method
    return _matmul(about, x, arrays, companions)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(about, x, arrays, companions):
    return _mapped(about)(x, arrays, companions)


def _matmul_forward(about, x, arrays, companions):
    return _matmul(about, x, arrays, companions), arrays


def _matmul_backward(about, arrays, dy):
    kernel = _unpacked(about, arrays, dy.dtype)
    return _dense(dy, kernel.T), None, None


_matmul.defvjp(_matmul_forward, _matmul_backward)


@functools.cache
def _mapped(about):
    return batches_as_rows(functools.partial(_multiply, about))


def _multiply(about, x, arrays, companions):
    (k, n), value_dtype, activations, method = about
    rows = math.prod(x.shape[:-1])
    # An exported program may leave the number of rows open.
    is_known = isinstance(rows, int) and rows > 0
    if method is None and is_known:
        method = plan((k, n), x.dtype.name, value_dtype, activations).method(
            rows
        )
    matrix, is_int8 = x.reshape(rows, k), activations == "int8"
    if method == "cusparselt" and method in companions:
        scale = jnp.zeros((0,), jnp.float32)
        if is_int8:
            scale = jnp.ravel(arrays["scale"])[:n]
        y = _cusparselt(is_int8, n, matrix, companions[method], scale)
    else:
        kernel = companions.get("dense")
        if kernel is None:
            kernel = _unpacked(about, arrays, x.dtype)
        if is_int8:
            steps, scale_of_row = round_rows(matrix)
            # Below 1 in magnitude, or sums might leave the range of float16.
            units = (steps / 128).astype(x.dtype)
            y = _dense(units, kernel, jnp.float32) * (128 * scale_of_row)
        else:
            y = _dense(matrix, kernel)
    return y.astype(x.dtype).reshape(*x.shape[:-1], n)


def _unpacked(about, arrays, dtype):
    weights = {"meta": None, "scale": None, **arrays}
    return unpack_tensor(
        Packed(**weights, shape=about[0], dtype=about[1])
    ).astype(dtype)


def _dense(x, kernel, dtype=None):
    # By default a GPU rounds the factors of a float32 product to TF32.
    precision = "highest" if x.dtype == jnp.float32 else None
    return jnp.matmul(
        x, kernel, precision=precision, preferred_element_type=dtype
    )


def _cusparselt(is_int8, n, x, compressed, scale):
    rows = x.shape[0]
    dtype = x.dtype
    if is_int8:
        steps, scale_of_row = round_rows(x)
        x, dtype = steps.astype(jnp.int8), jnp.bfloat16
    x = jnp.pad(x, ((0, -rows % _ROWS), (0, 0)))
    result = jax.ShapeDtypeStruct((x.shape[0], n), dtype)
    call = jax.ffi.ffi_call("kwm_gpu_cusparselt", result)
    y = call(x, compressed, scale)[:rows]
    return y * scale_of_row if is_int8 else y


def round_rows(x):
    """Round each row to int8: `x` is about `steps * scale`.

    Args:
        x: Float array of shape (rows, K).

    Returns:
        Pair of float32 arrays: of integers, -127 to 127, of shape (rows, K),
        and the scales max |x| / 127 of shape (rows, 1). A row that holds NaN
        or infinity gets zeros and NaN.
    """
    x = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x), axis=1, keepdims=True, initial=0)
    scale = largest / 127
    scale = jnp.where(scale < jnp.finfo(jnp.float32).tiny, 1, scale)
    is_finite = jnp.isfinite(largest)
    steps = jnp.where(is_finite, jnp.round(x / scale), 0)
    return steps, jnp.where(is_finite, scale, jnp.nan)


def _devices():
    """Return the GPUs of this process; none where JAX has none."""
    try:
        return jax.local_devices(backend="cuda")
    except RuntimeError:
        return []


@functools.cache
def device_name():
    """Return the name of the GPU; None where JAX has none."""
    devices = _devices()
    return devices[0].device_kind if devices else None


@functools.cache
def reason_unavailable():
    """Return why cuSPARSELt cannot be used; empty if it can."""
    if device_name() is None:
        return "JAX finds no NVIDIA GPU."
    if reason := gpu.load_cusparselt():
        return reason
    register()
    return ""


@functools.cache
def register():
    """Register the custom calls for CUDA; there need not be a GPU."""
    for target in TARGETS:
        handler = jax.ffi.pycapsule(native.xla_handler(target))
        jax.ffi.register_ffi_target(target, handler, platform="CUDA")
