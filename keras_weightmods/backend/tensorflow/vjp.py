"""A function's value together with its gradients, on TensorFlow."""

import tensorflow as tf


def vjp(function, *inputs):
    """Return `function(*inputs)`, and its pullback; as `vjp` on JAX."""
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        output = function(*inputs)

    def pullback(upstream):
        return tape.gradient(
            output,
            inputs,
            upstream,
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )

    return output, pullback
