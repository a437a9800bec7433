"""`generate` of KerasHub's language models on TensorFlow, all of it by XLA.

Keras uses XLA only on request, so KerasHub's `generate` runs op by op on a CPU.
"""

import tensorflow as tf

from keras_weightmods.backend.generation import Steps
from keras_weightmods.backend.stack import split_like, whole
from keras_weightmods.backend.tensorflow.traced_call import Traced

# XLA compiles slowly: `max_length` is rounded up to multiples of this.
LENGTH_STEP = 64


class CompiledGenerate(Steps):
    """See the one of torch. This one is a single XLA program."""

    errors = (*Steps.errors, tf.errors.OpError)

    def __init__(self, model, rounds_inputs):
        super().__init__(model, rounds_inputs)
        self.functions = {}

    def __call__(self, tokens, mask, length, prefill, stop_token_ids):
        shape = tokens.shape, tokens.dtype, prefill
        key = *shape, stop_token_ids, self.model.sampler
        if key not in self.functions:

            def generate(tokens, mask, length):
                inputs = {"token_ids": tokens, "padding_mask": mask}
                return self.generate(inputs, length, prefill, stop_token_ids)

            self.functions[key] = tf.function(
                generate, jit_compile=True, autograph=False
            )
        inputs = tf.constant(tokens), tf.constant(mask), tf.constant(length)
        outputs = self.functions[key](*inputs)
        self.traced = None
        return {name: x[:, :length] for name, x in outputs.items()}

    def first(self, token_ids, cache):
        key_shape = cache.shape[-3:]
        prompt = Traced(super().first, [token_ids, cache], key_shape)
        *outputs, cache = prompt(token_ids, cache)
        cache = whole(cache)
        # A step determines the parts of the next cache.
        inputs = [token_ids[:, :1], cache, tf.constant(0)]
        self.traced = Traced(super().step, inputs, key_shape)
        return *outputs, split_like(cache, self.traced.results[2])

    def step(self, *inputs):
        return self.traced(*inputs)
