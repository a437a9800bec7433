"""What the compiled `generate` of all backends share."""

import functools
from typing import Any

import keras
import numpy as np
from keras import ops

# The largest error of any logit, by dtype, as a share of the largest logit.
_TOLERANCES = {"float32": 1e-3, "float64": 1e-3}
# The spread of the errors in a row, in half precision, as a share of the spread
# of its logits. A constant added to a whole row does not count: it changes no
# probability. Correct rows had up to 0.03, and those of the place before 0.14
# to 0.8.
_ROW_TOLERANCE = 0.1
# The root mean square of all errors, as a share of that of the logits. It holds
# where inputs are rounded. There the last digit of a sum can change an integer.
_ROUNDED_TOLERANCE = 0.1


class CannotCompile(Exception):
    """Raised if a backend cannot compile, or record and repeat, the model."""


class Steps:
    """What stands in for `call_with_cache` of a model.

    Args:
        model: A `keras_hub.models.CausalLM`, as it is now.
        rounds_inputs: Bool, as of `difference`.
    """

    # Raised for a shape that cannot be compiled.
    errors: tuple[type[Exception], ...] = (TypeError, ValueError)

    def __init__(self, model, rounds_inputs):
        self.model = model
        self.rounds_inputs = rounds_inputs
        self.has_pairs = False

    def generate(self, inputs, length, prefill, stop_token_ids):
        """Run `generate_step` of the model, to a length.

        A second object of the model's class and state runs it, so that other
        callers of the model see no change meanwhile.

        Args:
            inputs: Dict of `token_ids` and `padding_mask`, of shape (batch,
                length or more).
            length: Int or scalar tensor.
            prefill: Int, how many tokens of the prompts are read at first;
                what follows in longer ones is read as tokens are generated.
            stop_token_ids: As of `generate`.
        """
        call = functools.partial(self.call_with_cache, prefill)
        sampler = self.sampler(length)
        view = view_of(self.model, call_with_cache=call, sampler=sampler)
        outputs = view.generate_step(inputs, stop_token_ids)
        return {name: x for name, x in outputs.items() if x is not None}

    def sampler(self, length):
        """Return the model's sampler, bounded by a length."""
        from keras_hub.samplers import GreedySampler

        sampler = self.model.sampler

        def run_loop(cond, body, **kwargs):
            def both(prompt, cache, index, mask):
                is_within = index < ops.cast(length, "int32")
                goes_on = cond(prompt, cache, index, mask)
                return ops.logical_and(is_within, goes_on)

            return sampler.run_loop(both, body, **kwargs)

        changes: dict[str, Any] = {"run_loop": run_loop}
        if type(sampler).get_next_token is GreedySampler.get_next_token:
            changes["get_next_token"] = _argmax
        return view_of(sampler, **changes)

    def call_with_cache(
        self, prefill, token_ids, cache=None, cache_update_index=None, **others
    ):
        is_first = not ops.is_tensor(cache_update_index)
        if is_first:
            self.has_pairs = is_pairs(cache)
        check_arguments(cache, others, self.has_pairs)
        if not is_first:
            return self.step(token_ids, cache, cache_update_index)
        if cache_update_index != 0:
            raise CannotCompile("it does not begin at the start of its cache")
        if self.has_pairs:
            cache = _stacked(cache)
        logits, hidden_states, cache = self.first(token_ids[:, :prefill], cache)
        padding = (0, 0), (0, token_ids.shape[1] - prefill), (0, 0)
        return logits, ops.pad(hidden_states, padding), cache

    def read(self, call):
        """Return a function of (tokens, cache, arguments) to logits.

        Args:
            call: `call_with_cache`, for a whole prompt.
        """

        def logits(token_ids, cache, more):
            return call(token_ids, cache, 0, **more)[0]

        return logits

    def first(self, token_ids, cache):
        """Read the first tokens. The logits are not used: one is enough."""
        call = logits_at(self.model, slice(1))
        return self._call(call, token_ids, cache, 0)

    def step(self, token_ids, cache, index):
        """Read one token."""
        return self._call(self.model.call_with_cache, token_ids, cache, index)

    def _call(self, call, token_ids, cache, index):
        if not self.has_pairs:
            return call(token_ids, cache, index)
        layers = (cache[:, i] for i in range(cache.shape[1]))
        pairs = tuple((layer[:, 0], layer[:, 1]) for layer in layers)
        *outputs, pairs = call(token_ids, pairs, index)
        return *outputs, _stacked(pairs)


def _argmax(probabilities):
    """Return `ops.argmax(..., axis=-1)`, which XLA computes slowly on CPUs."""
    size = probabilities.shape[-1]
    most = ops.max(probabilities, axis=-1, keepdims=True)
    # All are, in a row of NaN.
    is_most = ops.logical_not(ops.less(probabilities, most))
    return ops.min(ops.where(is_most, ops.arange(size), size), axis=-1)


def is_pairs(cache: Any) -> bool:
    """Return whether a cache has keys and values for each layer, as Gemma 3's.

    Args:
        cache: What `call_with_cache` takes.
    """
    return (
        isinstance(cache, tuple)
        and all(isinstance(pair, tuple) and len(pair) == 2 for pair in cache)
        and len({tuple(x.shape) for pair in cache for x in pair}) == 1
    )


def _stacked(pairs):
    return ops.stack([ops.stack(pair, axis=1) for pair in pairs], axis=1)


# What text needs none of. Causal attention sees no padding. The keys and values
# that are not to be updated are those of a prompt, which stay the same.
_MASKS = {"padding_mask", "cache_update_mask"}


def check_arguments(
    cache: Any, others: dict[str, Any], has_pairs: bool
) -> None:
    """Raise `CannotCompile` for a call with more arguments than a step gets."""
    given = {name for name, x in others.items() if x is not None}
    if has_pairs:
        given -= _MASKS
    elif not hasattr(cache, "shape"):
        given.add("several caches")
    if given:
        raise CannotCompile(
            "its `call_with_cache` gets more than tokens, one cache and a "
            "place in it"
        )


def view_of(obj: Any, **attributes: Any) -> Any:
    """Return a second object that shares all but some attributes.

    Args:
        obj: A model, or a sampler of KerasHub.
        **attributes: What the view has in place of its own.
    """
    view = object.__new__(type(obj))
    vars(view).update(vars(obj), **attributes)
    return view


def logits_at(model: Any, places: slice) -> Any:
    """Return `call_with_cache` of a model, with logits of some places alone.

    Those of a whole prompt take most memory where the vocabulary is large.

    Args:
        model: A `keras_hub.models.CausalLM`. Others than KerasHub's own, which
            may do more with the logits, compute all of them.
        places: Slice of the positions.
    """
    cut = model.call_with_cache
    backbone = getattr(model, "backbone", None)
    table = getattr(backbone, "token_embedding", None)
    if table is not None and cut.__module__.startswith("keras_hub."):
        table = _Table(table, places)
        # The names without `_` are properties.
        backbone = view_of(backbone, _token_embedding=table)
        cut = view_of(model, _backbone=backbone).call_with_cache

    def call(token_ids: Any, *args: Any, **kwargs: Any) -> Any:
        logits, *others = cut(token_ids, *args, **kwargs)
        if logits.shape[1] == token_ids.shape[1]:
            logits = logits[:, places]
        return logits, *others

    return call


class _Table:
    """A table that gives the logits of some places alone."""

    def __init__(self, table, places):
        self.table, self.places = table, places

    def __call__(self, x, reverse=False):
        return self.table(x[:, self.places] if reverse else x, reverse=reverse)

    def __getattr__(self, name):
        return getattr(self.table, name)


def difference(received: Any, expected: Any, rounds_inputs: bool) -> str:
    """Say by how much logits differ; empty if only by rounding.

    Args:
        received: Tensor of shape (..., vocabulary size).
        expected: Tensor of that shape and dtype. Where it has NaN there is
            nothing to compare.
        rounds_inputs: Bool, whether what the model multiplies by is rounded to
            integers.
    """
    dtype = keras.backend.standardize_dtype(expected.dtype)
    received, expected = (
        ops.convert_to_numpy(ops.cast(x, "float32"))
        for x in (received, expected)
    )
    with np.errstate(invalid="ignore"):
        pair = received - expected, expected
        if rounds_inputs:
            tolerance, what = _ROUNDED_TOLERANCE, "in the mean"
            off, size = (np.sqrt(np.mean(np.square(x))) for x in pair)
        elif dtype in _TOLERANCES:
            tolerance, what = _TOLERANCES[dtype], "at most"
            off, size = (np.abs(x).max() for x in pair)
        else:
            tolerance, what = _ROW_TOLERANCE, "in a row"
            off, size = (x.std(-1) for x in pair)
    is_broken = np.isnan(off) & np.isfinite(size)
    if not (is_broken | (off > tolerance * size)).any():
        return ""
    return f"{off.max():.3g} {what}, of {size.max():.3g}"
