"""`sparse_matmul` on TensorFlow: XLA custom calls through XlaCallModule.

Eager, in `tf.function` with or without `jit_compile`, with a batch of any
size, and in a SavedModel, which runs where a product, or `why_dense`, was
called before. XLA's thread pool shares the work.
"""

import ctypes
import functools
import importlib
import pathlib

import keras
import numpy as np
import tensorflow as tf

from keras_weightmods.ops import native
from keras_weightmods.ops.packed import pack_kernel

_TARGETS = (
    "kwm_xla_matmul",
    "kwm_xla_matmul_transposed",
    "kwm_xla_values_gradient",
)
_TYPES = {"float32": "f32", "bfloat16": "bf16", "int8": "i8", "int32": "i32"}


def why_not():
    """Why the compiled kernels cannot be used; empty if they can."""
    if not native.is_available():
        return native.why_not()
    if native.xla_handler(_TARGETS[0]) is None:
        return native.NO_XLA
    if tf.config.list_physical_devices("GPU"):
        return (
            "on TensorFlow the compiled kernels are for the CPU alone, and "
            "this process has a GPU. Use JAX or torch, or hide the GPU by "
            "CUDA_VISIBLE_DEVICES=''."
        )
    return _refusal()


@functools.cache
def _refusal():
    """What TensorFlow has against the handlers, found by a first product.

    The ways into XLA are not in its public interface.
    """
    try:
        _register()
        with tf.init_scope():
            kernel = pack_kernel(np.ones((2, 1), np.float32))
            correct = float(sparse_matmul(tf.ones((1, 2)), kernel)[0, 0]) == 2
    except (
        AttributeError,
        ImportError,
        OSError,
        TypeError,
        tf.errors.OpError,
    ) as error:
        return (
            f"TensorFlow {tf.__version__} does not take the compiled kernels: "
            f"{error}. They are tested with TensorFlow 2.21."
        )
    return "" if correct else f"wrong results on TensorFlow {tf.__version__}."


# AutoGraph would rewrite the nested functions, and mix up their names.
@tf.autograph.experimental.do_not_convert
def sparse_matmul(x, packed):
    """See `keras_weightmods.ops.sparse_matmul`."""
    y = _matmul(
        tf.cast(x, tf.float32),
        _tensor(packed.values),
        _tensor(packed.meta),
        tf.zeros((0,)) if packed.scale is None else _tensor(packed.scale),
        packed.shape[1],
    )
    return tf.cast(y, x.dtype)


def _tensor(array):
    # Keras' own function leaves a variable as it is.
    value = array.value if isinstance(array, keras.Variable) else array
    return tf.convert_to_tensor(value)


def _register():
    folder = pathlib.Path(tf.__file__).parent
    path = next(folder.glob("libtensorflow_cc.*"), None)
    if path is None:
        raise OSError(f"there is no libtensorflow_cc in {folder}")
    # xla::ffi::GetXlaFfiApi()
    get_api = ctypes.CDLL(str(path))._ZN3xla3ffi12GetXlaFfiApiEv
    get_api.restype = ctypes.c_void_p
    register = native.library().kwm_xla_register
    register.restype = ctypes.c_int
    register.argtypes = [
        ctypes.c_void_p,
        ctypes.c_char_p,
        ctypes.c_char_p,
        ctypes.c_void_p,
    ]
    for name in _TARGETS:
        handler = native.xla_handler(name)
        if register(get_api(), name.encode(), b"Host", handler):
            raise OSError(f"XLA refuses the handler {name}")


def _matmul(x, values, meta, scale, n):
    @tf.custom_gradient
    def matmul(x, values, meta, scale):
        def gradient(dy):
            k = x.shape[-1]
            dx = _transposed(dy, values, meta, scale, k)
            dvalues = None
            if values.dtype == tf.float32:
                dvalues = _values_gradient(x, dy, meta)
            return dx, dvalues, None, None

        shape = [*x.shape[:-1], n]
        return _call(_TARGETS[0], shape, x, values, meta, scale), gradient

    return matmul(x, values, meta, scale)


def _transposed(dy, values, meta, scale, k):
    @tf.custom_gradient
    def transposed(dy, values, meta, scale):
        def gradient(ddx):
            n = dy.shape[-1]
            ddy = _matmul(ddx, values, meta, scale, n)
            dvalues = None
            if values.dtype == tf.float32:
                dvalues = _values_gradient(ddx, dy, meta)
            return ddy, dvalues, None, None

        shape = [*dy.shape[:-1], k]
        return _call(_TARGETS[1], shape, dy, values, meta, scale), gradient

    return transposed(dy, values, meta, scale)


@tf.custom_gradient
def _values_gradient(x, dy, meta):
    def gradient(ddvalues):
        weights = ddvalues, meta, tf.zeros((0,))
        dx = _transposed(dy, *weights, x.shape[-1])
        return dx, _matmul(x, *weights, dy.shape[-1]), None

    blocks, rows, columns = meta.shape
    shape = [blocks, 16 * rows, columns]
    return _call(_TARGETS[2], shape, x, dy, meta), gradient


def _call(target, shape, *arguments):
    """A custom call with the result float32 of `shape`.

    Where entries of the shape are None they are those of the first argument.
    """
    module = _module(
        target,
        tuple(shape),
        tuple((tuple(a.shape), a.dtype.name) for a in arguments),
    )
    (result,) = _xla_ops().xla_call_module(
        args=arguments,
        version=9,
        module=module,
        Tout=[tf.float32],
        Sout=[shape],
        platforms=["CPU"],
    )
    return result


@functools.cache
def _xla_ops():
    return importlib.import_module("tensorflow.compiler.tf2xla.ops.gen_xla_ops")


@functools.lru_cache(maxsize=4096)
def _module(target, result, arguments):
    """The StableHLO of a custom call.

    Args:
        target: String, the name of the handler.
        result: Tuple of ints and None, the shape of the float32 result.
        arguments: Tuple of (shape, dtype) for each argument.

    Returns:
        String, the module as text.
    """
    types = [_type(*argument) for argument in arguments]
    names = [f"%a{i}" for i in range(len(arguments))]
    lines, attributes = [], ["api_version = 4 : i32"]
    operands, operand_types = list(names), list(types)
    if None in result:
        # The shape of the result, as one more operand.
        for i, size in enumerate(result):
            if size is None:
                lines += [
                    f"%s{i} = stablehlo.get_dimension_size %a0, dim = {i} : "
                    f"({types[0]}) -> tensor<i32>",
                    f"%d{i} = stablehlo.reshape %s{i} : "
                    "(tensor<i32>) -> tensor<1xi32>",
                ]
            else:
                lines.append(
                    f"%d{i} = stablehlo.constant dense<{size}> : tensor<1xi32>"
                )
        parts = ", ".join(f"%d{i}" for i in range(len(result)))
        part_types = ", ".join(["tensor<1xi32>"] * len(result))
        shape_type = f"tensor<{len(result)}xi32>"
        lines.append(
            f"%shape = stablehlo.concatenate {parts}, dim = 0 : "
            f"({part_types}) -> {shape_type}"
        )
        attributes.append(
            f"indices_of_shape_operands = dense<[{len(names)}]> : tensor<1xi64>"
        )
        operands.append("%shape")
        operand_types.append(shape_type)
    result_type = _type(result, "float32")
    lines += [
        f"%y = stablehlo.custom_call @{target}({', '.join(operands)}) "
        f"{{{', '.join(attributes)}}} : "
        f"({', '.join(operand_types)}) -> {result_type}",
        f"return %y : {result_type}",
    ]
    parameters = ", ".join(f"{n}: {t}" for n, t in zip(names, types))
    body = "\n    ".join(lines)
    return (
        "module attributes {jax.uses_shape_polymorphism = true} {\n"
        f"  func.func public @main({parameters}) -> {result_type} {{\n"
        f"    {body}\n  }}\n}}"
    )


def _type(shape, dtype):
    sizes = "".join("?x" if s is None else f"{s}x" for s in shape)
    return f"tensor<{sizes}{_TYPES[dtype]}>"
