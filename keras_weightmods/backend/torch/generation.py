"""`generate` of KerasHub's language models on torch, without Keras in a step.

The model's `call_with_cache` is recorded (see `recorded_call`) for one shape,
and what was recorded stands in for it while KerasHub's own `generate_step`
runs. The keys and values are written into the one cache in place.
"""

import torch

from keras_weightmods.backend.generation import CannotCompile, view_of
from keras_weightmods.backend.torch import recorded_call
from keras_weightmods.backend.torch.rewrites import Rewrites

# `max_length` is not rounded up: to record anew takes seconds.
LENGTH_STEP = None
_RECORDINGS = 16  # that a model keeps

# How far the logits may be off, as a share of the largest, by their type.
_TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-3}
# In half precision: how far a row may be off in the mean, as a share of its
# spread. What is added to a whole row, which changes no probability, does not
# count. With right steps rows were off by up to 0.03, where one of 49,152
# logits was by 6 % of the largest; at the place before theirs by 0.14 to 0.8.
_TOLERANCE = 0.1
# In the mean of all, where inputs are rounded to int8: a step of that makes
# much of any rounding before it.
_ROUNDED_TOLERANCE = 0.1


class CompiledGenerate:
    """`generate` on a batch of tokens by a step that was recorded.

    Args:
        model: A `keras_hub.models.CausalLM`, as it is now.
    """

    def __init__(self, model):
        self.model = model
        self.recorded = {}

    def __call__(self, tokens, mask, length, known, prefill, stop_token_ids):
        """Generate; the tokens are padded past `length`.

        Args:
            tokens: Integer array of shape (batch, padded length).
            mask: Bool array of that shape, True for the prompts' tokens.
            length: Int, the length to generate to.
            known: Int, the length of the shortest prompt.
            prefill: Int from `known` to `length`, the tokens to read at first.
            stop_token_ids: As of `generate`.

        Returns:
            Dict of tensors of shape (batch, length).

        Raises:
            CannotCompile: Before any random number is drawn.
        """
        model = self.model
        run = _Run(self, length, prefill)
        sampler = model.sampler
        others = {
            "call_with_cache": run.call_with_cache,
            "sampler": lambda **kwargs: run.sample(sampler, **kwargs),
        }
        inputs = {"token_ids": tokens, "padding_mask": mask}
        device = model.variables[0].value.device
        inputs = {
            name: torch.from_numpy(x).to(device) for name, x in inputs.items()
        }
        with torch.no_grad():
            view = view_of(model, **others)
            outputs = view.generate_step(inputs, stop_token_ids)
        return {name: x[:, :length] for name, x in outputs.items()}


class _Run:
    """One batch: what stands in for parts of the model, and its state."""

    def __init__(self, compiled, length, prefill):
        self.recorded = compiled.recorded
        self.model = compiled.model
        self.length = length
        self.prefill = prefill
        self.expected_cache = None
        self.plain = self.model.call_with_cache

    def call_with_cache(
        self, token_ids, cache=None, cache_update_index=None, *args, **kwargs
    ):
        given = [*args, *kwargs.values()]
        if any(x is not None for x in given) or not _is_tensor(cache):
            raise CannotCompile(
                "its `call_with_cache` gets more than tokens, one cache and a "
                "place in it"
            )
        if _is_tensor(cache_update_index):
            return self._step(token_ids, cache, cache_update_index)
        if cache_update_index != 0:
            raise CannotCompile("it does not begin at the start of its cache")
        return self._first(token_ids, cache)

    def _first(self, token_ids, cache):
        """Read the prompts, up to the length of the shortest and some more.

        What follows in the others is read as the tokens are generated.
        """
        size = token_ids.shape[1]
        step_key = _key(token_ids[:, :1], cache)
        if step_key not in self.recorded:
            # Nothing generated depends on what lies past `length`.
            tokens = token_ids[:, : self.length]
            _, _, self.expected_cache = self.plain(
                tokens, torch.zeros_like(cache), 0
            )
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
        hidden_states, cache = self.recorded[key](token_ids, cache)
        if hidden_states.shape[1] != size:
            hidden_states = torch.nn.functional.pad(
                hidden_states, (0, 0, 0, size - hidden_states.shape[1])
            )
        return None, hidden_states, cache

    def _step(self, token_ids, cache, index):
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
        def recordable(recorder, *inputs):
            with Rewrites(recorder):
                return function(*inputs)

        weights = [v.value for v in self.model.variables]
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
        """As `Sampler.__call__` does, to `length`, the loop alone by torch."""
        padded = prompt
        prompt = prompt[:, : self.length].clone()
        mask = mask[:, : self.length].bool()
        stops = None
        if stop_token_ids is not None:
            stops = torch.tensor([*stop_token_ids], device=prompt.device)
        for i in range(int(index), self.length):
            if stops is not None:
                ended = torch.isin(prompt, stops) & ~mask
                if bool(ended.any(-1).all()):
                    break
            place = torch.tensor(i, dtype=torch.int32, device=prompt.device)
            logits, _, cache = next(prompt, cache, place)
            probabilities = sampler.compute_probabilities(logits)
            token = sampler.get_next_token(probabilities).to(prompt.dtype)
            prompt[:, i] = torch.where(mask[:, i], prompt[:, i], token)
        rest = padded[:, self.length :]
        return torch.cat([prompt, rest], 1)


def _is_tensor(x):
    return isinstance(x, torch.Tensor)


def _key(token_ids, cache):
    return token_ids.shape, token_ids.dtype, cache.shape, cache.dtype


def _check(logits, expected, rounds_inputs):
    """Raise CannotCompile unless the logits are those expected."""
    tolerance = _TOLERANCES.get(logits.dtype, _TOLERANCE)
    expected = expected.float()
    pair = logits.float() - expected, expected
    if rounds_inputs:
        tolerance = _ROUNDED_TOLERANCE
        off, size = (x.square().mean().sqrt() for x in pair)
    elif logits.dtype in _TOLERANCES:
        off, size = (x.abs().max() for x in pair)
    else:
        off, size = (x.std(-1) for x in pair)
    # Where the model gives NaN, there is nothing to compare.
    is_broken = off.isnan() & size.isfinite()
    if (is_broken | (off > tolerance * size)).any():
        raise CannotCompile(
            "a recorded step gives other logits than the model: they differ "
            f"by {float(off.max()):.3g}, of {float(size.max()):.3g}"
        )
