"""The kernels that Keras has quantized."""

from typing import Any

import keras
from keras import ops

from keras_weightmods.core import keras_compat
from keras_weightmods.core.layer_kinds import kernels_of
from keras_weightmods.core.targets import Target, check_built, target_of
from keras_weightmods.core.weight_keys import weight_keys


def quantized_kernels(model: Any) -> list[tuple[Target, Any]]:
    """Return the kernels that Keras has quantized to int8 or int4.

    Args:
        model: A built `keras.Model` or layer.

    Returns:
        List of pairs of a `Target`, whose `variable` holds the codes, and a
        tensor of the kernel's shape: the codes, unpacked and less the zero
        points. It is zero exactly where the weight is.

    Example:

    ```python
    import keras
    from keras_weightmods.core.quantized import quantized_kernels

    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    model.quantize("int4")
    ((target, steps),) = quantized_kernels(model)
    assert target.contraction_axes == (0,)
    assert steps.shape == (8, 4)
    ```
    """
    check_built(model)
    keys = weight_keys(model)
    found: list[tuple[Target, Any]] = []
    for layer in keras_compat.layers_of(model):
        rule = kernels_of(layer).get("kernel")
        is_known = rule is not None and rule.reason is None
        if not is_known or layer.quantization_mode not in ("int8", "int4"):
            continue
        # Not the shape of the variable: two int4 codes are stored in one.
        codes = keras_compat.stored_variable(layer, "kernel").value
        steps = _steps(layer, codes)
        rank = len(steps.shape)
        target = target_of(layer, keys=keys, depth=len(found), rank=rank)
        found.append((target, steps))
    return found


def _steps(layer: Any, codes: Any) -> Any:
    """Return the weights of a quantized layer in multiples of its scales."""
    if layer.quantization_mode == "int4":
        columns = layer.kernel_scale.shape[-1]
        codes = keras.quantizers.unpack_int4(codes, columns, axis=-1)
        if hasattr(layer, "kernel_zero"):
            group = ops.cast(layer.g_idx, "int32")
            codes = ops.subtract(
                ops.cast(codes, "int32"),
                ops.take(ops.cast(layer.kernel_zero, "int32"), group, axis=0),
            )
        # Two-dimensional for EinsumDense too.
        shape = getattr(layer, "original_kernel_shape", codes.shape)
        codes = ops.reshape(codes, shape)
    return ops.cast(codes, "int32")
