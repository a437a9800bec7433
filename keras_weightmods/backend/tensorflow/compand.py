"""`compand` on TensorFlow in training: the compiled kernels on a CPU."""

import tensorflow as tf

from keras_weightmods import native
from keras_weightmods.backend.tensorflow import sparse_matmul
from keras_weightmods.backend.tensorflow.xla_calls import call


def is_native(v):
    """Return whether `compand` can be taken."""
    return (
        v.dtype == tf.float32
        and v.shape.is_fully_defined()
        and native.has_vectors()
        and not sparse_matmul.reason_unavailable()
    )


# AutoGraph would rewrite the nested functions.
@tf.autograph.experimental.do_not_convert
def compand(v, a, b, forward, backward):
    """`a * arctan(v / b)`; the arguments are those of `compand` on JAX."""

    @tf.custom_gradient
    def apply(v, a, b):
        (w,) = call("kwm_xla_compand", [v.shape], v, a, b)
        cached = tf.stop_gradient(w)

        def gradient(upstream):
            return differentiate(v, cached, upstream, a, b)

        return w, gradient

    @tf.custom_gradient
    def differentiate(v, cached, upstream, a, b):
        shapes = [v.shape, a.shape, b.shape]
        arguments = v, cached, upstream, a, b
        results = call("kwm_xla_compand_gradient", shapes, *arguments)

        def gradient(*upstreams):
            inputs = v, upstream, a, b
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                again = backward(v, forward(v, a, b), upstream, a, b)
            to_v, to_upstream, to_a, to_b = tape.gradient(
                again, inputs, upstreams
            )
            return to_v, None, to_upstream, to_a, to_b

        return results, gradient

    return apply(v, a, b)
