import argparse
import string

import keras
import numpy as np
import pytest

from examples import signature_text
from examples.data.typos import NOISES
from tests.models import assert_same, assert_same_bits, mlp

keras_hub = pytest.importorskip("keras_hub")
pytest.importorskip("typo")

pytestmark = pytest.mark.one_backend

COUNTS = {"texts": 16, "test_texts": 8, "length": 8, "epochs": 1, "blocks": 1}
ARGS = argparse.Namespace(rate=0.2, learning_rate=0.01, **COUNTS)
TEXTS = [f"{a}{b} {b}{a} {a}" for a in "abcde" for b in "vwxyz"]
LABELS = np.array([text[0] < "c" for text in TEXTS], "int32")


def tiny_encoder():
    """Return a random BERT of two blocks on single letters."""
    letters = string.ascii_lowercase
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    pieces += [f"##{letter}" for letter in letters]
    tokenizer = keras_hub.tokenizers.BertTokenizer(pieces)
    sizes = {"vocabulary_size": len(pieces), "num_layers": 2, "num_heads": 2}
    sizes |= {"hidden_dim": 8, "intermediate_dim": 8}
    keras.utils.set_random_seed(0)
    backbone = keras_hub.models.BertBackbone(
        **sizes, max_sequence_length=ARGS.length
    )
    preprocessor = keras_hub.models.BertTextEmbedderPreprocessor(
        tokenizer, sequence_length=ARGS.length
    )
    return keras_hub.models.BertTextEmbedder(backbone, preprocessor)


def test_patches_go_on_and_come_off(monkeypatch):
    encoder = tiny_encoder()
    frozen = encoder.backbone.get_layer("token_embedding")
    before = keras.ops.convert_to_numpy(frozen.embeddings)
    extracted, seen = {}, []
    extract, accuracy = signature_text.extract, signature_text.accuracy

    def recorded(init, clean, robust, noise, model, blocks):
        found = extract(init, clean, robust, noise, model, blocks)
        extracted[noise, blocks] = clean, found
        return found

    def measured(model, inputs, labels):
        seen.append(model.get_weights())
        return accuracy(model, inputs, labels)

    monkeypatch.setattr(signature_text, "extract", recorded)
    monkeypatch.setattr(signature_text, "accuracy", measured)
    results = signature_text.study(encoder, TEXTS, LABELS, 0, ARGS)
    assert_same(keras.ops.convert_to_numpy(frozen.embeddings), before)

    # Each weight at each measurement, from the signatures by hand.
    clean = extracted["typos", 1][0]
    at = dict(zip(results, seen[:: 1 + len(NOISES)]))
    assert len(seen) == (1 + len(NOISES)) * len(results)
    shallow = {noise: extracted[noise, 1][1] for noise in NOISES}
    for name, changes in {
        "clean model": {},
        "patch typos x 1.5": {shallow["typos"]: 1.5},
        "patch spaces, all blocks": {extracted["spaces", 2][1]: 1.0},
        "sum of the patches": dict.fromkeys(shallow.values(), 1.0),
        "mean of the patches": dict.fromkeys(shallow.values(), 0.5),
        "patch clean again (control)": {extracted["clean again", 1][1]: 1.0},
        "patches removed": {},
    }.items():
        expected = [weight.astype("float64") for weight in clean]
        for signature, scale in changes.items():
            for entry in signature:
                expected[entry.position] += scale * entry.tensor
        for found, weight in zip(at[name], expected):
            np.testing.assert_allclose(found, weight, rtol=1e-6, atol=1e-7)
    assert_same_bits(at["patches removed"], clean)
    layers = {entry.info.path.split("/")[0] for entry in shallow["typos"]}
    assert layers == {"embeddings_layer_norm", "transformer_layer_0"}
    for signature in (shallow["typos"], extracted["clean again", 1][1]):
        assert any(np.any(entry.tensor) for entry in signature)


def test_a_model_that_does_not_come_back_is_an_error():
    model = mlp(2, 1)
    clean = model.get_weights()
    signature_text.assert_clean(model, clean)
    # Equal, and not the same bits.
    model.set_weights([clean[0], -clean[1]])
    with pytest.raises(RuntimeError, match="did not come back"):
        signature_text.assert_clean(model, clean)
