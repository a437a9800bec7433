"""Whether a model can read a prompt without the empty places after it."""

import keras
import numpy as np
from keras import ops

from keras_weightmods.core.keras_private import replaced_attributes

# How far the logits may be off, as a share of the largest, by their type.
_TOLERANCES = {"float32": 1e-3, "float64": 1e-3}
_TOLERANCE = 0.05


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
    plain = type(model).call_with_cache.__get__(model)

    def call_with_cache(token_ids, cache, cache_update_index):
        if ops.is_tensor(cache_update_index):
            raise ValueError("it does not read the prompt at first")
        found = [
            plain(token_ids[:, :size], cache, cache_update_index)[0]
            for size in (length, prefill)
        ]
        raise _Read(*(x[:, :known] for x in found))

    inputs = {
        "token_ids": ops.convert_to_tensor(tokens),
        "padding_mask": ops.convert_to_tensor(mask),
    }
    try:
        with replaced_attributes(model, call_with_cache=call_with_cache):
            model.generate_step(inputs, None)
    except _Read as read:
        expected, received = read.args
    except (TypeError, ValueError) as error:
        return str(error)
    dtype = keras.backend.standardize_dtype(expected.dtype)
    expected, received = (
        ops.convert_to_numpy(ops.cast(x, "float32"))
        for x in (expected, received)
    )
    largest, off = np.abs(expected).max(), np.abs(received - expected).max()
    if off > _TOLERANCES.get(dtype, _TOLERANCE) * largest:
        return (
            "the first tokens give other logits where fewer follow: they "
            f"differ by {off:.3g}, where the largest is {largest:.3g}"
        )
    return ""


class _Read(Exception):
    """Carries logits out of `generate_step`."""
