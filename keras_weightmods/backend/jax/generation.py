"""`generate` of KerasHub's language models on JAX, with a cache in parts.

KerasHub compiles `generate_step` as a whole. It reads prompts as long as the
text is to become, and stacks the caches of the layers anew for each token.
"""

from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np

from keras_weightmods.backend.attention import attention_by_kernel
from keras_weightmods.backend.generation import CannotCompile, Generation
from keras_weightmods.backend.jax import shared_inputs, stacks
from keras_weightmods.backend.jax.attention import kernel

# XLA takes long: `max_length` is rounded up to multiples of this.
LENGTH_STEP = 64


class CompiledGenerate(Generation):
    """`Generation` by one program of XLA, with a cache in parts."""

    def __init__(self, *args):
        super().__init__(*args)
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
        run = _Run(model, length, prefill, values)
        others = {
            "call_with_cache": run.call_with_cache,
            "sampler": lambda **kwargs: run.sample(sampler, **kwargs),
        }
        with (
            _variables(zip(sampler.variables, sampler_values), run) as scope,
            self.replaced_attributes(model, **others),
            self.rotations_by(model, _constant_rotations()),
            attention_by_kernel(self.functions_by, kernel, plain_shares=True),
        ):
            outputs = model.generate_step(inputs, stop_token_ids)
        return outputs, _values_of(sampler, scope)


class _Run:
    """One batch, as it is traced: what stands in for parts of the model."""

    def __init__(self, model, length, prefill, values):
        self.model = model
        self.length = length
        self.prefill = prefill
        self.weights = list(zip(model.variables, values))
        # That of the class: the attribute is this object's.
        plain = type(model).call_with_cache.__get__(model)
        self.plain = shared_inputs.in_one_call(plain)

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
            return stacks.call(self.plain, *inputs)
        if cache_update_index != 0:
            raise CannotCompile("it does not begin at the start of its cache")
        return self._first(token_ids, cache)

    def _first(self, token_ids, cache):
        """Read the prompts, up to the length of the shortest and some more.

        What follows in the others is read as the tokens are generated.
        """
        size = token_ids.shape[1]
        token_ids = token_ids[:, : self.prefill]
        logits, hidden_states, cache = self.plain(token_ids, cache, 0)
        rest = (0, 0), (0, size - self.prefill), (0, 0)
        # A step says in which parts it makes the next cache.
        _, _, stack = jax.eval_shape(
            lambda *inputs: stacks.call(self.plain, *inputs),
            token_ids[:, :1],
            cache,
            jnp.int32(0),
        )
        return (
            logits,
            jnp.pad(hidden_states, rest),
            stacks.split_like(cache, stack),
        )

    def sample(
        self,
        sampler,
        next,
        prompt,
        cache,
        index,
        mask,
        stop_token_ids,
        **kwargs,
    ):
        """As `Sampler.__call__` does, to `length`."""
        mask = mask.astype(bool)

        def goes_on(state):
            prompt, _, index, _ = state
            goes_on = index < self.length
            if stop_token_ids is None:
                return goes_on
            ended = jnp.isin(prompt, jnp.array(stop_token_ids)) & ~mask
            ended &= jnp.arange(prompt.shape[1]) < self.length
            return goes_on & ~ended.any(-1).all()

        def add(state):
            prompt, cache, index, values = state
            with _variables(zip(sampler.variables, values), self) as scope:
                logits, _, cache = next(prompt, cache, index)
                probabilities = sampler.compute_probabilities(logits)
                token = sampler.get_next_token(probabilities)
            token = token.astype(prompt.dtype)
            token = jnp.where(mask[:, index], prompt[:, index], token)
            prompt = prompt.at[:, index].set(token)
            return prompt, cache, index + 1, _values_of(sampler, scope)

        values = [v.value for v in sampler.variables]
        state = prompt, cache, jnp.int32(index), values
        prompt, _, _, values = jax.lax.while_loop(goes_on, add, state)
        for variable, value in zip(sampler.variables, values):
            variable.assign(value)
        return prompt


def _variables(own, run):
    return keras.StatelessScope(state_mapping=[*own, *run.weights])


def _values_of(sampler, scope):
    return [scope.get_current_value(v) for v in sampler.variables]


def _constant_rotations():
    """Make the cosines and sines of a prompt's places into constants.

    XLA would compute them anew in each layer, for each head.
    """
    # Equal ones, as those of most layers are, become one constant.
    known: dict[Any, Any] = {}

    def only_one(array):
        key = array.shape, array.dtype, np.asarray(array).tobytes()
        return known.setdefault(key, array)

    def rotation_by(plain):
        def rotation(inputs, start_index=0, *args, **kwargs):
            given = [*args, *kwargs.values()]
            if not isinstance(start_index, int) or any(
                x is not None for x in given
            ):
                return plain(inputs, start_index, *args, **kwargs)
            with jax.ensure_compile_time_eval():
                # Of what is turned, the shape alone is asked for.
                return tuple(map(only_one, plain(inputs, start_index)))

        return rotation

    return rotation_by
