"""`sparse_matmul` on NVIDIA GPUs under JAX. Not yet run on a GPU.

Of three products the one that `native.gpu.dispatch` holds for the fastest, by
the kernel's shape, the types and the number of rows: a decode kernel that reads
the packed arrays, cuSPARSELt, or dense.

cuSPARSELt and dense need the kernel in a form of their own, a companion of the
packed arrays. It is made at load, by `prepare`, and never stored. Without it
cuSPARSELt is out, and the dense product unpacks the kernel in each call.

Rows may be split over devices: each multiplies its own. The custom calls tell
XLA so, which would else gather them.
"""

import dataclasses
import functools
import math
import string
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning

from keras_weightmods import native
from keras_weightmods.backend.jax.batching import batches_as_rows
from keras_weightmods.native import gpu
from keras_weightmods.native.gpu import dispatch, first_contact
from keras_weightmods.native.packed import Packed, unpack_kernel, unpack_tensor

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
    """A packed kernel with its companions, as `prepare` makes it.

    Args:
        companions: Dict from `"dense"` or `"cusparselt"` to an array, tensor
            or variable, of the shape and type that `companion_spec` gives.
        x_dtype: String, type of the activations that they are for.
    """

    companions: Any = None
    x_dtype: str = "float32"


def plan(shape, x_dtype, value_dtype):
    """Return the `dispatch.Plan` for a kernel on the GPU that is there.

    It counts on cuSPARSELt where a product by it was tried and right; the
    first call for a shape and type tries it, also while JAX traces.
    """
    return _plan(device_name(), tuple(shape), x_dtype, value_dtype)


@functools.cache
def _plan(device, shape, x_dtype, value_dtype):
    found = dispatch.plan("jax", device, shape, x_dtype, value_dtype)
    return first_contact.trusted(
        found,
        device,
        shape,
        x_dtype,
        functools.partial(reason_unavailable, "cusparselt"),
        functools.partial(_try_cusparselt, x_dtype),
    )


def _try_cusparselt(x_dtype, trial):
    """Return a `Trial`'s product by cuSPARSELt, and the dense one."""
    _register()
    devices = _devices()
    with (
        jax.ensure_compile_time_eval(),
        jax.default_device(devices[0] if devices else None),
    ):
        steps = jnp.take(jnp.asarray(trial.steps), trial.columns, axis=1)
        x = jnp.asarray(trial.x, x_dtype)
        kernel = steps.astype(x_dtype) * jnp.asarray(trial.scale, x_dtype)
        multiply = functools.partial(
            _cusparselt, kernel.shape[1], trial.algorithm
        )
        y = jax.jit(multiply)(x, _compress(kernel, x_dtype))
        # Sums of small numbers, and exact.
        exact = {"preferred_element_type": jnp.float32}
        return np.asarray(y, "float32"), np.asarray(
            jnp.matmul(x, kernel, **exact)
        )


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
    ordinal = _devices()[0].local_hardware_id
    return (gpu.compressed_size(ordinal, shape, x_dtype),), "uint8"


def prepare(packed, x_dtype, kinds=None):
    """Make the companions of a packed kernel.

    Args:
        packed: `Packed`, of concrete arrays.
        x_dtype: String, type of the activations: `"float32"`, `"bfloat16"`,
            `"float16"`, or `"int8"` for int8 values.
        kinds: Tuple of `"dense"` and `"cusparselt"`. Defaults to those that
            the dispatcher would use at some number of rows.

    Returns:
        `PreparedPacked`.

    Raises:
        RuntimeError: If cuSPARSELt is asked for and missing, or has failed.
    """
    if kinds is None:
        kinds = plan(packed.shape, x_dtype, packed.dtype).companions
    fields = {
        f.name: getattr(packed, f.name) for f in dataclasses.fields(Packed)
    }
    made = {kind: companion(kind, packed, x_dtype) for kind in kinds}
    return PreparedPacked(**fields, companions=made, x_dtype=x_dtype)


def companion(kind, packed, x_dtype):
    """The companion of a packed kernel of concrete arrays, on its device."""
    kernel: Any = unpack_kernel(packed)
    if x_dtype == "int8":
        # What is multiplied are the steps; the scale follows.
        scale = keras.ops.convert_to_numpy(packed.scale).ravel()
        kernel = np.rint(kernel / scale[: packed.shape[1]])
    kernel = jax.device_put(kernel.astype(x_dtype), _device_of(packed.values))
    if kind == "dense":
        return kernel
    return _compress(kernel, x_dtype)


def _compress(kernel, x_dtype):
    """Compress a kernel, a concrete array, for cuSPARSELt."""
    shape, dtype = companion_spec("cusparselt", kernel.shape, x_dtype)
    result = jax.ShapeDtypeStruct(shape, dtype)
    call = jax.ffi.ffi_call("kwm_gpu_compress", result)
    return jax.jit(lambda kernel: call(kernel.T))(kernel)


def _device_of(array):
    """The one device that an array is on; None for the default."""
    array = getattr(array, "value", array)
    devices = array.devices() if isinstance(array, jax.Array) else ()
    return next(iter(devices)) if len(devices) == 1 else None


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
    companions = {}
    if isinstance(packed, PreparedPacked) and packed.x_dtype == x.dtype.name:
        companions = {
            kind: keras.ops.convert_to_tensor(array)
            for kind, array in packed.companions.items()
        }
    if method is not None and device_name() is not None:
        _require(method)
    arrays = [
        None if array is None else keras.ops.convert_to_tensor(array)
        for array in (packed.values, packed.meta, packed.scale)
    ]
    product = _Product(packed.shape, packed.dtype, method, algorithm)
    return _matmul(product, x, *arrays, companions)


@dataclasses.dataclass(frozen=True)
class _Product:
    """What of a product is known before it is traced."""

    shape: tuple
    value_dtype: str
    method: str | None
    algorithm: int

    def choose(self, rows, x_dtype, companions):
        """Return the method and cuSPARSELt's algorithm."""
        if self.method is not None:
            return self.method, self.algorithm
        # An exported program may leave the number of rows open.
        if not isinstance(rows, int) or rows == 0 or 0 in self.shape:
            return "dense", -1
        chosen = plan(self.shape, x_dtype, self.value_dtype)
        method, algorithm = chosen.choose(rows, tuple(companions))
        reason = reason_unavailable(method)
        if reason:
            native.warn_dense(reason)
            return "dense", -1
        if method == "cusparselt":
            about = device_name(), self.shape, rows, x_dtype
            first_contact.warn_published(chosen, *about)
        return method, algorithm

    def packed(self, values, meta, scale):
        return Packed(values, meta, scale, self.shape, self.value_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(product, x, values, meta, scale, companions):
    return _mapped(product)(x, values, meta, scale, companions)


def _matmul_forward(product, *arrays):
    return _matmul(product, *arrays), arrays


def _matmul_backward(product, saved, dy):
    x, values, meta, scale, _ = saved
    if product.value_dtype != "float32":
        _, pull = jax.vjp(lambda x: _dense(product, x, *saved[1:]), x)
        return *pull(dy), None, None, None, None
    _, pull = jax.vjp(
        lambda x, values: _dense(product, x, values, meta, scale, {}), x, values
    )
    return *pull(dy), None, None, None


_matmul.defvjp(_matmul_forward, _matmul_backward)


@functools.cache
def _mapped(product):
    return batches_as_rows(functools.partial(_multiply, product))


def _multiply(product, x, values, meta, scale, companions):
    rows = math.prod(x.shape[:-1])
    method, algorithm = product.choose(rows, x.dtype.name, companions)
    if method == "dense":
        return _dense(product, x, values, meta, scale, companions)
    _register()
    n = product.shape[1]
    matrix = x.reshape(rows, product.shape[0])
    if method == "decode":
        if scale is None:
            scale = jnp.zeros((0,), jnp.float32)
        y = _rows_split(_decode, n)(matrix, values, meta, scale)
    else:
        call = _rows_split(_cusparselt, n, algorithm)
        y = call(matrix, companions["cusparselt"])
        if x.dtype == jnp.int8:
            y = y * packed_scale(product.packed(values, meta, scale))
    return y.reshape(*x.shape[:-1], n)


def _dense(product, x, values, meta, scale, companions):
    packed = product.packed(values, meta, scale)
    if "dense" not in companions:
        # In the type of x, as the companion is; int8 has no such product.
        dtype = jnp.float32 if x.dtype == jnp.int8 else x.dtype
        x, kernel = x.astype(dtype), unpack_tensor(packed).astype(dtype)
    else:
        kernel = companions["dense"]
    if x.dtype == jnp.int8:
        y = jnp.matmul(x, kernel, preferred_element_type=jnp.int32)
        return y * packed_scale(packed)
    # By default a GPU rounds the factors of a float32 product to TF32.
    precision = "highest" if x.dtype == jnp.float32 else None
    return jnp.matmul(x, kernel, precision=precision)


def _decode(n, x, values, meta, scale):
    result = jax.ShapeDtypeStruct((x.shape[0], n), x.dtype)
    return jax.ffi.ffi_call("kwm_gpu_decode", result)(x, values, meta, scale)


def _cusparselt(n, algorithm, x, compressed):
    rows = x.shape[0]
    x = jnp.pad(x, ((0, -rows % _ROWS), (0, 0)))
    dtype = jnp.int32 if x.dtype == jnp.int8 else x.dtype
    result = jax.ShapeDtypeStruct((x.shape[0], n), dtype)
    call = jax.ffi.ffi_call("kwm_gpu_cusparselt", result)
    return call(x, compressed, algorithm=algorithm)[:rows]


@functools.cache
def _rows_split(product, *settings):
    """A product of a matrix and weights, with a rule for XLA's partitioner.

    The rows of the matrix, and so of the result, may be split; all else is
    whole on each device.
    """

    def multiply(x, *weights):
        return product(*settings, x, *weights)

    call = custom_partitioning(multiply)

    def rows_of(x):
        spec = getattr(x.sharding, "spec", None)
        return jax.sharding.PartitionSpec(spec[0] if spec else None, None)

    def infer(mesh, arguments, result):
        del result
        return jax.sharding.NamedSharding(mesh, rows_of(arguments[0]))

    def partition(mesh, arguments, result):
        named = functools.partial(jax.sharding.NamedSharding, mesh)
        rows, whole = named(rows_of(arguments[0])), jax.sharding.PartitionSpec()
        weights = [named(whole) for _ in arguments[1:]]
        return mesh, multiply, rows, (rows, *weights)

    def rule(mesh, arguments, results):
        del mesh, results
        letters = iter(string.ascii_lowercase)
        weights = [
            " ".join(next(letters) for _ in argument.shape)
            for argument in arguments[1:]
        ]
        used = " ".join(weights).split()
        rule = ", ".join(["rows inner", *weights]) + " -> rows units"
        # In the order of the rule.
        return rule, {"need_replication_factors": ("inner", *used, "units")}

    call.def_partition(
        partition=partition,
        infer_sharding_from_operands=infer,
        sharding_rule=rule,
    )
    return call


def _devices():
    """The GPUs of this process; none where JAX has none."""
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
