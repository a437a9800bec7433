"""The AdamS update on TensorFlow, compiled also where the step is not."""

import tensorflow as tf


def compiled(function):
    """Compiles `AdamS._stepped` with XLA, once for each shape.

    Keras compiles the train step of only some models. Run op by op, the
    update would read and write whole kernels through memory two dozen times.

    Args:
        function: The bound method.

    Returns:
        A function with the signature of `function`.
    """
    # One each, or TensorFlow warns of retracing where there are many shapes.
    functions = {}

    def call(state, gradient, rate, step, axes, decay_rate):
        # Here they may be variables still, and a gradient sparse.
        state = {k: tf.convert_to_tensor(v) for k, v in state.items()}
        gradient = tf.convert_to_tensor(gradient)
        key = (tuple(gradient.shape), axes, decay_rate)
        if key not in functions:
            functions[key] = tf.function(
                function, autograph=False, jit_compile=True
            )
        return functions[key](state, gradient, rate, step, axes, decay_rate)

    return call
