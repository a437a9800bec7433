"""Products with packed kernels by custom calls of XLA, on JAX and TensorFlow.

Eager and compiled, with gradients of any order.
"""

import keras
import numpy as np
from keras import ops

from keras_weightmods.native.layout import dtype_of, pattern_of
from keras_weightmods.native.packed import Packed, unpack_tensor

_MATMUL = "kwm_xla_matmul"
_TRANSPOSED = f"{_MATMUL}_transposed"
_BFLOAT16 = f"{_MATMUL}_bfloat16"
INT8 = f"{_MATMUL}_int8"


def sparse_matmul(xla, x, packed):
    """See `keras_weightmods.ops.sparse_matmul`.

    Args:
        xla: Module `xla_calls` of a backend. `call` takes the name of a custom
            call, the shape of its result and its arguments, and returns the
            result, of the type of the first argument; `with_gradient` takes a
            function of tensors, and one of them and the gradient of its result.
        x: Tensor of shape (..., K).
        packed: `Packed` of a kernel of shape (K, N).
    """
    values = _tensor(packed.values)
    is_dense = packed.pattern is None
    meta = _tensor(np.zeros(0, "int32") if is_dense else packed.meta)
    no_scale = np.zeros(0, "float32")
    scale = _tensor(no_scale if packed.scale is None else packed.scale)
    target = _MATMUL
    if packed.activations == "int8":
        target = INT8
    elif _dtype(x) == packed.dtype == "bfloat16":
        target = _BFLOAT16
    return _product(xla, target, x, values, meta, scale, packed.shape[1])


def _tensor(array):
    # On TensorFlow `convert_to_tensor` leaves a variable as it is.
    return ops.cast(array, array.dtype)


def _dtype(x):
    return keras.backend.standardize_dtype(x.dtype)


def _product(xla, target, x, values, meta, scale, size):
    """Multiply by the kernel or its transpose; `size` is the last axis.

    An empty meta of one axis stands for a dense matrix. One of four axes is a
    mask, for int8 activations.
    """

    def product(x, values, meta, scale):
        shape = *x.shape[:-1], size
        if target == _BFLOAT16:
            return xla.call(target, shape, x, values, meta)
        given = ops.cast(x, "float32")
        y = xla.call(target, shape, given, values, meta, scale)
        return ops.cast(y, x.dtype)

    def gradient(x, values, meta, scale, dy):
        inner = x.shape[-1]
        if len(meta.shape) != 3:
            mask = meta if len(meta.shape) == 4 else None
            dtype = dtype_of(values, _dtype(values), pattern_of(mask))
            kind = (inner, size), dtype, "int8"
            kernel = Packed(values, mask, scale, *kind)
            dx = ops.matmul(dy, ops.transpose(unpack_tensor(kernel)))
            return ops.cast(dx, dy.dtype), None, None, None
        is_transposed = target == _TRANSPOSED
        back = _MATMUL if is_transposed else _TRANSPOSED
        dx = _product(xla, back, dy, values, meta, scale, inner)
        dvalues = None
        # XLA drops the call if nobody asks for its result.
        if _dtype(values) == "float32":
            one, other = (dy, x) if is_transposed else (x, dy)
            one, other = ops.cast(one, "float32"), ops.cast(other, "float32")
            dvalues = _values_gradient(xla, one, other, meta)
        return dx, dvalues, None, None

    return xla.with_gradient(product, gradient)(x, values, meta, scale)


def _values_gradient(xla, x, dy, meta):
    """Return the gradient of the kept values."""

    def values_gradient(x, dy, meta):
        blocks, rows, columns = meta.shape
        shape = blocks, 16 * rows, columns
        return xla.call("kwm_xla_values_gradient", shape, x, dy, meta)

    def gradient(x, dy, meta, ddvalues):
        weights = ddvalues, meta, ops.zeros((0,))
        dx = _product(xla, _TRANSPOSED, dy, *weights, x.shape[-1])
        return dx, _product(xla, _MATMUL, x, *weights, dy.shape[-1]), None

    return xla.with_gradient(values_gradient, gradient)(x, dy, meta)
