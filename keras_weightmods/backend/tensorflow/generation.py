"""`generate` of KerasHub's language models on TensorFlow, all of it by XLA.

Keras compiles with XLA only where it is told to, so that KerasHub's `generate`
runs op by op on a CPU.
"""

import contextlib
import functools

import keras
import numpy as np
import tensorflow as tf
from keras import ops

# How far the logits may be off, as a share of the largest, by their type.
_TOLERANCES = {"float32": 1e-3, "float64": 1e-3}
_TOLERANCE = 0.05


class CannotCompile(Exception):
    """XLA cannot compile the model, or it reads prompts in another way."""


class CompiledGenerate:
    """`generate` on a batch of tokens, for a model as it is now.

    Args:
        model: A `keras_hub.models.CausalLM`.
    """

    def __init__(self, model, slices_by=None):
        self.model = model
        self.functions = {}

    def __call__(self, tokens, mask, length, known, prefill, stop_token_ids):
        """Generate; see `CompiledGenerate` of torch."""
        stops = None if stop_token_ids is None else tuple(stop_token_ids)
        key = tokens.shape, tokens.dtype, prefill, stops, self.model.sampler
        inputs = tf.constant(tokens), tf.constant(mask), tf.constant(length)
        is_new = key not in self.functions
        if not self.functions:
            self._check_prefill(tokens, mask, length, known, prefill)
        if is_new:
            self.functions[key] = tf.function(
                functools.partial(self._generate, prefill, stops),
                jit_compile=True,
                autograph=False,
            )
        try:
            outputs = self.functions[key](*inputs)
        except (tf.errors.OpError, TypeError, ValueError) as error:
            if not is_new:
                raise
            reason = str(error).strip().splitlines()[0]
            raise CannotCompile(f"XLA does not compile it: {reason}") from error
        return {name: x[:, :length] for name, x in outputs.items()}

    def _generate(self, prefill, stops, tokens, mask, length):
        model, sampler = self.model, self.model.sampler
        plain, run_loop = _plain(model), sampler.run_loop

        def call_with_cache(token_ids, cache, cache_update_index):
            if ops.is_tensor(cache_update_index):
                return plain(token_ids, cache, cache_update_index)
            # What follows in longer prompts is read as tokens are generated.
            logits, hidden_states, cache = plain(
                token_ids[:, :prefill], cache, cache_update_index
            )
            missing = token_ids.shape[1] - prefill
            hidden_states = tf.pad(
                hidden_states, [[0, 0], [0, missing], [0, 0]]
            )
            return logits, hidden_states, cache

        def until_length(cond, body, **kwargs):
            def both(prompt, cache, index, mask):
                is_within = index < tf.cast(length, index.dtype)
                return tf.logical_and(
                    is_within, cond(prompt, cache, index, mask)
                )

            return run_loop(both, body, **kwargs)

        inputs = {"token_ids": tokens, "padding_mask": mask}
        with (
            _attributes(model, call_with_cache=call_with_cache),
            _attributes(sampler, run_loop=until_length),
        ):
            return model.generate_step(inputs, stops)

    def _check_prefill(self, tokens, mask, length, known, prefill):
        """Raise CannotCompile if a prompt cannot be read by its own length."""
        plain = _plain(self.model)

        def call_with_cache(token_ids, cache, cache_update_index):
            if ops.is_tensor(cache_update_index):
                raise CannotCompile("it does not read the prompt at first")
            found = [
                plain(token_ids[:, :size], cache, cache_update_index)[0]
                for size in (length, prefill)
            ]
            raise _Read(*(x[:, :known] for x in found))

        inputs = {
            "token_ids": tf.constant(tokens),
            "padding_mask": tf.constant(mask),
        }
        try:
            with _attributes(self.model, call_with_cache=call_with_cache):
                self.model.generate_step(inputs, None)
        except _Read as read:
            expected, received = read.args
        except (TypeError, ValueError, tf.errors.OpError) as error:
            raise CannotCompile(str(error)) from error
        dtype = keras.backend.standardize_dtype(expected.dtype)
        expected, received = (
            np.array(tf.cast(x, tf.float32)) for x in (expected, received)
        )
        largest, off = np.abs(expected).max(), np.abs(received - expected).max()
        if off > _TOLERANCES.get(dtype, _TOLERANCE) * largest:
            raise CannotCompile(
                "the first tokens give other logits where fewer follow: they "
                f"differ by {off:.3g}, where the largest is {largest:.3g}"
            )


class _Read(Exception):
    """Carries logits out of `generate_step`."""


def _plain(model):
    return type(model).call_with_cache.__get__(model)


@contextlib.contextmanager
def _attributes(owner, **values):
    """Give an object other attributes, past Keras' tracking of them."""
    own = vars(owner)
    before = {name: own[name] for name in values if name in own}
    own.update(values)
    try:
        yield
    finally:
        for name in values:
            own.pop(name)
        own.update(before)
