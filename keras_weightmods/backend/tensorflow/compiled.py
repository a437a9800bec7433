"""Functions on TensorFlow that are compiled also where the step is not."""

import tensorflow as tf


def compiled(function):
    """Compile a pure function of tensors with XLA.

    Keras compiles the train step of only some models. Op by op, each
    operation would read and write whole kernels through memory.

    Args:
        function: Takes tensors, nests of them, and values that are part of
            the program.

    Returns:
        A function of the same arguments, by position.
    """
    # One each, or TensorFlow warns of retracing where there are many shapes.
    functions = {}

    def call(*args):
        args = tf.nest.map_structure(_dense, args)
        key = tuple(
            tuple(x.shape) if tf.is_tensor(x) else x
            for x in tf.nest.flatten(args)
        )
        if key not in functions:
            functions[key] = tf.function(
                function, autograph=False, jit_compile=True
            )
        return functions[key](*args)

    return call


def _dense(x):
    """A tensor for a variable, of TensorFlow or Keras, or sparse gradient."""
    return tf.convert_to_tensor(x) if hasattr(x, "dtype") else x
