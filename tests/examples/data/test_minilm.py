import math
import zipfile

import numpy as np
import pytest
from keras import ops
from safetensors import numpy as safetensors

from examples.data import minilm
from tests.models import assert_same

keras_hub = pytest.importorskip("keras_hub")


def gelu(x):
    inside = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    return x * (1 + np.tanh(inside)) / 2


def embedding(weights, tokens, heads):
    """BERT on one text without padding, in float64, and its mean."""
    w = {name: value.astype("float64") for name, value in weights.items()}

    def dense(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-12)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    x = norm(
        w["embeddings.word_embeddings.weight"][tokens]
        + w["embeddings.position_embeddings.weight"][: len(tokens)]
        + w["embeddings.token_type_embeddings.weight"][0],
        "embeddings.LayerNorm",
    )
    size = x.shape[-1] // heads
    for block in range(sum(".intermediate.dense.bias" in name for name in w)):
        name = f"encoder.layer.{block}"
        parts = []
        for part in ("query", "key", "value"):
            part = dense(x, f"{name}.attention.self.{part}")
            parts.append(part.reshape(len(x), heads, size))
        query, key, value = parts
        scores = np.exp(np.einsum("qhs,khs->hqk", query, key) / size**0.5)
        scores /= scores.sum(-1, keepdims=True)
        found = np.einsum("hqk,khs->qhs", scores, value).reshape(x.shape)
        x = x + dense(found, f"{name}.attention.output.dense")
        x = norm(x, f"{name}.attention.output.LayerNorm")
        inner = gelu(dense(x, f"{name}.intermediate.dense"))
        x = x + dense(inner, f"{name}.output.dense")
        x = norm(x, f"{name}.output.LayerNorm")
    mean = x.mean(0)
    return mean / np.linalg.norm(mean)


@pytest.mark.heavy
def test_the_real_model():
    file = minilm.find_zip()
    tokenizers = pytest.importorskip("tokenizers")
    with zipfile.ZipFile(file) as archive:
        weights = safetensors.load(archive.read("model.safetensors"))
        original = tokenizers.Tokenizer.from_str(
            archive.read("tokenizer.json").decode()
        )
    original.no_padding()
    original.no_truncation()
    model = minilm.load_minilm(32)
    texts = [
        "A naïve, over-long film; its hero wins $1,000 in São Paulo!",
        "It's dulll, adn teh ednig is n't.",
    ]
    inputs = model.preprocessor(texts)
    for text, ids in zip(texts, np.asarray(inputs["token_ids"])):
        expected = original.encode(text).ids
        assert ids[: len(expected)].tolist() == expected
    found = ops.convert_to_numpy(model(inputs, training=False))
    lengths = np.asarray(inputs["padding_mask"]).sum(-1)
    for row, ids, length in zip(found, inputs["token_ids"], lengths):
        tokens = np.asarray(ids)[:length]
        expected = embedding(weights, tokens, 12)
        np.testing.assert_allclose(row, expected, atol=3e-6)
    # Casing is no noise to a vocabulary without case.
    other = model.preprocessor([text.swapcase() for text in texts])
    assert_same(other, inputs)
