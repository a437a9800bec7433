import keras
import numpy as np
import pytest
from keras import ops

from keras_weightmods.backend.stack import Stack, split_like, whole
from tests.models import normal

if keras.backend.backend() != "tensorflow":
    pytest.skip("needs the TensorFlow backend", allow_module_level=True)

import tensorflow as tf

from keras_weightmods.backend.tensorflow import traced_call


def traced(function, *inputs):
    """Return the results, and the operations that compute them."""
    operations = []

    @tf.function(autograph=False)
    def run(*inputs):
        results = traced_call.Traced(function, inputs, None)(*inputs)
        graph = tf.compat.v1.get_default_graph()
        operations.extend(graph.get_operations())
        return results

    return run(*inputs), operations


def step(x, cache, place):
    layers = []
    for i in range(cache.shape[1]):
        keys, values = cache[:, i, ...][:, 0], cache[:, i][:, 1, ...]
        keys = ops.slice_update(keys, (0, place, 0), x[:, None])
        values = ops.relu(values) + i
        x = x + ops.sum(keys, 1) * ops.mean(values, 1)
        layers.append(ops.stack([keys, values], axis=1))
    return x, ops.stack(layers, axis=1)


def test_a_cache_in_parts_gives_the_same():
    cache = ops.convert_to_tensor(normal(2, 3, 2, 5, 4))
    x, place = ops.ones((2, 4)), ops.convert_to_tensor(2)
    expected, expected_cache = step(x, cache, place)
    (_, parts), _ = traced(step, x, cache, place)
    assert isinstance(parts, Stack)
    assert parts.shape == cache.shape
    assert all(isinstance(part, Stack) for part in parts.parts)
    parts = split_like(cache, parts)
    (y, parts), operations = traced(step, x, parts, place)
    np.testing.assert_allclose(y, expected, rtol=1e-6)
    np.testing.assert_allclose(whole(parts), expected_cache, rtol=1e-6)
    # Nothing whole is made.
    outs = [out for operation in operations for out in operation.outputs]
    sizes = [x.shape.num_elements() or 0 for x in outs if x.shape.rank]
    assert max(sizes) == 2 * 5 * 4


@pytest.mark.parametrize(
    "function",
    [
        lambda x: ops.sum(x[:, 1:], 1),
        lambda x: x[:, :, 0],
        lambda x: x[:, ::2],
        lambda x: x[:, None, 0],
        lambda x: x[1:, 0],
        lambda x: x[:, 0, 1:],
        lambda x: x[..., 1],
        lambda x: x[:, -1],
        lambda x: ops.stack([x[:, 0], x[:, 2] * 2], axis=2),
        lambda x: x[:, 1, ...] + 1,
        lambda x: ops.sin(x),
        lambda x: x,
    ],
)
def test_what_is_no_stack_is_made_whole(function):
    x = tf.reshape(tf.range(24.0), (2, 3, 4))
    stack = Stack(1, [x[:, i] for i in range(3)])
    (found,), _ = traced(lambda x: [function(x)], stack)
    np.testing.assert_array_equal(whole(found), function(x))


def test_variables_are_read_when_it_runs():
    variable = keras.Variable([1.0, 2.0])

    @tf.function(autograph=False)
    def run(x):
        call = traced_call.Traced(lambda x: [x * variable], [x], None)
        return call(x)[0]

    np.testing.assert_array_equal(run(tf.ones(2)), [1, 2])
    variable.assign([3.0, 4.0])
    np.testing.assert_array_equal(run(tf.ones(2)), [3, 4])
