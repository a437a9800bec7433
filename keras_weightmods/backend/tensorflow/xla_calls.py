"""XLA custom calls of the compiled kernels through XlaCallModule."""

import ctypes
import functools
import importlib
import pathlib

import tensorflow as tf

from keras_weightmods import native

_TYPES = {
    **{"float32": "f32", "bfloat16": "bf16"},
    **{"int8": "i8", "uint8": "ui8", "int32": "i32"},
}


def name_of(target):
    """Return the name of a custom call.

    XLA's error names a call that it does not know: where a SavedModel runs
    without this package.
    """
    return f"{target} (`import keras_weightmods.runtime` registers it)"


@functools.cache
def register():
    """Register the handlers with the XLA in TensorFlow, once.

    Raises:
        AttributeError, OSError: If there is no way into XLA.
    """
    folder = pathlib.Path(tf.__file__).parent
    path = next(folder.glob("libtensorflow_cc.*"), None)
    if path is None:
        raise OSError(f"there is no libtensorflow_cc in {folder}")
    # xla::ffi::GetXlaFfiApi()
    name = "_ZN3xla3ffi12GetXlaFfiApiEv"
    get_api = native.typed(ctypes.CDLL(str(path)), name, "P", "")
    register = native.typed(native.library(), "kwm_xla_register", "i", "PssP")
    for name in native.XLA_TARGETS:
        handler = native.xla_handler(name)
        if register(get_api(), name_of(name).encode(), b"Host", handler):
            raise OSError(f"XLA refuses the handler {name}")


def call(target, shape, *arguments):
    """Return the result of a custom call, of the type of its first argument.

    Entries of `shape` that are None are those of the first argument.
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
        Tout=[arguments[0].dtype],
        Sout=[shape],
        platforms=["CPU"],
    )
    return result


@functools.cache
def _xla_ops():
    return importlib.import_module("tensorflow.compiler.tf2xla.ops.gen_xla_ops")


@functools.lru_cache(maxsize=4096)
def _module(target, result, arguments):
    """Return the StableHLO of a custom call.

    Args:
        target: String, the name of the handler.
        result: Tuple, the shape of the result, of ints and None.
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
    result_type = _type(result, arguments[0][1])
    lines += [
        "%y = stablehlo.custom_call "
        f'@"{name_of(target)}"'
        f"({', '.join(operands)}) {{{', '.join(attributes)}}} : "
        f"({', '.join(operand_types)}) -> {result_type}",
        f"return %y : {result_type}",
    ]
    parameters = ", ".join(f"{n}: {t}" for n, t in zip(names, types))
    body = "\n    ".join(lines)
    return (
        "module attributes {jax.uses_shape_polymorphism = true} {\n"
        f"  func.func public @main({parameters}) -> ({result_type}) {{\n"
        f"    {body}\n  }}\n}}"
    )


def _type(shape, dtype):
    sizes = "".join("?x" if s is None else f"{s}x" for s in shape)
    return f"tensor<{sizes}{_TYPES[dtype]}>"
