"""Models of KerasHub in Hugging Face's transformers."""

import os
import warnings

import keras
import numpy as np
import pytest

import keras_weightmods as kwm
from tests import models

pytest.importorskip("keras_hub")

pytestmark = pytest.mark.one_backend

TOKENS = np.array([[3, 1, 4, 1, 5, 9, 2, 6]])
X = {"token_ids": TOKENS, "padding_mask": np.ones_like(TOKENS)}
# The projections of a block, by the names in transformers.
LLAMA = [
    *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
]


def sparse(family, **sizes):
    model = models.randomize(models.causal_lm(family, **sizes), scale=0.2)
    return models.make_sparse(model)


def exported(model, path):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*exported in dense form")
        kwm.export(model, path, format="transformers")
    return path


def loaded(path):
    transformers = pytest.importorskip("transformers")
    found = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype="auto", attn_implementation="eager"
    )
    return found.eval()


def logits(found):
    import torch

    with torch.no_grad():
        return found(torch.from_numpy(TOKENS)).logits.float().numpy()


def groups(weight):
    """Return the counts of nonzeros in groups along the contraction."""
    kept = np.array(weight.float().detach().cpu().numpy() != 0)
    return kept.reshape(kept.shape[0], -1, 4).sum(-1)


@pytest.mark.parametrize("tied", [True, False])
def test_a_packed_llama3(tied, tmp_path):
    sizes = {"vocabulary_size": 40, "num_layers": 2, "hidden_dim": 32}
    model = sparse("llama3", **sizes, tie_word_embeddings=tied)
    kwm.pack(model, activations=None)
    expected = models.numpy(model(X))
    found = loaded(exported(model, tmp_path / "model"))
    np.testing.assert_allclose(logits(found), expected, atol=1e-4)
    state = found.state_dict()
    for block in range(2):
        for name in LLAMA:
            counts = groups(state[f"model.layers.{block}.{name}"])
            assert (counts == 2).all()
    # Packed still.
    assert any(w.name == "kernel_values" for w in model.weights)
    models.assert_same(models.numpy(model(X)), expected)


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="the fastest")
@pytest.mark.parametrize("family", ["gpt2", "gemma"])
def test_other_families(family, tmp_path):
    model = sparse(family)
    expected = models.numpy(model(X))
    found = loaded(exported(model, tmp_path / "model"))
    np.testing.assert_allclose(logits(found), expected, atol=1e-4)


def test_in_bfloat16(tmp_path):
    model = sparse("llama3", dtype="bfloat16", tie_word_embeddings=True)
    expected = models.numpy(model(X))
    found = loaded(exported(model, tmp_path / "model"))
    state = found.state_dict()
    kernel = model.backbone.transformer_layers[0]._feedforward_gate_dense.kernel
    weight = state[f"model.layers.0.{LLAMA[4]}"]
    assert str(weight.dtype) == "torch.bfloat16"
    np.testing.assert_array_equal(
        weight.float().numpy().T, models.numpy(kernel)
    )
    # Rounded to 8 bits in each step of both.
    scale = np.abs(expected).max()
    np.testing.assert_allclose(logits(found), expected, atol=0.05 * scale)


def test_a_tokenizer_that_kerashub_cannot_export_is_named(tmp_path):
    from keras_hub import models as hub

    class Other(hub.GPT2Tokenizer):
        pass

    good = models.gpt2_preprocessor().tokenizer
    preprocessor = hub.GPT2CausalLMPreprocessor(
        Other(good.vocabulary, good.merges), sequence_length=8
    )
    model = models.causal_lm("gpt2", preprocessor)
    with pytest.raises(ValueError, match=r"model\.preprocessor = None"):
        kwm.export(model, tmp_path / "model", format="transformers")
    assert os.listdir(tmp_path) == []
