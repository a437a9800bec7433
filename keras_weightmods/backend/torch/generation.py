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


class CompiledGenerate(Steps):
    """`generate` on a batch of tokens by steps recorded at their first use."""

    def __init__(self, model, rounds_inputs):
        super().__init__(model, rounds_inputs)
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
        tokens, mask = (torch.from_numpy(x).to(device) for x in (tokens, mask))
        inputs = {"token_ids": tokens, "padding_mask": mask}
        with torch.no_grad():
            return self.generate(inputs, length, prefill, stop_token_ids)

    def sampler(self, length):
        sampler = self.model.sampler

        # The sampler's own loop, without Keras' work for each operation.
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
        def read(token_ids, cache):
            # The logits are not used.
            return super(CompiledGenerate, self).first(token_ids, cache)[1:]

        return None, *self._run(read, token_ids, cache)

    def step(self, *inputs):
        return self._run(super().step, *inputs)

    def _run(self, function, token_ids, cache, *index):
        """Run a function as it was recorded for these shapes."""
        recorded = self.recorded
        key = token_ids.shape, token_ids.dtype, cache.shape, cache.dtype
        if key not in recorded:
            while len(recorded) >= _RECORDINGS:
                recorded.pop(next(iter(recorded)))
            made = self._record(function, token_ids, cache, *index)
            received, expected = (
                f(token_ids.clone(), cache.clone(), *index)[0]
                for f in (made, function)
            )
            reason = difference(received, expected, self.rounds_inputs)
            if reason:
                raise CannotCompile(
                    "a recorded step gives other logits than the model: they "
                    f"differ by {reason}"
                )
            recorded[key] = made
        return recorded[key](token_ids, cache, *index)

    def _record(self, function, token_ids, cache, *index):
        # Record with other numbers, so that these do not become constants.
        inputs = [torch.zeros_like(x) for x in (token_ids, cache)]
        inputs = [x.contiguous() for x in inputs]
        inputs += [i - 1 if i > 0 else i + 1 for i in index]
        variables = self.model.variables
        weights = [v.value for v in variables]

        def recordable(weights, *inputs):
            mapping = zip(variables, weights)
            with keras.StatelessScope(mapping), Rewrites(inputs, weights):
                return function(*inputs)

        try:
            return recorded_call.record(recordable, inputs, weights)[0]
        except Exception as error:
            # Keras changes the type of an error that goes through a layer.
            raise CannotCompile(str(error)) from error
