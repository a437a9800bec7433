"""`sparse_matmul` on NVIDIA GPUs under JAX. Not yet run on a GPU.

Of three products the one that `native.gpu.dispatch` holds for the fastest, by
the kernel's shape, the types and the number of rows: a decode kernel that reads
the packed arrays, cuSPARSELt, or dense.

cuSPARSELt and dense need the kernel in a form of their own, a companion of the
packed arrays. It is made at load, by `prepare`, and never stored. Without it
cuSPARSELt is out, and the dense product unpacks the kernel in each call.

Rows may be split over devices: each multiplies its own. The custom calls tell
XLA so, which would else gather them.

With int8 activations each row is rounded to multiples of max |x| / 127, at any
number of rows and by any of the products. cuSPARSELt then multiplies integers,
scales the columns in its epilogue and gives bfloat16; the scales of the rows
follow, in what XLA fuses with the bias.
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
    "kwm_gpu_round_rows": {
        "initialize": "kwm_gpu_xla_round_rows_initialize",
        "execute": "kwm_gpu_xla_round_rows",
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


def plan(shape, x_dtype, value_dtype, activations="float32"):
    """Return the `dispatch.Plan` for a kernel on the GPU that is there.

    It counts on cuSPARSELt where a product by it was tried and right; the
    first call for a shape and type tries it, also while JAX traces.
    """
    kind = _multiplied("cusparselt", x_dtype, activations)
    return _plan(device_name(), tuple(shape), kind, value_dtype)


@functools.cache
def _plan(device, shape, kind, value_dtype):
    found = dispatch.plan("jax", device, shape, kind, value_dtype)
    return first_contact.trusted(
        found,
        device,
        shape,
        kind,
        functools.partial(_reason_unavailable, "cusparselt", kind == "int8"),
        functools.partial(_try_cusparselt, kind),
    )


def _try_cusparselt(kind, trial):
    """Return a `Trial`'s product by cuSPARSELt, and the dense one."""
    _register()
    devices = _devices()
    x_dtype = "bfloat16" if kind == "int8" else kind
    with (
        jax.ensure_compile_time_eval(),
        jax.default_device(devices[0] if devices else None),
    ):
        x = jnp.asarray(trial.x, x_dtype)
        scale = jnp.asarray(trial.scale)
        steps = jnp.take(jnp.asarray(trial.steps), trial.columns, axis=1)
        kernel = steps.astype(x_dtype) * scale.astype(x_dtype)
        if kind == "int8":
            product: Any = _cusparselt_int8
            weights = [_compress(steps), scale]
        else:
            product, weights = _cusparselt, [_compress(kernel)]
        settings = kernel.shape[1], trial.algorithm
        y = jax.jit(functools.partial(product, *settings))(x, *weights)
        # Sums of small numbers, and exact.
        exact = {"preferred_element_type": jnp.float32}
        expected = jnp.matmul(x, kernel, **exact)
        return np.asarray(y, "float32"), np.asarray(expected)


def _multiplied(kind, x_dtype, activations):
    """Return the type that a companion is multiplied in."""
    is_int8 = kind == "cusparselt" and activations == "int8"
    return "int8" if is_int8 else x_dtype


def companion_spec(kind, shape, x_dtype, activations="float32"):
    """Shape and type of a companion.

    Args:
        kind: String, `"dense"` or `"cusparselt"`.
        shape: Pair of ints (K, N).
        x_dtype: String, type of the activations.
        activations: String, as of `Packed`.

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
    dtype = _multiplied(kind, x_dtype, activations)
    return (gpu.compressed_size(ordinal, shape, dtype),), "uint8"


def prepare(packed, x_dtype, kinds=None):
    """Make the companions of a packed kernel.

    Args:
        packed: `Packed`, of concrete arrays.
        x_dtype: String, type of the activations: `"float32"`, `"bfloat16"`
            or `"float16"`.
        kinds: Tuple of `"dense"` and `"cusparselt"`. Defaults to those that
            the dispatcher would use at some number of rows.

    Returns:
        `PreparedPacked`.

    Raises:
        RuntimeError: If cuSPARSELt is asked for and missing, or has failed.
    """
    if kinds is None:
        kinds = plan(
            packed.shape, x_dtype, packed.dtype, packed.activations
        ).companions
    fields = {
        f.name: getattr(packed, f.name) for f in dataclasses.fields(Packed)
    }
    made = {kind: companion(kind, packed, x_dtype) for kind in kinds}
    return PreparedPacked(**fields, companions=made, x_dtype=x_dtype)


def companion(kind, packed, x_dtype):
    """The companion of a packed kernel of concrete arrays, on its device."""
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
    shape, dtype = companion_spec("cusparselt", kernel.shape, kernel.dtype.name)
    result = jax.ShapeDtypeStruct(shape, dtype)
    call = jax.ffi.ffi_call("kwm_gpu_compress", result)
    return jax.jit(lambda kernel: call(kernel.T))(kernel)


def _device_of(array):
    """The one device that an array is on; None for the default."""
    array = getattr(array, "value", array)
    devices = array.devices() if isinstance(array, jax.Array) else ()
    return next(iter(devices)) if len(devices) == 1 else None


def matmul(x, packed, method=None, algorithm=-1):
    """See `keras_weightmods.ops.sparse_matmul`.

    float32 activations are multiplied in float32. 16-bit ones are multiplied
    by the kernel rounded to their type, with sums in float32, as a dense layer
    of that type does. With `packed.activations == "int8"` each row is rounded
    to int8, at any number of rows; the result has the precision of bfloat16.

    Args:
        x: Float array of shape (..., K).
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
    rounds = packed.activations == "int8"
    if method is not None and device_name() is not None:
        _require(method, rounds)
    arrays = [
        None if array is None else keras.ops.convert_to_tensor(array)
        for array in (packed.values, packed.meta, packed.scale)
    ]
    settings = packed.activations, method, algorithm
    product = _Product(packed.shape, packed.dtype, *settings)
    return _matmul(product, x, *arrays, companions)


@dataclasses.dataclass(frozen=True)
class _Product:
    """What of a product is known before it is traced."""

    shape: tuple
    value_dtype: str
    activations: str
    method: str | None
    algorithm: int

    def choose(self, rows, x_dtype, companions):
        """Return the method and cuSPARSELt's algorithm."""
        if self.method is not None:
            return self.method, self.algorithm
        # An exported program may leave the number of rows open.
        if not isinstance(rows, int) or rows == 0 or 0 in self.shape:
            return "dense", -1
        kind = self.value_dtype, self.activations
        chosen = plan(self.shape, x_dtype, *kind)
        method, algorithm = chosen.choose(rows, tuple(companions))
        rounds = self.activations == "int8"
        reason = _reason_unavailable(method, rounds)
        if reason:
            native.warn_dense(reason)
            return "dense", -1
        if method == "cusparselt":
            dtype = _multiplied(method, x_dtype, self.activations)
            about = device_name(), self.shape, rows, dtype
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
    rounds = product.activations == "int8"
    if method == "dense" and not rounds:
        return _dense(product, x, values, meta, scale, companions)
    if method != "dense":
        _register()
    multiply = _multiply_rounded if rounds else _multiply_floats
    n = product.shape[1]
    y = multiply(
        n, method, algorithm, product, x.reshape(rows, product.shape[0]),
        values, meta, scale, companions,
    )  # fmt: skip
    return y.reshape(*x.shape[:-1], n)


def _multiply_floats(
    n, method, algorithm, product, x, values, meta, scale, companions
):
    del product
    if scale is None:
        scale = jnp.zeros((0,), jnp.float32)
    if method == "decode":
        return _rows_split(_decode, n)(x, values, meta, scale)
    call = _rows_split(_cusparselt, n, algorithm)
    return call(x, companions["cusparselt"])


def _multiply_rounded(
    n, method, algorithm, product, x, values, meta, scale, companions
):
    if method == "cusparselt":
        call = _rows_split(_cusparselt_int8, n, algorithm)
        return call(x, companions["cusparselt"], jnp.ravel(scale)[:n])
    steps, scale_of_row = round_rows(x)
    if method == "decode":
        # Integers of 8 bits are exact in bfloat16.
        steps = steps.astype(jnp.bfloat16)
        y = _rows_split(_decode, n)(steps, values, meta, scale)
        return (y * scale_of_row).astype(x.dtype)
    # Below 1 in magnitude, or sums might leave the range of float16.
    units = (steps / 128).astype(x.dtype)
    weights = values, meta, scale, companions
    y = _dense(product, units, *weights, jnp.float32)
    return (y * (128 * scale_of_row)).astype(x.dtype)


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


def _dense(product, x, values, meta, scale, companions, dtype=None):
    packed = product.packed(values, meta, scale)
    if "dense" in companions:
        kernel = companions["dense"]
    else:
        # In the type of x, as the companion is.
        kernel = unpack_tensor(packed).astype(x.dtype)
    # By default a GPU rounds the factors of a float32 product to TF32.
    precision = "highest" if x.dtype == jnp.float32 else None
    return jnp.matmul(
        x, kernel, precision=precision, preferred_element_type=dtype
    )


def _decode(n, x, values, meta, scale):
    result = jax.ShapeDtypeStruct((x.shape[0], n), x.dtype)
    return jax.ffi.ffi_call("kwm_gpu_decode", result)(x, values, meta, scale)


def _cusparselt(n, algorithm, x, compressed):
    rows = x.shape[0]
    x = jnp.pad(x, ((0, -rows % _ROWS), (0, 0)))
    result = jax.ShapeDtypeStruct((x.shape[0], n), x.dtype)
    call = jax.ffi.ffi_call("kwm_gpu_cusparselt", result)
    no_scale = jnp.zeros((0,), jnp.float32)
    return call(x, compressed, no_scale, algorithm=algorithm)[:rows]


def _cusparselt_int8(n, algorithm, x, compressed, scale):
    rows, k = x.shape
    padded = -(-rows // _ROWS) * _ROWS
    rounded = (
        jax.ShapeDtypeStruct((padded, k), jnp.int8),
        jax.ShapeDtypeStruct((rows,), jnp.float32),
    )
    steps, scale_of_row = jax.ffi.ffi_call("kwm_gpu_round_rows", rounded)(x)
    result = jax.ShapeDtypeStruct((padded, n), jnp.bfloat16)
    call = jax.ffi.ffi_call("kwm_gpu_cusparselt", result)
    y = call(steps, compressed, scale, algorithm=algorithm)[:rows]
    return (y * scale_of_row[:, None]).astype(x.dtype)


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
    """Return why a method, or `"rounding"`, cannot be used; empty if it can."""
    if method == "dense":
        return ""
    if device_name() is None:
        return "JAX finds no NVIDIA GPU."
    if gpu.library() is None:
        return gpu.reason_unavailable()
    if gpu.xla_handler("kwm_gpu_xla_decode") is None:
        return native.NO_XLA
    load = {
        "decode": gpu.load_decode,
        "rounding": gpu.load_rounding,
        "cusparselt": gpu.load_cusparselt,
    }[method]
    return load(gpu.cuda_of_wheels() or 13)


def _reason_unavailable(method, rounds):
    """As `reason_unavailable`, with the kernel that rounds activations."""
    reason = reason_unavailable(method)
    if not reason and rounds and method == "cusparselt":
        reason = reason_unavailable("rounding")
    return reason


def _require(method, rounds=False):
    reason = _reason_unavailable(method, rounds)
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
