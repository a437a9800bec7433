"""Models of KerasHub in Hugging Face's transformers."""

import warnings

import numpy as np
import pytest

import keras_weightmods as kwm
from tests import models

pytest.importorskip("keras_hub")

pytestmark = pytest.mark.one_backend

TOKENS = np.array([[3, 1, 4, 1, 5, 9, 2, 6]])
X = {"token_ids": TOKENS, "padding_mask": np.ones_like(TOKENS)}
# The projections of a block, by the names in transformers.
LLAMA = [f"self_attn.{name}_proj.weight" for name in "qkvo"]
LLAMA += [f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")]


def exported(family, path, packed=False, **sizes):
    """Return a sparse model, what it computes, and the one transformers has."""
    transformers = pytest.importorskip("transformers")
    model = models.randomize(models.causal_lm(family, **sizes), scale=0.2)
    models.make_sparse(model)
    if packed:
        kwm.pack(model, activations=None)
    expected = models.numpy(model(X))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*exported in dense form")
        kwm.export(model, path, format="transformers")
    found = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype="auto", attn_implementation="eager"
    )
    return model, expected, found.eval()


def logits(found):
    import torch

    with torch.no_grad():
        return found(torch.from_numpy(TOKENS)).logits.float().numpy()


@pytest.mark.parametrize("tied", [True, False])
def test_a_packed_llama3(tied, tmp_path):
    sizes = {"num_layers": 2, "tie_word_embeddings": tied}
    model, expected, found = exported("llama3", tmp_path / "a", True, **sizes)
    np.testing.assert_allclose(logits(found), expected, atol=1e-4)
    state = found.state_dict()
    for block in range(2):
        for name in LLAMA:
            weight = state[f"model.layers.{block}.{name}"].float().numpy()
            groups = (weight != 0).reshape(len(weight), -1, 4).sum(-1)
            assert (groups == 2).all()
    # Packed still.
    assert any(w.name == "kernel_values" for w in model.weights)
    models.assert_same(models.numpy(model(X)), expected)


def test_in_bfloat16(tmp_path):
    model, expected, found = exported(
        "llama3", tmp_path / "a", dtype="bfloat16", tie_word_embeddings=True
    )
    kernel = model.backbone.transformer_layers[0]._feedforward_gate_dense.kernel
    weight = found.state_dict()[f"model.layers.0.{LLAMA[4]}"]
    assert str(weight.dtype) == "torch.bfloat16"
    np.testing.assert_array_equal(
        weight.float().numpy().T, models.numpy(kernel)
    )
    # Rounded to 8 bits in each step of both.
    scale = np.abs(expected).max()
    np.testing.assert_allclose(logits(found), expected, atol=0.05 * scale)
