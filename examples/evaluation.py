"""Perplexity of a KerasHub causal language model, lean in memory.

Works on every backend of Keras; set `KERAS_BACKEND` before the import.
"""

import math

import keras
import numpy as np
from keras import ops


def perplexity(model, tokens, batch_size=1, name="perplexity", verbose=1):
    """Perplexity of `model` on rows of tokens.

    A short form of `Perplexity(model)(tokens)`. To evaluate one model several
    times, keep one `Perplexity`: it compiles once.

    Args:
        model: A `keras_hub.models.CausalLM`.
        tokens: int array of shape `(rows, length)`, `length >= 2`.
        batch_size: int. Rows in one forward pass.
        name: str, the label in the progress bar.
        verbose: 0 or 1. 0 shows no progress bar.

    Returns:
        A float, `exp` of the mean loss of the tokens after the first.
    """
    return Perplexity(model, batch_size)(tokens, name=name, verbose=verbose)


class Perplexity:
    """Measures the perplexity of one model, as often as needed.

    The logits of one batch at a time are computed and reduced to one number
    a row inside the compiled function: no more of them is ever held. The
    function is compiled at the first call and used again for changed weights;
    it is built anew if the model's set of variables has changed.

    Args:
        model: A `keras_hub.models.CausalLM`, or another model that maps
            `{"token_ids", "padding_mask"}` to logits.
        batch_size: int. Rows in one forward pass. More is little faster on a
            CPU and costs `batch_size * length * vocabulary * 4` bytes.

    Example:

    ```python
    measure = Perplexity(model)
    before = measure(tokens)
    model.fit(...)
    after = measure(tokens)
    ```
    """

    def __init__(self, model, batch_size=1):
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(
                "Expected `batch_size` to be an int of 1 or more. "
                f"Received: batch_size={batch_size}"
            )
        self.model = model
        self.batch_size = batch_size
        self._row_losses = None
        self._compiled_for = None

    def __call__(self, tokens, name="perplexity", verbose=1):
        """Perplexity of all rows together, as a float.

        Args:
            tokens: int array of shape `(rows, length)`, `length >= 2`.
            name: str, the label in the progress bar.
            verbose: 0 or 1. 0 shows no progress bar.
        """
        return math.exp(self.losses(tokens, name, verbose).mean())

    def losses(self, tokens, name="perplexity", verbose=1):
        """Mean loss of each row in nats, to compare models row by row.

        Args:
            tokens: int array of shape `(rows, length)`, `length >= 2`.
            name: str, the label in the progress bar.
            verbose: 0 or 1. 0 shows no progress bar.

        Returns:
            A float64 array of shape `(rows,)`.
        """
        tokens = np.asarray(tokens, dtype="int32")
        if tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
            raise ValueError(
                "Expected `tokens` of shape (rows, length) with at least one "
                f"row and two tokens a row. Received: shape={tokens.shape}"
            )
        rows = len(tokens)
        row_losses = self._current_function()
        # Every batch has the same shape, or the last one would compile anew.
        padding = -rows % self.batch_size
        tokens = np.concatenate([tokens, np.repeat(tokens[:1], padding, 0)])
        progress = keras.utils.Progbar(
            rows, unit_name="sequence", verbose=verbose, stateful_metrics=[name]
        )
        losses: list[float] = []
        for start in range(0, rows, self.batch_size):
            batch = tokens[start : start + self.batch_size]
            losses.extend(row_losses(batch))
            losses = losses[:rows]
            mean = math.exp(np.mean(losses, dtype="float64"))
            progress.update(len(losses), [(name, mean)])
        return np.asarray(losses, dtype="float64")

    def _current_function(self):
        variables = [id(variable) for variable in self.model.variables]
        if self._row_losses is None or variables != self._compiled_for:
            self._row_losses = _compile(self.model)
            self._compiled_for = variables
        return self._row_losses


def _compile(model):
    """A function of an array of tokens that returns an array of losses."""
    if keras.backend.backend() != "jax":
        return _RowLoss(model).predict_on_batch
    # On JAX, predict_on_batch() hands all weights out and takes them back,
    # which takes as long as a row of tokens does.
    import jax

    @jax.jit
    def stateless(trainable, non_trainable, tokens):
        logits, _ = model.stateless_call(
            trainable, non_trainable, _inputs(tokens), training=False
        )
        return _mean_losses(logits, tokens)

    def row_losses(tokens):
        trainable = [v.value for v in model.trainable_variables]
        non_trainable = [v.value for v in model.non_trainable_variables]
        return np.asarray(stateless(trainable, non_trainable, tokens))

    return row_losses


class _RowLoss(keras.Model):
    """Tokens of shape (batch, length) -> mean next-token loss of each row."""

    def __init__(self, model):
        # TensorFlow takes no name that begins with an underscore.
        super().__init__(name="row_loss")
        self.model = model

    def call(self, tokens):
        return _mean_losses(self.model(_inputs(tokens), training=False), tokens)


def _inputs(tokens):
    inputs = tokens[:, :-1]
    return {"token_ids": inputs, "padding_mask": ops.ones_like(inputs)}


def _mean_losses(logits, tokens):
    logits = ops.cast(logits, "float32")
    targets = tokens[:, 1:, None]
    picked = ops.squeeze(ops.take_along_axis(logits, targets, axis=-1), -1)
    return ops.mean(ops.logsumexp(logits, axis=-1) - picked, axis=-1)
