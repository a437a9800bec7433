"""Text that a model writes itself."""

import numpy as np
import pytest

import keras_weightmods as kwm
from keras_weightmods.core import keras_compat
from tests import models

one_backend = pytest.mark.one_backend


@pytest.fixture(scope="module")
def model():
    preprocessor = models.gpt2_preprocessor(16)
    return models.randomize(models.causal_lm("gpt2", preprocessor))


def written(model, **options):
    options = {"rows": 5, "length": 8, "verbose": 0, **options}
    return kwm.self_generated(model, **options)


def test_rows_begin_with_the_start_token(model):
    before = model.preprocessor, model.sampler, model.generate_function
    weights, layers = model.get_weights(), keras_compat.layers_of(model)
    tokens = written(model, keep=1.0)
    assert (tokens.shape, tokens.dtype) == ((5, 8), np.int32)
    tokenizer = model.preprocessor.tokenizer
    assert (tokens[:, 0] == tokenizer.start_token_id).all()
    assert not np.isin(tokens[:, 1], tokenizer.special_token_ids).any()
    assert len(np.unique(tokens, axis=0)) > 1
    # The model is as it was.
    assert keras_compat.layers_of(model) == layers
    after = model.preprocessor, model.sampler, model.generate_function
    assert before == after
    models.assert_same(model.get_weights(), weights)


@one_backend
def test_the_rows_of_high_perplexity_are_left_out(model):
    # No row comes twice if a batch is not full.
    everything = written(model, rows=10, batch_size=6, keep=1.0)
    kept = written(model, rows=5, batch_size=6, keep=0.5)
    losses = kwm.Perplexity(model).losses(everything, verbose=0)
    best = everything[np.argsort(losses)[:5]]
    assert sorted(map(tuple, kept)) == sorted(map(tuple, best))


@one_backend
def test_a_cold_model_writes_what_generate_does():
    preprocessor = models.gpt2_preprocessor(16)
    model = models.randomize(models.causal_lm("gpt2", preprocessor))
    tokens = written(model, rows=2, temperature=1e-3, keep=1.0)
    model.compile(sampler="greedy")
    mask = np.tile(np.arange(8) < 2, (2, 1))
    inputs = {"token_ids": tokens, "padding_mask": mask}
    model.preprocessor = None
    outputs = model.generate(inputs, stop_token_ids=None)
    np.testing.assert_array_equal(tokens, outputs["token_ids"])


@one_backend
def test_a_model_that_gives_none_for_images():
    model = models.causal_lm("gemma3", models.gemma3_preprocessor())
    tokens = written(model, keep=1.0, batch_size=2)
    assert tokens.shape == (5, 8)
    assert (tokens[:, 0] == model.preprocessor.tokenizer.start_token_id).all()


@one_backend
def test_wrong_arguments(model):
    for name, value in (("length", 2), ("keep", 0.0), ("temperature", -1.0)):
        with pytest.raises(ValueError, match=f"`{name}`"):
            written(model, **{name: value})
    with pytest.raises(ValueError, match="CausalLM"):
        written(models.mlp())
