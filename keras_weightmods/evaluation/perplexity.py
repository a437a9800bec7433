"""Perplexity of causal language models, lean in memory."""

import itertools
import math
import warnings
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from keras_weightmods.core import data
from keras_weightmods.evaluation.token_scorer import TokenScorer, longest_input
from keras_weightmods.utils import checks


def perplexity(
    model: keras.Model,
    texts: Any,
    length: int = 1024,
    stride: int | None = None,
    batch_size: int = 1,
    chunk_size: int = 256,
    name: str = "perplexity",
    verbose: int = 1,
) -> float:
    """Return the perplexity of a causal language model on texts.

    A short form of `Perplexity(model, ...)(texts)`. To evaluate one model
    several times, keep one `Perplexity`: it compiles once.

    Args:
        model: A `keras_hub.models.CausalLM`, or another `keras.Model` from
            tokens to logits. Dense, sparse, packed or quantized.
        texts: Text in any form. See `Perplexity.__call__`.
        length, stride, batch_size, chunk_size: As in `Perplexity`.
        name: String, the label in the progress bar.
        verbose: 0 or 1. 0 shows no progress bar.

    Returns:
        A float, `exp` of the mean loss of all tokens except the first of each
        text.

    Raises:
        ValueError: As in `Perplexity`.

    Example:

    ```python
    import keras
    import numpy as np
    import keras_weightmods as kwm

    model = keras.Sequential(
        [
            keras.Input((None,), dtype="int32"),
            keras.layers.Embedding(50, 8),
            keras.layers.Dense(50, kernel_initializer="zeros"),
        ]
    )
    tokens = np.random.randint(50, size=(4, 20))
    value = kwm.perplexity(model, tokens, verbose=0)
    assert np.isclose(value, 50)  # it knows nothing yet
    ```
    """
    measure = Perplexity(model, length, stride, batch_size, chunk_size)
    return measure(texts, name=name, verbose=verbose)


class Perplexity:
    """Measure the perplexity of one model, as often as needed.

    A text is cut into windows of `length` tokens. Each of its tokens except the
    first is scored once, given the tokens before it in its window. If a text
    begins with the start token of the model's preprocessor, each window does
    too, and loses its oldest token for it.

    Memory holds the activations of one batch of windows, and the logits of
    `chunk_size` positions. The functions are compiled at the first call and
    used again for changed weights. They are compiled anew if the model's set of
    variables has changed, for example after `pack`.

    Args:
        model: A `keras_hub.models.CausalLM`, or another `keras.Model` that maps
            token ids, or `{"token_ids", "padding_mask"}`, to logits. Logits of
            few positions at a time need a functional model (all of KerasHub's
            are) that ends in a `ReversibleEmbedding` or `Dense`. Other models
            hold the logits of a whole batch.
        length: Int, tokens that a window feeds to the model; fewer where the
            model takes no more. Defaults to 1024.
        stride: Int, at most `length`: tokens from one window to the next. A
            smaller stride gives each token more context and takes longer.
            Defaults to `None`, for `length`.
        batch_size: Int, windows in one forward pass. Defaults to 1.
        chunk_size: Int, positions whose logits are held at once, at 4 bytes
            for each entry of the vocabulary. Defaults to 256.

    Raises:
        ValueError: If an argument is outside these ranges, or the model is not
            built, or takes inputs other than tokens and their mask.

    Example:

    ```python
    import keras
    import numpy as np
    import keras_weightmods as kwm

    model = keras.Sequential(
        [
            keras.Input((None,), dtype="int32"),
            keras.layers.Embedding(50, 8),
            keras.layers.Dense(50),
        ]
    )
    tokens = np.random.randint(50, size=(4, 20))
    measure = kwm.Perplexity(model, batch_size=2)
    before = measure(tokens, verbose=0)
    kwm.SemiStructuredSparse.attach(model)
    after = measure(tokens, verbose=0)
    assert before != after
    ```
    """

    def __init__(
        self,
        model: keras.Model,
        length: int = 1024,
        stride: int | None = None,
        batch_size: int = 1,
        chunk_size: int = 256,
    ) -> None:
        checks.check_int("length", length, 1)
        checks.check_int("stride", stride, 1, length, optional=True)
        checks.check_int("chunk_size", chunk_size, 1)
        checks.check_int("batch_size", batch_size, 1, 2**31 - 1)
        if not isinstance(model, keras.Model):
            expected = "a `keras.Model`, from tokens to logits"
            raise checks.error("model", expected, model)
        self.model = model
        self.length = longest_input(model, length)
        self.stride = min(stride or length, self.length)
        self.batch_size = batch_size
        self._score = TokenScorer(model, chunk_size)

    def __call__(
        self, texts: Any, name: str = "perplexity", verbose: int = 1
    ) -> float:
        """Return the perplexity of all texts together.

        Args:
            texts: Text in any form, read one row after the other: strings,
                which the model's preprocessor tokenizes, with its start token;
                vectors of token ids; an int array of shape `(rows, tokens)`; a
                dict from a preprocessor, without its padding; or a dataset or
                generator of these. Texts with fewer than two tokens are
                skipped.
            name: String, the label in the progress bar.
            verbose: 0 or 1. 0 shows no progress bar.

        Raises:
            ValueError: If `texts` are none of these, or hold nothing to
                score; if strings are given and the model has no
                preprocessor.
        """
        sums, counts = self._totals(texts, name, verbose)
        return _exp(sums.sum() / counts.sum())

    def losses(
        self, texts: Any, name: str = "perplexity", verbose: int = 1
    ) -> np.ndarray:
        """Return the mean loss of each text, to compare models text by text.

        Args:
            texts, name, verbose: As in `__call__`.

        Returns:
            A float64 array of shape `(texts,)`, in nats; NaN for a skipped
            text.
        """
        sums, counts = self._totals(texts, name, verbose)
        with np.errstate(invalid="ignore"):
            means: np.ndarray = sums / counts
        return means

    def _totals(
        self, texts: Any, name: str, verbose: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the sums of losses, and numbers of tokens scored."""
        checks.check_string("name", name)
        checks.check_verbose(verbose)
        if isinstance(texts, str) or data.is_row(texts):
            texts = [texts]
        length = self.length
        if len(getattr(texts, "shape", ())) == 2:
            # Pad only to the longest of them.
            length = max(1, min(length, texts.shape[1] - 1))
        sums: list[float] = []
        counts: list[int] = []
        owners: list[int] = []

        def all_windows() -> Iterator[Any]:
            for index, tokens in enumerate(data.rows(texts)):
                if isinstance(tokens, str):
                    tokens = tokenize(self.model, tokens)
                sums.append(0.0)
                counts.append(0)
                for window in self._windows(tokens):
                    owners.append(index)
                    yield window

        windows = all_windows()
        # Most errors come from the first batch: show no bar before it.
        first = next(windows, None)
        if first is None:
            raise ValueError(
                "`texts` must hold a text of two tokens at least. Received: "
                f"{len(sums)} texts without any"
            )
        start = start_token(self.model)
        if start is not None and first[0][0] != start:
            warnings.warn(
                f"The first text begins with the token {first[0][0]}, where "
                f"the model's preprocessor puts its start token, {start}, in "
                "front. A model that was trained with it has a higher "
                "perplexity without it. Pass strings, or put it in front of "
                "each row.",
                stacklevel=4,
            )
        progress = keras.utils.Progbar(
            len(texts) if isinstance(texts, (list, np.ndarray)) else None,
            unit_name="text",
            verbose=verbose,
            stateful_metrics=[name],
        )
        # Compiling takes longer than the first text.
        progress.update(0)
        windows = itertools.chain([first], windows)
        scores = self._score.score_windows(windows, self.batch_size, length)
        # The owner of a window is known once that is read.
        total, count = 0.0, 0
        for (losses, _), index in zip(scores, owners):
            loss = float(losses.sum(dtype="float64"))
            sums[index] += loss
            counts[index] += len(losses)
            total, count = total + loss, count + len(losses)
            shown = [(name, _exp(total / count))]
            progress.update(index, shown)
        progress.update(len(sums), shown, finalize=True)
        return np.asarray(sums), np.asarray(counts)

    def _windows(self, tokens: Any) -> Iterator[tuple[Any, int]]:
        """Yield windows of a text, and how many of their tokens are new."""
        scored, start = 1, 0
        first = start_token(self.model)
        is_started = first is not None and len(tokens) and tokens[0] == first
        while scored < len(tokens):
            window = tokens[start : start + self.length + 1]
            if is_started and start:
                # Replaces the oldest token in every window: models trained with
                # a start token need it.
                window = np.insert(window[1:], 0, first)
            end = start + len(window)
            yield window, end - scored
            scored = end
            start += self.stride


def tokenize(model: Any, text: str) -> np.ndarray:
    """Return the token ids of a string, the start token included."""
    preprocessor = getattr(model, "preprocessor", None)
    if preprocessor is None:
        raise ValueError(
            "Strings need a KerasHub task with a `preprocessor`. Pass rows of "
            f"token ids instead. Received: a string, for the model "
            f"{model.name!r}"
        )
    tokens = np.asarray(preprocessor.tokenizer(text), dtype="int32")
    start = start_token(model)
    return tokens if start is None else np.insert(tokens, 0, start)


def start_token(model: Any) -> Any:
    """Return the token that the model's preprocessor puts first, or None."""
    preprocessor = getattr(model, "preprocessor", None)
    if preprocessor is None or not getattr(
        preprocessor, "add_start_token", True
    ):
        return None
    return getattr(preprocessor.tokenizer, "start_token_id", None)


def _exp(mean: float) -> float:
    # `math.exp` raises where the result is too large for a float.
    return math.exp(mean) if mean < 700 else math.inf
