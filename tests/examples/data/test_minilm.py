import math
import zipfile

import numpy as np
import pytest
from keras import ops
from safetensors import numpy as safetensors

from examples.data import minilm

keras_hub = pytest.importorskip("keras_hub")


def erf_gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def tanh_gelu(x):
    inside = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    return x * (1 + np.tanh(inside)) / 2


def embedding(weights, tokens, heads, gelu):
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
        query, key, value = (
            dense(x, f"{name}.attention.self.{part}")
            for part in ("query", "key", "value")
        )
        found = []
        for head in range(heads):
            cut = slice(head * size, (head + 1) * size)
            scores = np.exp(query[:, cut] @ key[:, cut].T / math.sqrt(size))
            scores /= scores.sum(-1, keepdims=True)
            found.append(scores @ value[:, cut])
        attended = dense(
            np.concatenate(found, -1), f"{name}.attention.output.dense"
        )
        x = norm(x + attended, f"{name}.attention.output.LayerNorm")
        inner = gelu(dense(x, f"{name}.intermediate.dense"))
        x = norm(
            x + dense(inner, f"{name}.output.dense"), f"{name}.output.LayerNorm"
        )
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
    backbone = model.backbone
    assert (backbone.num_layers, backbone.hidden_dim) == (6, 384)
    assert (backbone.num_heads, backbone.vocabulary_size) == (12, 30522)
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
        expected = embedding(weights, tokens, 12, tanh_gelu)
        np.testing.assert_allclose(row, expected, atol=3e-6)
        # The original's GELU: nearly the same, as the docstring says.
        original = embedding(weights, tokens, 12, erf_gelu)
        assert 0.999 < row @ original < 1.001

    # Casing is no noise to a vocabulary without case.
    for changed in (str.upper, str.title, str.swapcase):
        other = model.preprocessor([changed(text) for text in texts])
        for name, value in inputs.items():
            np.testing.assert_array_equal(value, other[name])
