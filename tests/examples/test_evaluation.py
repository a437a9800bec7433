import evaluation
import keras
import numpy as np
import pytest

keras_hub = pytest.importorskip("keras_hub")

TOKENS = np.random.default_rng(0).integers(0, 11, (5, 7))


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    backbone = keras_hub.models.Llama3Backbone(
        vocabulary_size=11,
        num_layers=1,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=8,
        intermediate_dim=8,
        tie_word_embeddings=True,
    )
    model = keras_hub.models.Llama3CausalLM(backbone, preprocessor=None)
    for variable in model.weights:
        variable.assign(keras.random.normal(variable.shape))
    return model


def reference_losses(model, tokens):
    inputs = tokens[:, :-1].astype("int32")
    logits = model({"token_ids": inputs, "padding_mask": np.ones_like(inputs)})
    logits = keras.ops.convert_to_numpy(logits).astype("float64")
    log_sum = np.log(np.exp(logits).sum(-1))
    picked = np.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0]
    return (log_sum - picked).mean(-1)


def test_losses_follow_changed_weights_without_a_new_build(model):
    measure = evaluation.Perplexity(model, batch_size=2)
    functions = []
    for _ in range(3):
        expected = reference_losses(model, TOKENS)
        losses = measure.losses(TOKENS, verbose=0)
        np.testing.assert_allclose(losses, expected, rtol=1e-5)
        np.testing.assert_allclose(
            measure(TOKENS, verbose=0), np.exp(expected.mean()), rtol=1e-5
        )
        functions.append(measure._row_losses)
        for variable in model.trainable_variables:
            variable.assign(variable * 0.9)
    assert functions[0] is functions[1] is functions[2]


def test_function_and_progress_bar(model, capsys):
    expected = np.exp(reference_losses(model, TOKENS).mean())
    value = evaluation.perplexity(model, TOKENS, batch_size=5, name="dense")
    assert value == pytest.approx(expected, rel=1e-5)
    shown = capsys.readouterr().out.rsplit("dense: ", 1)[1].split()[0]
    assert float(shown) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("shape", [(0, 4), (3, 1), (4,)])
def test_wrong_tokens(model, shape):
    with pytest.raises(ValueError, match="tokens"):
        evaluation.perplexity(model, np.zeros(shape, int), verbose=0)


@pytest.mark.parametrize("batch_size", [0, 1.5])
def test_wrong_batch_size(model, batch_size):
    with pytest.raises(ValueError, match="batch_size"):
        evaluation.Perplexity(model, batch_size)
