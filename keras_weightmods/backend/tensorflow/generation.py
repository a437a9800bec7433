"""`generate` of KerasHub's language models on TensorFlow, all of it by XLA.

Keras compiles with XLA only where it is told to, so that KerasHub's `generate`
runs op by op on a CPU.
"""

import functools

import tensorflow as tf
from keras import ops

from keras_weightmods.backend.generation import (
    CannotCompile,
    bounded,
    view_of,
)

# XLA takes long: `max_length` is rounded up to multiples of this.
LENGTH_STEP = 64


class CompiledGenerate:
    """See `CompiledGenerate` of torch; by one program of XLA."""

    def __init__(self, model):
        self.model = model
        self.functions = {}

    def __call__(self, tokens, mask, length, known, prefill, stop_token_ids):
        """Generate; see `CompiledGenerate` of torch."""
        stops = None if stop_token_ids is None else tuple(stop_token_ids)
        key = tokens.shape, tokens.dtype, prefill, stops, self.model.sampler
        inputs = tf.constant(tokens), tf.constant(mask), tf.constant(length)
        is_new = key not in self.functions
        if is_new:
            self.functions[key] = tf.function(
                functools.partial(self._generate, prefill, stops),
                jit_compile=True,
                autograph=False,
            )
        try:
            outputs = self.functions[key](*inputs)
        except (tf.errors.OpError, TypeError, ValueError) as error:
            if not is_new:
                raise
            reason = str(error).strip().splitlines()[0]
            raise CannotCompile(f"XLA does not compile it: {reason}") from error
        return {name: x[:, :length] for name, x in outputs.items()}

    def _generate(self, prefill, stops, tokens, mask, length):
        plain = self.model.call_with_cache

        def call_with_cache(token_ids, cache, cache_update_index):
            if ops.is_tensor(cache_update_index):
                return plain(token_ids, cache, cache_update_index)
            # What follows in longer prompts is read as tokens are generated.
            logits, hidden_states, cache = plain(
                token_ids[:, :prefill], cache, cache_update_index
            )
            missing = token_ids.shape[1] - prefill
            hidden_states = tf.pad(
                hidden_states, [[0, 0], [0, missing], [0, 0]]
            )
            return logits, hidden_states, cache

        view = view_of(
            self.model,
            call_with_cache=call_with_cache,
            sampler=bounded(self.model.sampler, length),
        )
        inputs = {"token_ids": tokens, "padding_mask": mask}
        return view.generate_step(inputs, stops)
