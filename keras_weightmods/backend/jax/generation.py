"""`generate` of KerasHub's language models on JAX, with a cache in parts.

KerasHub compiles `generate_step` as a whole. It reads each prompt at the length
of the finished text, and stacks the caches of the layers anew for each token.
"""

import jax
import jax.numpy as jnp
import keras

from keras_weightmods.backend.generation import Steps
from keras_weightmods.backend.jax import traced_call
from keras_weightmods.backend.stack import split_like, whole

# XLA compiles slowly: `max_length` is rounded up to multiples of this.
LENGTH_STEP = 64


class CompiledGenerate(Steps):
    """Like that of torch, by a single XLA program with a cache in parts."""

    def __init__(self, model, rounds_inputs):
        super().__init__(model, rounds_inputs)
        self.function = jax.jit(
            self._generate,
            static_argnames=("prefill", "stop_token_ids", "sampler"),
        )

    def __call__(self, tokens, mask, length, prefill, stop_token_ids):
        sampler = self.model.sampler
        outputs, values = self.function(
            {"token_ids": tokens, "padding_mask": mask},
            length,
            [v.value for v in [*sampler.variables, *self.model.variables]],
            prefill=prefill,
            stop_token_ids=stop_token_ids,
            sampler=sampler,
        )
        for variable, value in zip(sampler.variables, values):
            variable.assign(value)
        return {name: x[:, :length] for name, x in outputs.items()}

    def _generate(
        self, inputs, length, values, *, prefill, stop_token_ids, sampler
    ):
        variables = [*sampler.variables, *self.model.variables]
        with keras.StatelessScope(zip(variables, values)) as scope:
            outputs = self.generate(inputs, length, prefill, stop_token_ids)
        return outputs, [scope.get_current_value(v) for v in sampler.variables]

    def read(self, call):
        # One program: op by op XLA would compile some hundred.
        read, variables = super().read(call), self.model.variables

        @jax.jit
        def compiled(values, *inputs):
            with keras.StatelessScope(zip(variables, values)):
                return read(*inputs)

        return lambda *inputs: compiled([v.value for v in variables], *inputs)

    def first(self, token_ids, cache):
        logits, hidden_states, cache = _traced(super().first, token_ids, cache)
        cache = whole(cache)
        # A step determines the parts of the next cache.
        inputs = token_ids[:, :1], cache, jnp.int32(0)
        stack = jax.eval_shape(self.step, *inputs)[2]
        return logits, hidden_states, split_like(cache, stack)

    def step(self, *inputs):
        return _traced(super().step, *inputs)


def _traced(function, token_ids, cache, *index):
    return traced_call.call(
        function, token_ids, cache, *index, key_shape=cache.shape[-3:]
    )
