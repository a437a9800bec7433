"""Text that a model writes itself."""

import keras
import numpy as np
import pytest

import keras_weightmods as kwm
from keras_weightmods.core import keras_compat
from tests import models


@pytest.fixture(scope="module")
def model():
    preprocessor = models.gpt2_preprocessor(16)
    return models.randomize(models.causal_lm("gpt2", preprocessor))


def written(model, **options):
    options = {"rows": 5, "length": 8, "verbose": 0, **options}
    return kwm.self_generated(model, **options)


def test_rows_are_seeded_and_begin_with_the_start_token(model):
    tokens = written(model, keep=1.0)
    assert tokens.shape == (5, 8)
    assert tokens.dtype == np.int32
    tokenizer = model.preprocessor.tokenizer
    assert (tokens[:, 0] == tokenizer.start_token_id).all()
    assert not np.isin(tokens[:, 1], tokenizer.special_token_ids).any()
    assert len(np.unique(tokens, axis=0)) > 1
    np.testing.assert_array_equal(tokens, written(model, keep=1.0))
    assert (tokens != written(model, keep=1.0, seed=1)).any()


@pytest.mark.one_backend
def test_the_rows_of_high_perplexity_are_left_out(model):
    everything = written(model, rows=10, keep=1.0)
    kept = written(model, rows=5, keep=0.5)
    losses = kwm.Perplexity(model).losses(everything, verbose=0)
    best = everything[np.argsort(losses)[:5]]
    assert sorted(map(tuple, kept)) == sorted(map(tuple, best))


@pytest.mark.one_backend
def test_batches_make_no_row_twice(model):
    tokens = written(model, rows=7, batch_size=3, keep=1.0)
    assert tokens.shape == (7, 8)


def test_a_cold_model_writes_what_generate_does(model):
    tokens = written(model, rows=2, temperature=1e-3, keep=1.0)
    model.compile(sampler="greedy")
    inputs = {"token_ids": tokens, "padding_mask": np.arange(8) < 2}
    inputs["padding_mask"] = np.broadcast_to(inputs["padding_mask"], (2, 8))
    preprocessor, model.preprocessor = model.preprocessor, None
    try:
        outputs = model.generate(inputs, stop_token_ids=None)
    finally:
        model.preprocessor = preprocessor
    np.testing.assert_array_equal(tokens, outputs["token_ids"])


@pytest.mark.one_backend
def test_the_model_is_as_it_was():
    preprocessor = models.gpt2_preprocessor(16)
    model = models.causal_lm("gpt2", preprocessor)
    before = model.preprocessor, model.sampler, model.generate_function
    weights, layers = model.get_weights(), keras_compat.layers_of(model)
    written(model)
    assert keras_compat.layers_of(model) == layers
    assert before == (
        model.preprocessor,
        model.sampler,
        model.generate_function,
    )
    for a, b in zip(weights, model.get_weights()):
        np.testing.assert_array_equal(a, b)


def test_wrong_arguments(model):
    for name, value in (
        ("rows", 0),
        ("length", 2),
        ("keep", 0.0),
        ("temperature", -1.0),
        ("batch_size", 1.5),
        ("seed", -1),
    ):
        with pytest.raises(ValueError, match=f"`{name}`"):
            written(model, **{name: value})
    plain = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match="CausalLM"):
        written(plain)
