"""`generate` of KerasHub's language models on JAX, with a cache in parts.

KerasHub compiles `generate_step` as a whole. It reads prompts as long as the
text is to become, and stacks the caches of the layers anew for each token.
"""

import jax
import jax.numpy as jnp
import keras

from keras_weightmods.backend.generation import (
    CannotCompile,
    bounded,
    view_of,
)
from keras_weightmods.backend.jax import shared_inputs, traced_call

# XLA takes long: `max_length` is rounded up to multiples of this.
LENGTH_STEP = 64


class CompiledGenerate:
    """See that of torch; by one program of XLA, with a cache in parts."""

    def __init__(self, model):
        self.model = model
        self.done = set()
        self.function = jax.jit(
            self._generate,
            static_argnames=("prefill", "stop_token_ids", "sampler"),
        )

    def __call__(self, tokens, mask, length, known, prefill, stop_token_ids):
        """Generate; see `backend.torch.generation`."""
        sampler = self.model.sampler
        if stop_token_ids is not None:
            stop_token_ids = tuple(map(int, stop_token_ids))
        key = tokens.shape, prefill, stop_token_ids, sampler
        try:
            outputs, values = self.function(
                {"token_ids": tokens, "padding_mask": mask},
                length,
                [v.value for v in sampler.variables],
                [v.value for v in self.model.variables],
                prefill=prefill,
                stop_token_ids=stop_token_ids,
                sampler=sampler,
            )
        except (TypeError, ValueError, jax.errors.JAXTypeError) as error:
            if key in self.done:
                raise
            raise CannotCompile(str(error).strip().splitlines()[0]) from error
        self.done.add(key)
        for variable, value in zip(sampler.variables, values):
            variable.assign(value)
        return {name: x[:, :length] for name, x in outputs.items()}

    def _generate(
        self,
        inputs,
        length,
        sampler_values,
        values,
        prefill,
        stop_token_ids,
        sampler,
    ):
        model = self.model
        run = _Run(model, prefill)
        view = view_of(
            model,
            call_with_cache=run.call_with_cache,
            sampler=bounded(sampler, length),
        )
        variables = [*sampler.variables, *model.variables]
        mapping = zip(variables, [*sampler_values, *values])
        with keras.StatelessScope(state_mapping=mapping) as scope:
            outputs = view.generate_step(inputs, stop_token_ids)
        return outputs, [scope.get_current_value(v) for v in sampler.variables]


class _Run:
    """One batch, as it is traced: what stands in for parts of the model."""

    def __init__(self, model, prefill):
        self.prefill = prefill
        self.plain = shared_inputs.in_one_call(model.call_with_cache)

    def call_with_cache(
        self, token_ids, cache=None, cache_update_index=None, *args, **kwargs
    ):
        given = [*args, *kwargs.values()]
        if any(x is not None for x in given) or cache is None:
            raise CannotCompile(
                "its `call_with_cache` gets more than tokens, one cache and a "
                "place in it"
            )
        inputs = token_ids, cache, cache_update_index
        if isinstance(cache_update_index, jax.Array):
            return self._call(self.plain, *inputs)
        if cache_update_index != 0:
            raise CannotCompile("it does not begin at the start of its cache")
        return self._first(token_ids, cache)

    def _first(self, token_ids, cache):
        """Read the prompts, up to the length of the shortest and some more.

        What follows in the others is read as the tokens are generated.
        """
        size = token_ids.shape[1]
        token_ids = token_ids[:, : self.prefill]
        logits, hidden_states, cache = self._call(
            lambda *inputs: self.plain(*inputs, 0), token_ids, cache
        )
        rest = (0, 0), (0, size - self.prefill), (0, 0)
        # A step says in which parts it makes the next cache.
        cache = traced_call.whole(cache)
        _, _, stack = jax.eval_shape(
            lambda *inputs: self._call(self.plain, *inputs),
            token_ids[:, :1],
            cache,
            jnp.int32(0),
        )
        return (
            logits,
            jnp.pad(hidden_states, rest),
            traced_call.split_like(cache, stack),
        )

    def _call(self, function, token_ids, cache, *index):
        return traced_call.call(
            function, token_ids, cache, *index, key_shape=cache.shape[-3:]
        )
