"""Whether a model can read a prompt without the empty places after it."""

from keras import ops

from keras_weightmods.backend.generation import difference, view_of
from keras_weightmods.core.keras_compat import layers_of
from keras_weightmods.core.reparameterization import reparameterizations


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
    rounds = any(x.rounds_inputs for x in reparameterizations(model)) or any(
        getattr(layer, "quantization_mode", None) for layer in layers_of(model)
    )

    def call_with_cache(token_ids, cache, cache_update_index):
        if ops.is_tensor(cache_update_index):
            raise ValueError("it does not read the prompt at first")

        def read(token_ids):
            logits, _, _ = model.call_with_cache(token_ids, cache, 0)
            return logits[:, :known]

        token_ids = token_ids[:, :length]
        whole, short = read(token_ids), read(token_ids[:, :prefill])
        reason = difference(short, whole, rounds)
        if rounds and not reason:
            # What other tokens at the empty places change alone, at the same
            # length, is compared more closely.
            others = ops.cast(token_ids == 0, token_ids.dtype)
            is_empty = ops.arange(length) >= known
            others = read(ops.where(is_empty, others, token_ids))
            reason = difference(others, whole, False)
        raise _Read(reason)

    inputs = {
        "token_ids": ops.convert_to_tensor(tokens),
        "padding_mask": ops.convert_to_tensor(mask),
    }
    view = view_of(model, call_with_cache=call_with_cache)
    try:
        view.generate_step(inputs, None)
    except _Read as read:
        (reason,) = read.args
    except (TypeError, ValueError) as error:
        return str(error)
    return reason and (
        "the first tokens give other logits where other tokens follow, or "
        f"fewer: they differ by {reason}"
    )


class _Read(Exception):
    """Carries a reason out of `generate_step`."""
