"""Keras language models in EleutherAI's `lm-eval`."""

import itertools
from typing import Any

import keras
import numpy as np

from keras_weightmods.core import keras_compat
from keras_weightmods.evaluation.perplexity import start_token, tokenize
from keras_weightmods.evaluation.token_scorer import TokenScorer, longest_input
from keras_weightmods.utils import checks
from keras_weightmods.utils.progress import Progress

# Generation is compiled for lengths that are multiples of this.
_LENGTH_STEP = 64


def lm_eval_model(
    model: keras.Model,
    length: int = 1024,
    batch_size: int = 1,
    chunk_size: int = 256,
) -> Any:
    """Wrap a KerasHub `CausalLM` for `lm-eval`.

    It serves the tasks of EleutherAI's harness: `loglikelihood` (multiple
    choice), `loglikelihood_rolling` (perplexity) and `generate_until`, which
    decodes greedily. It needs `pip install lm-eval`. Each evaluation reads the
    weights, so you may prune, pack or train the model between two of them.

    Args:
        model: A `keras_hub.models.CausalLM` with a preprocessor. Dense,
            sparse, packed or quantized. It is not changed.
        length: Int, the most tokens that the model gets. Longer contexts lose
            their beginning. Defaults to 1024.
        batch_size: Int, rows in one forward pass. Defaults to 1.
        chunk_size: Int, positions whose logits are held at once. Defaults to
            256.

    Returns:
        An `lm_eval.api.model.LM`.

    Raises:
        ImportError: If `lm-eval` is not installed.
        ValueError: If `model` is not a `CausalLM` with a preprocessor, or a
            number is not an int of 1 or more.

    Example:

    ```python
    import keras_weightmods as kwm

    def evaluate(model, tasks):
        import lm_eval

        return lm_eval.simple_evaluate(
            model=kwm.lm_eval_model(model), tasks=tasks
        )["results"]

    # evaluate(model, ["hellaswag", "arc_easy"])
    ```

    Reference:
        https://github.com/EleutherAI/lm-evaluation-harness
    """
    try:
        from lm_eval.api.model import TemplateLM
    except ImportError as error:
        raise checks.not_installed(
            "`lm_eval_model`", "lm-eval", error
        ) from error
    if not (
        isinstance(model, keras.Model)
        and hasattr(model, "generate")
        and getattr(model, "preprocessor", None) is not None
    ):
        expected = "a `keras_hub.models.CausalLM` with a `preprocessor`"
        raise checks.error("model", expected, model)
    checks.check_int("length", length, least=1)
    checks.check_int("batch_size", batch_size, 1, 2**31 - 1)
    checks.check_int("chunk_size", chunk_size, least=1)
    # lm-eval is imported only when it is used.
    cls: Any = type("KerasLM", (_KerasLM, TemplateLM), {})
    return cls(model, length, batch_size, chunk_size)


class _KerasLM:
    """Implement what `lm_eval.api.model.TemplateLM` leaves to subclasses."""

    def __init__(
        self, model: Any, length: int, batch_size: int, chunk_size: int
    ) -> None:
        super().__init__()
        self.model = model
        self.length = longest_input(model, length)
        self.batch_size = batch_size
        self._scorer = TokenScorer(model, chunk_size)

    @property
    def eot_token_id(self) -> int:
        return int(self.model.preprocessor.tokenizer.end_token_id)

    @property
    def prefix_token_id(self) -> int:
        start = start_token(self.model)
        return self.eot_token_id if start is None else int(start)

    def tok_encode(
        self, string: str, add_special_tokens: Any = None, **kwargs: Any
    ) -> Any:
        tokens = tokenize(self.model, string).tolist()
        start = start_token(self.model)
        if start is not None and (
            add_special_tokens is False or tokens[1:2] == [start]
        ):
            # Do not add a second one before that of a prompt.
            tokens = tokens[1:]
        return tokens

    def loglikelihood_rolling(
        self, requests: Any, disable_tqdm: bool = False
    ) -> list[float]:
        from lm_eval import utils

        pairs, owners = [], []
        for index, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in utils.get_rolling_token_windows(
                tokens, self.prefix_token_id, self.length, context_len=1
            ):
                pairs.append((None, *utils.make_disjoint_window(window)))
                owners.append(index)
        totals = [0.0] * len(requests)
        for index, (value, _) in zip(owners, self._loglikelihood_tokens(pairs)):
            totals[index] += value
        return totals

    def generate_until(
        self, requests: Any, disable_tqdm: bool = False
    ) -> list[str]:
        view = _greedy_view(self.model)
        with Progress(len(requests), "request") as progress:
            return [
                self._generate(view, *request.args)
                for request in progress.each(requests)
            ]

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> Any:
        """Return (log probability, greedy or not) of each request's last."""
        windows = []
        for _, context, scored in requests:
            if not scored or len(scored) > self.length:
                raise ValueError(
                    "A continuation must have from one token to `length`. "
                    f"Received: {len(scored)} tokens, length={self.length}"
                )
            window = [*context, *scored][-self.length - 1 :]
            windows.append((window, len(scored)))
        results: list[Any] = [None] * len(windows)
        # Group equal lengths, the longest first, because it needs most memory.
        order = sorted(range(len(windows)), key=lambda i: -len(windows[i][0]))
        scores = self._scorer.score_windows(
            [windows[i] for i in order], self.batch_size, self.length
        )
        with Progress(len(order), "window") as progress:
            for (losses, is_greedy), i in zip(progress.each(scores), order):
                total = -float(losses.sum(dtype="float64"))
                results[i] = total, bool(is_greedy.all())
        return results

    def _generate(self, view: Any, context: Any, options: Any) -> Any:
        if options.get("do_sample"):
            raise ValueError(
                "`generate_until` decodes greedily. Set `do_sample: false` in "
                f"the task's `generation_kwargs`. Received: "
                f"{checks.shown(options)}"
            )
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        count = min(int(options.get("max_gen_toks", 256)), self.length - 1)
        tokenizer = self.model.preprocessor.tokenizer
        prompt = self.tok_encode(context)[-(self.length - count) :]
        prompt = prompt or [self.prefix_token_id]
        ends = {self.eot_token_id}
        if getattr(tokenizer, "end_token2_id", None) is not None:
            ends.add(tokenizer.end_token2_id)
        # A text that ends at such a token needs no more tokens.
        stops = ends.union(
            int(tokens[0])
            for tokens in map(tokenizer, until)
            if len(tokens) == 1
        )
        tokens = _new_tokens(view, prompt, count, sorted(stops))
        tokens = itertools.takewhile(lambda token: token not in ends, tokens)
        # Both together: alone, the first word could lose its space.
        text = tokenizer.detokenize([*prompt, *tokens])
        text = text[len(tokenizer.detokenize(prompt)) :]
        for stop in until:
            text = text.split(stop)[0] if stop else text
        return text


def _greedy_view(model: Any) -> Any:
    """Return a view of a `CausalLM` that generates the likeliest tokens."""
    import keras_hub

    sampler = keras_hub.samplers.GreedySampler()
    return keras_compat.view(model, sampler=sampler, generate_function=None)


def _new_tokens(view: Any, prompt: Any, count: int, stops: Any) -> Any:
    """Return the tokens after a prompt, `count` or up to a stop."""
    total = len(prompt) + count
    step = 1 if keras.backend.backend() == "torch" else _LENGTH_STEP
    padded = -(-total // step) * step
    width = max(total, longest_input(view, padded))
    # Generation ends at a stop, even one in places not written yet.
    filler = min(set(range(len(stops) + 1)) - set(stops))
    tokens = np.full((1, width), filler, dtype="int32")
    tokens[0, : len(prompt)] = prompt
    mask = np.arange(width)[None] < len(prompt)
    inputs = {"token_ids": tokens, "padding_mask": mask}
    outputs = view.make_generate_function()(
        keras.tree.map_structure(keras.ops.convert_to_tensor, inputs),
        stop_token_ids=stops,
    )
    new, used = (
        keras.ops.convert_to_numpy(outputs[name])[0, len(prompt) : total]
        for name in ("token_ids", "padding_mask")
    )
    return new[used.astype(bool)].tolist()
