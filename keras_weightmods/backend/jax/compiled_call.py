"""Functions and layers, compiled, without the rest of a trainer."""

import jax


def compiled_call(layer):
    """A compiled function from what `layer.call` takes to what it returns.

    `Model.predict_on_batch` hands all weights out and takes them back, which
    for a language model takes as long as a row of tokens does.
    """

    @jax.jit
    def stateless(trainable, non_trainable, inputs):
        outputs, _ = layer.stateless_call(
            trainable, non_trainable, inputs, training=False
        )
        return outputs

    def call(inputs):
        return stateless(
            [v.value for v in layer.trainable_variables],
            [v.value for v in layer.non_trainable_variables],
            inputs,
        )

    return call


def compiled(function, static=()):
    """A function, compiled once for the shapes and static arguments given.

    Args:
        function: Of tensors, and of the arguments that are static.
        static: Tuple of ints, the places of these.

    Returns:
        The compiled function.
    """
    compiled = jax.jit(function, static_argnums=static)

    def call(*args):
        # Also where a forward pass is run op by op.
        with jax.disable_jit(False):
            return compiled(*args)

    return call
