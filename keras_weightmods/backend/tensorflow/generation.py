"""`generate` of KerasHub's language models on TensorFlow, all of it by XLA.

Keras compiles with XLA only where it is told to, so that KerasHub's `generate`
runs op by op on a CPU.
"""

import functools

import tensorflow as tf
from keras import ops

from keras_weightmods.backend.generation import CannotCompile, Generation

# XLA takes long: `max_length` is rounded up to multiples of this.
LENGTH_STEP = 64


class CompiledGenerate(Generation):
    """`Generation` by one program of XLA."""

    def __init__(self, *args):
        super().__init__(*args)
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
        model, sampler = self.model, self.model.sampler
        plain, run_loop = _plain(model), sampler.run_loop

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

        def until_length(cond, body, **kwargs):
            def both(prompt, cache, index, mask):
                is_within = index < tf.cast(length, index.dtype)
                return tf.logical_and(
                    is_within, cond(prompt, cache, index, mask)
                )

            return run_loop(both, body, **kwargs)

        inputs = {"token_ids": tokens, "padding_mask": mask}
        with (
            self.replaced_attributes(model, call_with_cache=call_with_cache),
            self.replaced_attributes(sampler, run_loop=until_length),
        ):
            return model.generate_step(inputs, stops)


def _plain(model):
    return type(model).call_with_cache.__get__(model)
