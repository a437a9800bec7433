"""Models of KerasHub in Hugging Face's transformers."""

import json
import warnings

import numpy as np
import pytest
import safetensors.numpy

import keras_weightmods as kwm
from keras_weightmods.core.reparameterization import reparameterizations
from tests import models
from tests.exporting.test_gguf_file import packed_integers

pytest.importorskip("keras_hub")

pytestmark = pytest.mark.one_backend

TOKENS = np.array([[3, 1, 4, 1, 5, 9, 2, 6]])
X = {"token_ids": TOKENS, "padding_mask": np.ones_like(TOKENS)}
# The projections of a block, by the names in transformers.
LLAMA = [f"self_attn.{name}_proj.weight" for name in "qkvo"]
LLAMA += [f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
# The same of KerasHub.
KERAS = [
    f"self_attention/{name}/kernel"
    for name in ("query", "key", "value", "attention_output")
]
KERAS += [
    f"feedforward_{name}_dense/kernel"
    for name in ("gate", "intermediate", "output")
]


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


def decoded(arrays, module, weights):
    """Return the integers (N, K) of a module and their scales.

    By compressed-tensors' definition: integer i of a row is in the bits from
    `num_bits` i on of the row's words, with half of 2^num_bits added.
    """
    bits, shape = weights["num_bits"], arrays[f"{module}.weight_shape"]
    words = arrays[f"{module}.weight_packed"]
    assert words.dtype == "int32"
    stream = np.unpackbits(words.view("uint8"), axis=-1, bitorder="little")
    codes = stream.reshape(shape[0], -1, bits) @ 2 ** np.arange(bits)
    scales = arrays[f"{module}.weight_scale"].astype("float32")
    size = {"group": weights["group_size"], "channel": shape[1]}
    scales = scales.repeat(size[weights["strategy"]], axis=1)
    return codes - 2 ** (bits - 1), scales


def in_integers(kind, path, dtype="float32"):
    """Export a Llama with integers, and return it."""
    sizes = {"vocabulary_size": 96, "hidden_dim": 64, "intermediate_dim": 96}
    model = models.causal_lm("llama3", dtype=dtype, **sizes)
    models.randomize(model, scale=0.2)
    if kind == "2:4":
        models.make_sparse(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`pack` rounded")
        kwm.pack(model, {"2:4": "int4"}.get(kind, kind))
    with pytest.warns(UserWarning, match="1 packed weights are floats") as told:
        kwm.export(model, path, "transformers", keep_packed=True)
    assert __file__ in {w.filename for w in told}
    return model


@pytest.mark.parametrize(
    ("kind", "dtype", "schemes"),
    [
        ("int4", "bfloat16", {(4, "group", 64), (4, "group", 32)}),
        ("2:4", "float32", {(4, "group", 64), (4, "group", 32)}),
        ("int6", "float32", {(8, "channel", None), (8, "group", 32)}),
        ("int8", "float32", {(8, "channel", None)}),
    ],
)
def test_integers_for_vllm(kind, dtype, schemes, tmp_path):
    path = tmp_path / "model"
    model = in_integers(kind, path, dtype)
    names = sorted(each.name for each in path.iterdir())
    assert names == ["config.json", "model.safetensors"]
    arrays = safetensors.numpy.load_file(path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    config = config["quantization_config"]
    assert config["format"] == "pack-quantized"
    assert config["ignore"] == ["lm_head", "model.embed_tokens"]
    groups = list(config["config_groups"].values())
    keys = "num_bits", "strategy", "group_size"
    assert {tuple(g["weights"][k] for k in keys) for g in groups} == schemes
    items = {i.target.path: i for i in reparameterizations(model)}
    for theirs, ours in zip(LLAMA, KERAS, strict=True):
        module = f"model.layers.0.{theirs}".removesuffix(".weight")
        (weights,) = (
            group["weights"]
            for group in groups
            if {module, "Linear"} & {*group["targets"]}
        )
        expected = packed_integers(items.pop(f"transformer_layer_0/{ours}"))
        for pair in zip(decoded(arrays, module, weights), expected):
            np.testing.assert_array_equal(*pair)
        assert f"{module}.weight" not in arrays
    # The head and the look-up.
    (table,) = items.values()
    expected = models.numpy(table.target.layer.embeddings)
    found = arrays["model.embed_tokens.weight"].astype("float32")
    np.testing.assert_array_equal(found, expected.astype("float32"))


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_transformers_reads_the_integers(kind, tmp_path):
    pytest.importorskip("compressed_tensors")
    transformers = pytest.importorskip("transformers")
    model = in_integers(kind, tmp_path / "model")
    found = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype="auto", attn_implementation="eager"
    )
    kwm.unpack(model)
    expected = models.numpy(model(X))
    np.testing.assert_allclose(logits(found.eval()), expected, atol=1e-5)


def test_what_compressed_tensors_does_not_hold(tmp_path):
    gpt2 = models.causal_lm("gpt2", hidden_dim=64)
    kwm.pack(gpt2, "int8")
    sparse = models.make_sparse(models.causal_lm("llama3"))
    kwm.pack(sparse, "float32")
    for model in (gpt2, sparse):
        with pytest.raises(ValueError, match="needs kernels in integers"):
            kwm.export(model, tmp_path / "a", "transformers", keep_packed=True)
    assert not list(tmp_path.iterdir())
