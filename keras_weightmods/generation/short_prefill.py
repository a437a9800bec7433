"""Whether a model can read a prompt without the empty places after it."""

import keras
import numpy as np
from keras import ops

from keras_weightmods.backend.generation import view_of
from keras_weightmods.core.keras_compat import layers_of
from keras_weightmods.core.reparameterization import reparameterizations

# How far the logits may be off, as a share of the largest, by their type.
_TOLERANCES = {"float32": 1e-3, "float64": 1e-3}
_TOLERANCE = 0.05
# In the mean, where inputs are rounded to integers: the last digit of a sum, by
# which two lengths differ, can round an input to the next integer.
_ROUNDED_TOLERANCE = 0.1
_OTHER_LOGITS = (
    "the first tokens give other logits where other tokens follow, or fewer: "
    "they differ"
)


def reason_against(model, tokens, mask, length, known, prefill):
    """Compare the first logits of a prompt read short and read whole.

    Args:
        model: A `keras_hub.models.CausalLM`.
        tokens: Integer array of shape (batch, padded length).
        mask: Bool array of that shape, True for the prompts' tokens.
        length: Int, the length to generate to.
        known: Int, the length of the shortest prompt.
        prefill: Int from `known` to `length`, the tokens to read at first.

    Returns:
        String, why it cannot; empty if it can.
    """
    plain = model.call_with_cache
    rounds = _rounds_inputs(model)

    def call_with_cache(token_ids, cache, cache_update_index):
        if ops.is_tensor(cache_update_index):
            raise ValueError("it does not read the prompt at first")
        found = [
            plain(token_ids[:, :size], cache, cache_update_index)[0]
            for size in (length, prefill)
        ]
        if rounds:
            # As long as the first, with other tokens at the empty places.
            empty = ops.arange(length) >= known
            others = ops.cast(token_ids[:, :length] == 0, token_ids.dtype)
            others = ops.where(empty, others, token_ids[:, :length])
            found.append(plain(others, cache, cache_update_index)[0])
        raise _Read(*(x[:, :known] for x in found))

    inputs = {
        "token_ids": ops.convert_to_tensor(tokens),
        "padding_mask": ops.convert_to_tensor(mask),
    }
    try:
        view_of(model, call_with_cache=call_with_cache).generate_step(
            inputs, None
        )
    except _Read as read:
        found = read.args
    except (TypeError, ValueError) as error:
        return str(error)
    dtype = keras.backend.standardize_dtype(found[0].dtype)
    expected, short, *with_others = (
        ops.convert_to_numpy(ops.cast(x, "float32")) for x in found
    )
    tolerance = _TOLERANCES.get(dtype, _TOLERANCE)
    if rounds:
        off, size = (_root_mean_square(x) for x in (short - expected, expected))
        if off > _ROUNDED_TOLERANCE * size:
            return f"{_OTHER_LOGITS} by {off:.3g} in the mean, of {size:.3g}"
        # What is left to compare is that which differs by those tokens alone.
        (short,) = with_others
    largest, off = np.abs(expected).max(), np.abs(short - expected).max()
    if off > tolerance * largest:
        return (
            f"{_OTHER_LOGITS} by {off:.3g}, where the largest is {largest:.3g}"
        )
    return ""


def _rounds_inputs(model):
    """Whether layers round what they multiply by."""
    return any(
        item.rounds_inputs for item in reparameterizations(model)
    ) or any(
        getattr(layer, "quantization_mode", None) for layer in layers_of(model)
    )


def _root_mean_square(x):
    return float(np.sqrt(np.mean(np.square(x))))


class _Read(Exception):
    """Carries logits out of `generate_step`."""
