"""`generate` of KerasHub's language models on torch, without Keras in a step.

The model's `call_with_cache` is recorded (see `recorded_call`) for one shape,
and what was recorded stands in for it while KerasHub's own `generate_step`
runs. The keys and values are written into the one cache in place.
"""

import keras
import torch

from keras_weightmods.backend.generation import (
    CannotCompile,
    Steps,
    difference,
)
from keras_weightmods.backend.torch import recorded_call
from keras_weightmods.backend.torch.rewrites import Rewrites

# `max_length` is not rounded up: to record anew takes seconds.
LENGTH_STEP = None
_RECORDINGS = 16  # that a model keeps


class CompiledGenerate:
    """`generate` on a batch of tokens by a step that was recorded.

    Args:
        model: A `keras_hub.models.CausalLM`, as it is now.
    """

    def __init__(self, model):
        self.model = model
        self.recorded = {}

    def __call__(self, tokens, mask, length, prefill, stop_token_ids):
        """Generate.

        Args:
            tokens: Integer array of shape (batch, `length` or, rounded up,
                a multiple of `LENGTH_STEP`).
            mask: Bool array of that shape, True for the prompts' tokens.
            length: Int, the length to generate to.
            prefill: Int, the tokens to read at first, as many as the shortest
                prompt has or more.
            stop_token_ids: Tuple of ints, or None.

        Returns:
            Dict of tensors of shape (batch, length).

        Raises:
            CannotCompile: Before any random number is drawn.
        """
        device = self.model.variables[0].value.device
        inputs = {"token_ids": tokens, "padding_mask": mask}
        inputs = {
            name: torch.from_numpy(x).to(device) for name, x in inputs.items()
        }
        steps = _Recorded(self.model, prefill, self.recorded)
        with torch.no_grad():
            return steps.generate(inputs, length, stop_token_ids)


class _Recorded(Steps):
    """`Steps` that are recorded at their first use."""

    def __init__(self, model, prefill, recorded):
        super().__init__(model, prefill)
        self.plain = model.call_with_cache
        self.recorded = recorded
        self.expected_cache = None

    def sampler(self, length):
        sampler = self.model.sampler

        # As the sampler's own loop, without Keras' work for each operation.
        def sample(
            next, prompt, cache, index, mask, stop_token_ids=None, **kwargs
        ):
            prompt, mask = prompt.clone(), mask.bool()
            stops = None
            if stop_token_ids is not None:
                stops = torch.tensor([*stop_token_ids], device=prompt.device)
            for i in range(int(index), length):
                if stops is not None:
                    ended = torch.isin(prompt, stops) & ~mask
                    if bool(ended.any(-1).all()):
                        break
                place = torch.tensor(i, dtype=torch.int32, device=mask.device)
                logits, _, cache = next(prompt, cache, place)
                probabilities = sampler.compute_probabilities(logits)
                token = sampler.get_next_token(probabilities).to(prompt.dtype)
                prompt[:, i] = torch.where(mask[:, i], prompt[:, i], token)
            return prompt

        return sample

    def first(self, token_ids, cache):
        if _key(token_ids[:, :1], cache) not in self.recorded:
            own_cache = torch.zeros_like(cache)
            self.expected_cache = self.plain(token_ids, own_cache, 0)[2]
        token_ids = token_ids[:, : self.prefill]
        key = _key(token_ids, cache)
        if key not in self.recorded:
            self.recorded[key] = self._record(
                # The logits are not used.
                lambda tokens, cache: self.plain(tokens, cache, 0)[1:],
                # Other tokens: their numbers must not be part of it.
                token_ids.flip(1).contiguous(),
                cache.clone(),
            )
        return None, *self.recorded[key](token_ids, cache)

    def step(self, token_ids, cache, index):
        key = _key(token_ids, cache)
        if key in self.recorded:
            return self.recorded[key](token_ids, cache, index)
        if self.expected_cache is None:
            raise CannotCompile("it does not read the prompt at first")
        other_index = index - 1 if index > 0 else index + 1
        recorded = self._record(
            self.plain, torch.zeros_like(token_ids), cache.clone(), other_index
        )
        expected, _, _ = self.plain(token_ids, self.expected_cache, index)
        outputs = recorded(token_ids, cache, index)
        _check(outputs[0], expected, recorded.rounds_inputs)
        self.expected_cache = None
        self.recorded[key] = recorded
        return outputs

    def _record(self, function, *inputs):
        variables = self.model.variables
        weights = [v.value for v in variables]

        def recordable(weights, *inputs):
            mapping = zip(variables, weights)
            with keras.StatelessScope(mapping), Rewrites(inputs, weights):
                return function(*inputs)

        try:
            recorded, expected = recorded_call.record(
                recordable, inputs, weights
            )
            received = recorded(*inputs)
        except Exception as error:
            # Keras changes the type of an error that goes through a layer.
            raise CannotCompile(str(error)) from error
        _check(received[0], expected[0], recorded.rounds_inputs)
        while len(self.recorded) >= _RECORDINGS:
            self.recorded.pop(next(iter(self.recorded)))
        return recorded


def _key(token_ids, cache):
    return token_ids.shape, token_ids.dtype, cache.shape, cache.dtype


def _check(logits, expected, rounds_inputs):
    if reason := difference(logits, expected, rounds_inputs):
        raise CannotCompile(
            "a recorded step gives other logits than the model: they differ "
            f"by {reason}"
        )
