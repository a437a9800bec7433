"""The loss of each token, with the logits of a few positions at a time."""

import functools
import itertools
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_weightmods import backend
from keras_weightmods.core.head import find_head, input_of
from keras_weightmods.utils import checks


class TokenScorer:
    """Score tokens by a causal language model.

    The model runs up to its head, and the head on `chunk_size` positions at a
    time. Both are compiled once for each shape and used again for changed
    weights; they are built anew if the model's set of variables changes.

    Args:
        model: A `keras.Model` from tokens to logits.
        chunk_size: Int, positions whose logits are held at once. A model
            whose last layer is no head that is known, a
            `ReversibleEmbedding` or a `Dense`, gives those of a whole batch.

    Raises:
        ValueError: If the model is not built, or takes other inputs than
            `token_ids` and `padding_mask`.

    Example:

    ```python
    import keras
    import numpy as np
    from keras_weightmods.evaluation.token_scorer import TokenScorer

    model = keras.Sequential(
        [
            keras.Input((None,), dtype="int32"),
            keras.layers.Embedding(7, 4),
            keras.layers.Dense(7),
        ]
    )
    tokens, mask = np.array([[1, 2, 3]]), np.ones((1, 2))
    losses, is_greedy = TokenScorer(model)(tokens, mask)
    assert losses.shape == is_greedy.shape == (1, 2)
    ```
    """

    def __init__(self, model, chunk_size=256):
        if not (model.built or model.variables):
            expected = "a built `keras.Model`. Call it on data once"
            raise checks.error("model", expected, model)
        structure = input_of(model)
        names = {*structure} if isinstance(structure, dict) else set()
        if not names <= {"token_ids", "padding_mask"}:
            raise ValueError(
                "The model must take `token_ids` and `padding_mask`, or one "
                f"tensor of token ids. Received: model={model.name!r}, which "
                f"takes {checks.shown(sorted(names))}"
            )
        self.model = model
        self.chunk_size = chunk_size
        self._built_for: list[int] | None = None

    def __call__(self, tokens, padding_mask):
        """Score each token after the first of its row.

        Args:
            tokens: Int array of shape `(rows, length + 1)`.
            padding_mask: Bool array of shape `(rows, length)`, False for the
                inputs that are padding, at the end of a row.

        Returns:
            Two NumPy arrays of shape `(rows, length)`: float32, the loss of
            each token in nats, given those before it; and bool, whether it is
            the likeliest.
        """
        self._build()
        tokens = np.asarray(tokens, dtype="int32")
        # JAX and TensorFlow would silently read other tokens.
        shape = getattr(self.model, "output_shape", None)
        last: Any = shape[-1] if isinstance(shape, tuple) else None
        size = last if isinstance(last, int) else 2**31
        outside = tokens[(tokens < 0) | (tokens >= size)]
        if outside.size:
            expected = f"token ids from 0 to {size - 1}, the model's vocabulary"
            raise checks.error("texts", expected, int(outside[0]))
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        taken = {"token_ids": inputs, "padding_mask": padding_mask}
        structure = input_of(self.model)
        if isinstance(structure, dict):
            taken = {name: taken[name] for name in structure}
        elif structure is not None or not hasattr(self.model, "backbone"):
            taken = inputs
        hidden = self._run_body(taken)
        rows, length = inputs.shape
        if tuple(getattr(hidden, "shape", ())[:-1]) != (rows, length):
            expected = f"a model whose outputs are {inputs.shape} and logits"
            raise checks.error("model", expected, self.model.name)
        width = min(length, max(1, self.chunk_size // rows))
        losses, is_greedy = [], []
        for start in range(0, length, width):
            # Each shape compiles anew, so the last chunk begins earlier
            # rather than being shorter.
            first = min(start, length - width)
            chunk = slice(first, first + width)
            scores = self._run_head(
                {"hidden": hidden[:, chunk], "targets": targets[:, chunk]}
            )
            new = slice(start - first, None)
            losses.append(np.asarray(scores["losses"])[:, new])
            is_greedy.append(np.asarray(scores["is_greedy"])[:, new])
        return np.concatenate(losses, 1), np.concatenate(is_greedy, 1)

    def score_windows(self, windows, batch_size, length):
        """Score windows of different lengths.

        Args:
            windows: Iterable of pairs: an int vector of two tokens or more,
                and how many of its last tokens are scored.
            batch_size: Int, windows in one forward pass.
            length: Int, the most inputs that a window has.

        Yields:
            For each window a pair (losses, is_greedy) of vectors.
        """
        windows, rows = iter(windows), None
        while batch := list(itertools.islice(windows, batch_size)):
            # Few row counts and widths, because each compiles anew.
            rows = rows or min(batch_size, _power_of_2(len(batch)))
            longest = max(len(window) for window, _ in batch) - 1
            width = min(length, _power_of_2(longest))
            width = _fixed_length(self.model) or width
            tokens = np.zeros((rows, width + 1), dtype="int32")
            mask = np.zeros((rows, width), dtype=bool)
            # A row of only padding may give NaN.
            mask[:, 0] = True
            for row, used, (window, _) in zip(tokens, mask, batch):
                row[: len(window)] = window
                used[: len(window) - 1] = True
            scores = self(tokens, mask)
            for row, (window, count) in enumerate(batch):
                yield [x[row, : len(window) - 1][-count:] for x in scores]

    def _build(self):
        variables = [id(variable) for variable in self.model.variables]
        if variables == self._built_for:
            return
        head = find_head(self.model)
        body = self.model if head is None else head.body
        layers = [] if head is None else list(head.layers)
        compiled = backend.current().compiled_call
        self._run_body = compiled(_Part(body, [body]))
        self._run_head = compiled(
            _Part(functools.partial(_scores, head), layers)
        )
        self._built_for = variables


def _power_of_2(count):
    """Return the smallest one that is at least `count`."""
    return 1 << (count - 1).bit_length()


def _fixed_length(model):
    """Return the length that the model's inputs must have, or None."""
    shapes = [tensor.shape for tensor in getattr(model, "inputs", None) or ()]
    return next((shape[1] for shape in shapes if len(shape) == 2), None)


def longest_input(model, length):
    """Return `length`, or less where the model takes less."""
    limits = [
        _fixed_length(model),
        # KerasHub's backbones with position embeddings have this.
        getattr(getattr(model, "backbone", None), "max_sequence_length", None),
    ]
    return min([length, *(limit for limit in limits if limit)])


class _Part(keras.Model):
    """A function of inputs and `training` that computes with some layers."""

    def __init__(self, function, layers):
        # TensorFlow takes no name with a leading underscore. The layers cast
        # their inputs.
        super().__init__(name="part", dtype="float32", autocast=False)
        self.function, self.tracked = function, layers
        self.built = True

    def call(self, inputs, training=False):
        return self.function(inputs, training=training)


def _scores(head, inputs, training):
    """Return the scores of targets, from inputs of the head or logits."""
    logits, targets = inputs["hidden"], inputs["targets"]
    if head is not None:
        logits = head(logits, training)
    logits = ops.cast(logits, "float32")
    picked = ops.take_along_axis(logits, targets[..., None], axis=-1)
    likeliest = ops.cast(ops.argmax(logits, axis=-1), "int32")
    return {
        "losses": ops.logsumexp(logits, axis=-1) - picked[..., 0],
        "is_greedy": ops.equal(likeliest, ops.cast(targets, "int32")),
    }
