"""Text written by a language model, for its own calibration and training."""

import math
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_weightmods.evaluation.perplexity import Perplexity, start_token
from keras_weightmods.generation.compile_generate import compile_generate
from keras_weightmods.utils import checks
from keras_weightmods.utils.progress import Progress


def self_generated(
    model: keras.Model,
    rows: int = 128,
    length: int = 256,
    *,
    temperature: float = 1.0,
    keep: float = 0.8,
    batch_size: int = 32,
    seed: int = 0,
    verbose: int = 1,
) -> np.ndarray:
    """Let a causal language model write text from random first tokens.

    Use it if you have no text like the one the model was trained on. Such text
    makes the best calibration data, and the dense model's own text comes close
    to it (arXiv 2410.17711). Each row begins with the start token, if the
    tokenizer has one, and a random token; the rest is sampled. The rows of the
    highest perplexity are thrown away.

    A second model on the same backbone writes, by `compile_generate`, with its
    own sampler. Call it on the dense model, before it is made sparse.

    Args:
        model: A `keras_hub.models.CausalLM` that takes nothing but tokens.
        rows: Int, the rows to return. Defaults to `128`.
        length: Int, tokens in a row. Defaults to `256`.
        temperature: Float > 0, the temperature of the sampling. Defaults to
            `1.0`.
        keep: Float in (0, 1], the share of the written rows to keep. Defaults
            to `0.8`.
        batch_size: Int, rows written at a time. Defaults to `32`.
        seed: Int. The same seed gives the same rows on the same backend and
            machine. Defaults to `0`.
        verbose: 0 or 1. 0 shows no progress bar. Defaults to `1`.

    Returns:
        An int32 array of shape `(rows, length)`, in random order.

    Raises:
        ValueError: If an argument is outside these ranges, `model` is not a
            `CausalLM` with a preprocessor, or it takes more than tokens. The
            model is unchanged, also after an error.

    Example:

    ```python
    import keras_hub
    import keras_weightmods as kwm

    tokens = ["<|endoftext|>", "a", "b", "c", "ab"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    model = keras_hub.models.GPT2CausalLM(
        keras_hub.models.GPT2Backbone(5, 1, 1, 8, 8, max_sequence_length=8),
        keras_hub.models.GPT2CausalLMPreprocessor(
            keras_hub.tokenizers.GPT2Tokenizer(vocabulary, ["a b"]),
            sequence_length=8,
        ),
    )
    tokens = kwm.self_generated(model, rows=3, length=8, verbose=0)
    assert tokens.shape == (3, 8)
    report = kwm.sparsify(
        model,
        "2:4",
        tokens,
        criterion="sparsegpt",
        verbose=0,
    )
    ```
    """
    most = 2**31 - 1
    checks.check_int("rows", rows, 1, most)
    checks.check_int("batch_size", batch_size, 1, most)
    checks.check_int("length", length, 3, most)
    checks.check_int("seed", seed, 0, most)
    checks.check_verbose(verbose)
    temperature = checks.check_float("temperature", temperature, above=0)
    keep = checks.check_float("keep", keep, above=0, most=1)
    preprocessor = getattr(model, "preprocessor", None)
    tokenizer = getattr(preprocessor, "tokenizer", None)
    if tokenizer is None or not hasattr(model, "generate"):
        expected = "a `keras_hub.models.CausalLM` with its preprocessor"
        raise checks.error("model", expected, model)
    inputs = model.input if getattr(model, "inputs", None) else {}
    if set(inputs) - {"token_ids", "padding_mask"}:
        expected = "one that takes `token_ids` and `padding_mask` alone"
        raise checks.error("model", expected, sorted(inputs))
    import keras_hub

    written = math.ceil(rows / keep)
    sampler = keras_hub.samplers.RandomSampler(
        seed=seed, temperature=temperature
    )
    random = np.random.default_rng(seed)
    # Each row begins with a random token, after the start token.
    special = getattr(tokenizer, "special_token_ids", None) or []
    ordinary = np.setdiff1d(np.arange(tokenizer.vocabulary_size()), special)
    starts = random.choice(ordinary, (written, 1))
    if (start := start_token(model)) is not None:
        starts = np.pad(starts, ((0, 0), (1, 0)), constant_values=start)
    given = np.arange(length) < starts.shape[1]
    texts: list[np.ndarray] = []
    # `generate` joins all outputs, and some models have an output of None.
    write = _writer(model, sampler).make_generate_function()
    firsts = range(0, written, batch_size)
    with Progress(len(firsts), "batch", verbose) as progress:
        for first in progress.each(firsts):
            # All batches have one size, because each new size compiles anew.
            chosen = np.arange(first, first + batch_size) % written
            tokens = np.zeros((batch_size, length), "int32")
            tokens[:, given] = starts[chosen]
            mask = np.tile(given, (batch_size, 1))
            outputs = write(
                {"token_ids": tokens, "padding_mask": mask},
                stop_token_ids=None,
            )
            written_now = ops.convert_to_numpy(outputs["token_ids"])
            texts.append(written_now.astype("int32"))
    result = np.concatenate(texts)[:written]
    if written > rows:
        measure = Perplexity(model, length=length, batch_size=8)
        losses = measure.losses(result, "perplexity of the rows", verbose)
        best = np.argsort(losses, kind="stable")[:rows]
        result = result[random.permutation(best)]
    return result


def _writer(model: Any, sampler: Any) -> Any:
    """Return a model on the same backbone that takes tokens, and samples.

    The model itself keeps its preprocessor and its sampler.
    """
    try:
        writer = type(model)(backbone=model.backbone, preprocessor=None)
    except TypeError as error:
        expected = "of a class that is made of `backbone` and `preprocessor`"
        raise checks.error("model", expected, type(model)) from error
    known = set(map(id, model.variables))
    if any(id(variable) not in known for variable in writer.variables):
        raise checks.error("model", "one whose weights its backbone has", model)
    writer.compile(sampler=sampler)
    compile_generate(writer, verbose=0)
    return writer
