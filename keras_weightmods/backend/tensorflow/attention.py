"""The kernel of `backend.attention` on TensorFlow: a custom call.

An attention alone is traced, with the installed Keras. Where its operations
occur in the graph of a model, the kernel takes their place.
"""

import functools

import numpy as np
import tensorflow as tf

from keras_weightmods.backend import attention
from keras_weightmods.backend.tensorflow import sparse_matmul, xla_calls

# Stands for the scale of an attention. Any other number would do.
_SCALE = 0.0123456789


def kernel(query, key, value, mask, scale):
    """See `attend` of `backend.attention`."""
    if sparse_matmul.reason_unavailable():
        return None
    if mask is None:
        mask = tf.ones((*query.shape[:2], key.shape[1]), "bool")
    given = *(tf.cast(x, "float32") for x in (query, key, value)), mask
    result = xla_calls.call("kwm_xla_attend", query.shape, *given, scale=scale)
    return tf.cast(result, query.dtype)


def replacements(graph, key_shape):
    """Add the kernel to a graph, once for each attention in it.

    Args:
        graph: The default graph.
        key_shape: Tuple (places, key heads, size) of the keys in a cache.

    Returns:
        Dict from the name of a result to that of what takes its place.
    """
    names = {}
    firsts = [x.outputs[0] for x in graph.get_operations() if x.outputs]
    for out in firsts:
        shape = out.shape
        if (
            not out.dtype.is_floating
            or shape.rank != 4
            or not shape.is_fully_defined()
            or shape[3] != key_shape[2]
            or shape[2] % key_shape[1]
        ):
            continue
        for inputs, result in _forms(tuple(shape), key_shape, out.dtype):
            known: dict[str, tf.Tensor] = {}
            scales: set[float] = set()
            if _is_same(result, out, known, scales) and len(scales) == 1:
                query, key, value, mask = (known[x.name] for x in inputs)
                mask = tf.reshape(mask, (shape[0], 1, shape[1], key_shape[0]))
                y = attention.attend(
                    kernel, query, key, value, mask=mask, scale=scales.pop()
                )
                if y is not None:
                    # Where nothing is attended to, the kernel gives the mean.
                    attends = tf.reduce_any(mask, -1)[:, 0, :, None, None]
                    names[out.name] = (y * tf.cast(attends, y.dtype)).name
                break
    return names


@functools.lru_cache(maxsize=64)
def _forms(query_shape, key_shape, dtype):
    """Return the inputs and the result of an attention, as models call it."""
    (batch, queries, _, _), places = query_shape, key_shape[0]
    placeholder, found = tf.compat.v1.placeholder, []
    for form, ones in ((attention.by_heads, 1), (attention.by_groups, 2)):
        with tf.__internal__.FuncGraph("form").as_default():
            query = placeholder(dtype, query_shape)
            key, value = (
                placeholder(dtype, (batch, *key_shape)) for _ in range(2)
            )
            mask = placeholder("bool", (batch, *[1] * ones, queries, places))
            result = form(query, key, value, mask, _SCALE)
        found.append(((query, key, value, mask), result))
    return found


def _is_same(expected, x, known, scales):
    """Match a tensor with one of a form.

    Args:
        expected: The one of the form.
        x: Tensor.
        known: Dict from the names of the form's inputs to what they are; more
            are added.
        scales: Set of the numbers in the place of `_SCALE`, likewise.
    """
    one, other = expected.op, x.op
    if expected.shape != x.shape or expected.dtype != x.dtype:
        return False
    if one.type == "Placeholder":
        return known.setdefault(expected.name, x) is x
    number = tf.get_static_value(expected)
    if number is not None:
        found = tf.get_static_value(x)
        is_float = found is not None and expected.dtype.is_floating
        if is_float and np.all(number == np.asarray(_SCALE, number.dtype)):
            scales.add(float(found))
            return True
        return np.array_equal(number, found)
    if one.type != other.type or len(one.inputs) != len(other.inputs):
        return False
    return _attributes(one) == _attributes(other) and all(
        _is_same(*pair, known, scales) for pair in zip(one.inputs, other.inputs)
    )


def _attributes(operation):
    found = {name: str(x) for name, x in operation.node_def.attr.items()}
    if equation := found.get("equation"):
        # The letters are of no account.
        letters = dict.fromkeys(filter(str.isalpha, equation))
        found["equation"] = equation.translate(
            {ord(x): str(i) for i, x in enumerate(letters)}
        )
    return found
