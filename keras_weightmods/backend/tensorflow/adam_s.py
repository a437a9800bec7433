"""The AdamS update on TensorFlow, compiled also where the step is not."""

import tensorflow as tf


def compiled(step):
    """Compiles `AdamS._stepped` with XLA, once for each shape.

    Keras compiles the train step of only some models. Run op by op, the
    update would read and write whole kernels through memory two dozen times.

    Args:
        step: The bound method.

    Returns:
        A function with the signature of `step`.
    """
    function = tf.function(step, autograph=False, jit_compile=True)

    def call(state, gradient, rate, step, axes, decay_rate):
        # Here they may be variables still, and a gradient sparse.
        state = {k: tf.convert_to_tensor(v) for k, v in state.items()}
        gradient = tf.convert_to_tensor(gradient)
        return function(state, gradient, rate, step, axes, decay_rate)

    return call
