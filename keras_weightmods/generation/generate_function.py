"""The replacement of a language model's compiled `generate`."""

import inspect
import warnings
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_weightmods import backend
from keras_weightmods.backend.generation import (
    CannotCompile,
    check_arguments,
    difference,
    is_pairs,
    logits_at,
    view_of,
)
from keras_weightmods.core.keras_compat import layers_of
from keras_weightmods.core.reparameterization import reparameterizations
from keras_weightmods.utils import huge_pages
from keras_weightmods.utils.progress import Waiting

_SHORTEST_PREFILL = 16
# Positions whose logits are compared.
_COMPARED = 32


class GenerateFunction:
    """Replaces `make_generate_function` of a model.

    Args:
        model: A `keras_hub.models.CausalLM`.
        verbose: 0 or 1, whether waiting for a compilation is shown.
    """

    def __init__(self, model, verbose):
        self.model = model
        self.verbose = verbose
        self.structure: list[Any] = []
        self.warned: set[str] = set()

    def __call__(self):
        return self.generate

    def generate(self, inputs, stop_token_ids=None):
        # KerasHub's samplers fail on an empty list.
        stop_token_ids = stop_token_ids or None
        structure = _structure(self.model)
        if [*map(id, structure)] != [*map(id, self.structure)]:
            self.structure, self.reason, self.shapes = structure, "", set()
            self.rounds_inputs = _rounds_inputs(self.model)
            # On TensorFlow a view is a copy.
            if keras.backend.backend() != "tensorflow":
                view = backend.current().view_of
                huge_pages.collapse(view(v.value) for v in self.model.variables)
            generation = backend.current().generation()
            self.length_step = generation.LENGTH_STEP
            self.compiled = generation.CompiledGenerate(
                self.model, self.rounds_inputs
            )
        reason = self.reason or self._reason_against(inputs)
        if not reason:
            try:
                return self._compiled(inputs, stop_token_ids)
            except CannotCompile as error:
                reason = self.reason = str(error)
        if reason not in self.warned:
            self.warned.add(reason)
            warnings.warn(
                f"`generate` of {self.model.name!r} runs as without "
                f"`compile_generate`: {reason}."
            )
        function = type(self.model).make_generate_function(self.model)
        return function(inputs, stop_token_ids=stop_token_ids)

    def _compiled(self, inputs, stop_token_ids):
        tokens, mask = (
            ops.convert_to_numpy(inputs[name])
            for name in ("token_ids", "padding_mask")
        )
        mask = mask.astype(bool)
        length = tokens.shape[1]
        known = int(mask.sum(-1).min())
        prefill = min(_rounded(known, _SHORTEST_PREFILL), length)
        step = self.length_step
        padded = length if step is None else _rounded(length, step)
        padding = (0, 0), (0, padded - length)
        # No stop token, and never used.
        tokens = np.pad(tokens, padding, constant_values=-1)
        mask = np.pad(mask, padding)
        stops = stop_token_ids and tuple(map(int, stop_token_ids))
        shape = tokens.shape[0], padded, prefill, stops, self.model.sampler
        is_new = shape not in self.shapes
        with Waiting("Compiling `generate`", self.verbose and is_new):
            try:
                if not self.shapes:
                    self._check_short_prompt(
                        tokens, mask, length, known, prefill
                    )
                self.shapes.add(shape)
                return self.compiled(tokens, mask, length, prefill, stops)
            except self.compiled.errors as error:
                if not is_new:
                    raise
                reason = str(error).strip().partition("\n")[0]
                raise CannotCompile(reason) from error

    def _reason_against(self, inputs):
        """Return why the compiled step does not fit; empty if it does."""
        from keras_hub.samplers import Sampler

        model, kind = self.model, type(self.model.sampler)
        for name in ("__call__", "run_loop"):
            if getattr(kind, name) is not getattr(Sampler, name):
                return f"the sampler {kind.__name__} has a loop of its own"
        if not hasattr(model, "call_with_cache"):
            return "it has no `call_with_cache`"
        names = list(inspect.signature(model.call_with_cache).parameters)
        if names[:3] != ["token_ids", "cache", "cache_update_index"]:
            return f"its `call_with_cache` takes {names}"
        given = {name for name, x in inputs.items() if x is not None}
        if others := sorted(given - {"token_ids", "padding_mask"}):
            return f"it is given {others} beside tokens"
        mask = ops.convert_to_numpy(inputs["padding_mask"])
        return "" if mask.any(-1).all() else "a prompt is empty"

    def _check_short_prompt(self, tokens, mask, length, known, prefill):
        """Compare the first logits of a prompt, read short and read whole.

        Args:
            tokens: Integer array of shape (batch, padded length).
            mask: Bool array of that shape, True for the prompts' tokens.
            length: Int, the length to generate to.
            known: Int, the length of the shortest prompt.
            prefill: Int from `known` to `length`, the tokens to read at first.

        Raises:
            CannotCompile: If they differ.
        """

        def call_with_cache(token_ids, cache, cache_update_index, **more):
            check_arguments(cache, more, is_pairs(cache))
            if ops.is_tensor(cache_update_index):
                raise CannotCompile("it does not read the prompt at first")

            # The last: they see most of the others.
            places = slice(max(0, known - _COMPARED), known)
            read = self.compiled.read(logits_at(self.model, places))
            token_ids = token_ids[:, :length]
            whole = read(token_ids, cache, more)
            short = read(token_ids[:, :prefill], cache, {})
            reason = difference(short, whole, self.rounds_inputs)
            if self.rounds_inputs and not reason:
                # Changes from other tokens at the empty places alone, at the
                # same length, are compared more closely.
                other_ids = ops.cast(token_ids == 0, token_ids.dtype)
                is_empty = ops.arange(length) >= known
                others = ops.where(is_empty, other_ids, token_ids)
                again = read(others, cache, {})
                reason = difference(again, whole, False)
            raise _Read(reason)

        # One row is enough.
        shortest = [mask.sum(-1).argmin()]
        inputs = {
            "token_ids": ops.convert_to_tensor(tokens[shortest]),
            "padding_mask": ops.convert_to_tensor(mask[shortest]),
        }
        view = view_of(self.model, call_with_cache=call_with_cache)
        try:
            # On torch this keeps no gradients.
            with backend.current().full_precision():
                view.generate_step(inputs, None)
        except _Read as read:
            if read.args[0]:
                raise CannotCompile(
                    "the first tokens give other logits where other tokens "
                    f"follow, or fewer: they differ by {read}"
                ) from None


class _Read(Exception):
    """Carries a reason out of `generate_step`."""


def _rounds_inputs(model):
    return any(x.rounds_inputs for x in reparameterizations(model)) or any(
        getattr(layer, "quantization_mode", None) for layer in layers_of(model)
    )


def _rounded(length, step):
    """Round a length up, by less than `step` or less than a quarter."""
    while 4 * step < length // 2:
        step *= 2
    return -(-length // step) * step


def _structure(model):
    """List the objects that compiled functions depend on."""
    layers = layers_of(model)
    return [*(v.value for v in model.variables), *layers, *map(type, layers)]
