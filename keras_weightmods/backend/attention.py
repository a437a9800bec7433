"""Attention without gradients, by a compiled kernel on a CPU.

KerasHub repeats keys and values for each group of heads that shares them, and
backends then read the whole cache in another order. The kernel reads only the
places that are attended to, once. For a prompt this is half of them.
"""

import keras
from keras import ops

from keras_weightmods import native


def attend(
    kernel, query, key, value, bias=None, mask=None, scale=None, **options
):
    """Return what Keras' `dot_product_attention` does, or None.

    Args:
        kernel: Callable from query, key, value, a bool mask of shape (batch,
            queries, places) or None, and the scale. It computes in float32.
        query: Tensor of shape (batch, queries, heads, size).
        key, value: Tensors of shape (batch, places, key heads, size).
        bias, mask, scale, **options: As in Keras; None for what the kernel
            is not made for.
    """
    shapes = [tuple(x.shape) for x in (query, key, value)]
    if {len(shape) for shape in shapes} != {4} or shapes[1] != shapes[2]:
        return None
    (_, queries, heads, size), (batch, places, key_heads, _) = shapes[:2]
    dtype_of = keras.backend.standardize_dtype
    dtypes = {dtype_of(x.dtype) for x in (query, key, value)}
    if (
        bias is not None
        or any(options.values())
        or shapes[0][0] != batch
        or size != shapes[1][3]
        or size % native.HEAD_SIZE_MULTIPLE
        or heads % key_heads
        or len(dtypes) != 1
        or not dtypes <= {"float32", "bfloat16", "float16"}
        or not native.is_available()
    ):
        return None
    if mask is not None:
        # The same for all heads.
        if len(mask.shape) != 4 or mask.shape[1] != 1:
            return None
        if dtype_of(mask.dtype) != "bool":
            return None
        mask = ops.broadcast_to(mask[:, 0], (batch, queries, places))
    scale = size**-0.5 if scale is None else scale
    return kernel(query, key, value, mask, float(scale))
