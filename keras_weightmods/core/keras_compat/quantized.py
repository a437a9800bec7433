"""Layers that Keras quantized: their integers, and the way back to floats.

Written for `quantize` of Keras 3.15. Needless if Keras had a public
`layer.dequantize()`, and a function for the integers and scales of a weight.
"""

import weakref
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_weightmods.core.keras_compat.layers import (
    layers_of,
    own_variables,
    stored_name,
    stored_variable,
)
from keras_weightmods.core.keras_compat.variables import (
    put_variable_back,
    release_value,
    remove_variable,
)


def quantized_weights(layer: Any) -> dict[str, tuple[int, ...]]:
    """Return {attribute: shape} of the integer weights of a layer.

    These are the weights in int8, int4, gptq and awq that the layer multiplies
    by. Until gptq and awq are calibrated, the weights are floats.
    """
    mode = layer.quantization_mode
    if not getattr(layer, f"is_{mode}_calibrated", mode in ("int8", "int4")):
        return {}
    if isinstance(layer, keras.layers.ReversibleEmbedding):
        shape = layer.input_dim, layer.output_dim
        tables: dict[str, tuple[int, ...]] = {"embeddings": shape}
        if not layer.tie_weights:
            tables["reverse_embeddings"] = shape[::-1]
        return tables
    if isinstance(layer, keras.layers.EinsumDense):
        int8 = mode == "int8"
        shape = layer._kernel.shape if int8 else layer.original_kernel_shape
        return {"kernel": tuple(shape)}
    if isinstance(layer, keras.layers.Dense):
        return {"kernel": (layer.input_spec.axes[-1], layer.units)}
    return {}


def integers_of(layer: Any, attribute: str) -> tuple[Any, Any]:
    """Return the integers that Keras rounded a weight to, and their scales.

    Args:
        layer: A layer, or what `view` made of it.
        attribute: String, one of its `quantized_weights`.

    Returns:
        Pair of float32 NumPy arrays of the weight's shape, the integers, less
        their zero points, and their scales. The weight is the product.
    """

    def array(value: Any) -> Any:
        return ops.convert_to_numpy(value).astype("float32")

    mode, shape = layer.quantization_mode, quantized_weights(layer)[attribute]
    is_fitted, is_table = mode in ("gptq", "awq"), attribute == "embeddings"
    name = "quantized_kernel" if is_fitted else attribute
    codes = stored_variable(layer, name).value
    scale = getattr(layer, f"{attribute}_scale")
    zero = getattr(layer, f"{attribute}_zero", None)
    if mode == "int8":
        if isinstance(layer, keras.layers.EinsumDense):
            scale = layer._adjust_scale_for_dequant(scale)
        scale = array(scale)[:, None] if is_table else array(scale)
        return array(codes), np.broadcast_to(1 / scale, shape)
    scale = array(scale)
    columns = scale.shape[0 if is_fitted or is_table else -1]
    if mode != "gptq" or codes.shape[0] != columns:
        # A byte holds two, neighbors along the first or the last axis.
        axis = 0 if is_fitted or attribute == "reverse_embeddings" else -1
        is_kernel = attribute == "kernel"
        size = columns if is_kernel else np.prod(shape) // columns
        kind = "uint8" if is_fitted else "int8"
        codes = keras.quantizers.unpack_int4(codes, int(size), axis, kind)
    codes = array(codes)
    if is_fitted or is_table:
        codes, scale = codes.T, scale.T
    if zero is None:
        scale = np.broadcast_to(1 / scale, codes.shape)
    else:
        zero = array(zero).T if is_fitted or is_table else array(zero)
        groups = array(layer.g_idx).astype("int32")
        codes, scale = codes - zero[groups], scale[groups]
    if mode == "awq":
        scale = scale / array(layer.awq_scales)[:, None]
    if is_table:
        codes, scale = codes.T, scale.T
    return codes.reshape(shape), scale.reshape(shape)


def make_float(layer: Any) -> None:
    """Turn a quantized layer into a float layer again.

    Integer weights become float variables without a value. `Structure` can
    restore the layer.
    """
    mode, shapes = layer.quantization_mode, quantized_weights(layer)
    for name in {*layer.variable_serialization_spec[mode]} - {"bias"}:
        stored = stored_name(layer, name)
        if stored is not None:
            remove_variable(layer, stored_variable(layer, name), stored)
    # Calibration leaves the class's own `call` on the instance.
    if getattr(vars(layer).get("call"), "__func__", None) is type(layer).call:
        del vars(layer)["call"]
    policy = layer._dtype_policy
    if isinstance(policy, keras.dtype_policies.DTypePolicyMap):
        policy = policy[layer.path]
    name = policy.compute_dtype  # a policy loses its own where it is saved
    if policy.variable_dtype != name:
        name = f"mixed_{name}"
    vars(layer).update(
        # Bypasses the setter, which changes a map that other layers share.
        _dtype_policy=keras.dtype_policies.get(name),
        _is_quantized=False,
        inputs_quantizer=None,
        quantization_config=None,
    )
    for attribute, shape in reversed(shapes.items()):
        with layer._open_name_scope():
            variable = keras.Variable(
                "zeros", shape, layer.variable_dtype, name=attribute
            )
        variable.trainable = layer.trainable and not layer.lora_enabled
        for rule in ("regularizer", "constraint"):
            owner = attribute.removeprefix("reverse_")
            setattr(variable, rule, getattr(layer, f"{owner}_{rule}", None))
        release_value(variable, f"{variable.path!r} is integers of Keras.")
        name = f"_{attribute}"
        if attribute == "reverse_embeddings":
            name = attribute
        others = [weakref.ref(each) for each in own_variables(layer)]
        place = name, "trainable_variables", others
        put_variable_back(layer, variable, place)


def drop_policies(model: Any, layers: Any) -> None:
    """Remove layers from the dtype policy maps of a model.

    KerasHub loads a quantized preset by such a map, and saves it.
    """
    paths = {layer.path for layer in layers}
    for layer in layers_of(model):
        policy = layer._dtype_policy
        if isinstance(policy, keras.dtype_policies.DTypePolicyMap):
            vars(layer)["_dtype_policy"] = type(policy)(
                policy._default_policy_arg,
                {k: v for k, v in policy.items() if k not in paths},
            )
