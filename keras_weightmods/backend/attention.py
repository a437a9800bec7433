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


def by_heads(query, key, value, mask, scale):
    """Attend as most models of KerasHub do on TensorFlow.

    Args:
        query, key, value: As of `attend`.
        mask: Bool tensor of shape (batch, 1, queries, places).
        scale: Float.
    """
    group = query.shape[2] // key.shape[2]
    key, value = (ops.repeat(x, group, axis=2) for x in (key, value))
    scores = ops.einsum("bqhd,bphd->bhqp", query, key)
    scores = ops.multiply(scores, ops.cast(scale, scores.dtype))
    weights = keras.layers.Softmax(dtype="float32")(scores, mask=mask)
    weights = ops.cast(weights, query.dtype)
    return ops.einsum("bhqp,bphd->bqhd", weights, value)


def by_groups(query, key, value, mask, scale):
    """Attend as KerasHub's Gemma models do on a CPU.

    Args:
        query, key, value: As of `attend`.
        mask: Bool tensor of shape (batch, 1, 1, queries, places).
        scale: Float.
    """
    shape, heads = query.shape, key.shape[2]
    query = query * ops.cast(scale, query.dtype)
    grouped = *shape[:2], heads, shape[2] // heads, shape[3]
    scores = ops.einsum("bqkgd,bpkd->bkgqp", ops.reshape(query, grouped), key)
    weights = keras.layers.Softmax(dtype="float32")(scores, mask=mask)
    weights = ops.cast(weights, scores.dtype)
    result = ops.einsum("bkgqp,bpkd->bqkgd", weights, value)
    return ops.reshape(result, shape)
