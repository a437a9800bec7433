"""XLA custom calls of the compiled kernels through XlaCallModule."""

import ctypes
import functools
import pathlib

import tensorflow as tf

from keras_weightmods import native

_TYPES = {
    **{"float32": "f32", "bfloat16": "bf16"},
    **{"int8": "i8", "uint8": "ui8", "int32": "i32", "bool": "i1"},
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


def call(target, shape, *arguments, **attributes):
    """Return the result of a custom call, of the type of its first argument.

    Args:
        target: String, the name of the handler.
        shape: Tuple. Entries that are None are those of the first argument.
        *arguments: Tensors.
        **attributes: Floats, float32 for the handler.
    """
    return results(target, [shape], *arguments, **attributes)[0]


def results(target, shapes, *arguments, **attributes):
    """Return the results of a custom call, like `call`."""
    from tensorflow.compiler.tf2xla.ops import gen_xla_ops

    kinds = tuple((tuple(a.shape), a.dtype.name) for a in arguments)
    given = (*map(tuple, shapes),), kinds, (*attributes.items(),)
    return gen_xla_ops.xla_call_module(
        args=arguments,
        version=9,
        module=_module(target, *given),
        Tout=[arguments[0].dtype] * len(shapes),
        Sout=shapes,
        platforms=["CPU"],
    )


def with_gradient(function, gradient):
    """Return a function of tensors that has this gradient."""

    @tf.custom_gradient
    def call(*inputs):
        return function(*inputs), lambda dy: gradient(*inputs, dy)

    return call


@functools.lru_cache(maxsize=4096)
def _module(target, shapes, arguments, options):
    """Return the StableHLO of a custom call.

    Args:
        target: String, the name of the handler.
        shapes: Tuple of the shapes of the results, of ints. That of a single
            one may have None.
        arguments: Tuple of (shape, dtype) for each argument.
        options: Tuple of (name, float) for each attribute.

    Returns:
        String, the module as text.
    """
    operands = {f"%a{i}": _type(*kind) for i, kind in enumerate(arguments)}
    parameters = ", ".join(f"{name}: {t}" for name, t in operands.items())
    returned = ", ".join(_type(shape, arguments[0][1]) for shape in shapes)
    lines, attributes = [], "api_version = 4 : i32"
    if options:
        config = ", ".join(f"{name} = {x:.9e} : f32" for name, x in options)
        attributes += f", backend_config = {{{config}}}"
    result = shapes[0]
    if None in result:
        # The shape of the result, as one more operand.
        one = "tensor<1xi32>"
        for i, size in enumerate(result):
            if size is not None:
                lines += [f"%d{i} = stablehlo.constant dense<{size}> : {one}"]
                continue
            lines += [
                f"%s{i} = stablehlo.get_dimension_size %a0, dim = {i} : "
                f"({operands['%a0']}) -> tensor<i32>",
                f"%d{i} = stablehlo.reshape %s{i} : (tensor<i32>) -> {one}",
            ]
        parts = ", ".join(f"%d{i}" for i in range(len(result)))
        ones = ", ".join([one] * len(result))
        shape = f"tensor<{len(result)}xi32>"
        lines.append(
            f"%shape = stablehlo.concatenate {parts}, dim = 0 : ({ones}) -> "
            f"{shape}"
        )
        place = f"dense<[{len(operands)}]> : tensor<1xi64>"
        attributes += f", indices_of_shape_operands = {place}"
        operands["%shape"] = shape
    count = len(shapes)
    names = ", ".join(f"%y#{i}" for i in range(count))
    lines += [
        f'%y:{count} = stablehlo.custom_call @"{name_of(target)}"'
        f"({', '.join(operands)}) {{{attributes}}} : "
        f"({', '.join(operands.values())}) -> ({returned})",
        f"return {names} : {returned}",
    ]
    body = "\n    ".join(lines)
    return (
        "module attributes {jax.uses_shape_polymorphism = true} {\n"
        f"  func.func public @main({parameters}) -> ({returned}) {{\n"
        f"    {body}\n  }}\n}}"
    )


def _type(shape, dtype):
    sizes = "".join("?x" if s is None else f"{s}x" for s in shape)
    return f"tensor<{sizes}{_TYPES[dtype]}>"
