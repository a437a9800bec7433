"""save_model and load_model with KerasHub's language models."""

import json
import os

import keras
import numpy as np
import pytest

import keras_weightmods as kwm
from keras_weightmods.saving.container import Reader
from tests import models
from tests.backends import breadth, run_python
from tests.matrix.families import families
from tests.matrix.hub import make
from tests.saving import across as across_backends
from tests.saving.test_model import randomize_lora, states_of

hub = pytest.importorskip("keras_hub")
X = {
    "token_ids": np.array([[3, 1, 4, 1, 5, 0]]),
    "padding_mask": np.array([[1, 1, 1, 1, 1, 0]]),
}


TIED = {"tie_word_embeddings": True}


def round_trip(model, path):
    kwm.save_model(model, path)
    loaded = kwm.load_model(path)
    assert type(loaded) is type(model)
    assert [w.path for w in loaded.weights] == [w.path for w in model.weights]
    assert states_of(loaded) == states_of(model)
    if keras.backend.backend() == "torch":
        # JAX and TensorFlow take seconds to begin.
        models.assert_same(models.outputs(loaded, X), models.outputs(model, X))
    return loaded


@breadth("family", ["llama", "smollm3"])
def test_packed(family, tmp_path):
    if family == "llama":
        model = models.causal_lm("llama", **TIED)
    else:
        # All of its output projections have the path "o_proj/kernel".
        model = make("SmolLM3CausalLM", preprocessor=None)
    models.make_sparse(model)
    kwm.pack(model, head="int8" if family == "llama" else None)
    loaded = round_trip(model, tmp_path / "model")
    assert loaded.compiled
    # Llama's own config forgets it.
    assert "tie_word_embeddings" not in model.backbone.get_config()
    if family == "llama":
        assert loaded.backbone.token_embedding.tie_weights


@pytest.mark.one_backend
def test_plain_and_scaled_with_lora(tmp_path):
    model, path = models.causal_lm("llama", **TIED), tmp_path / "model"
    round_trip(model, path)
    kwm.attach_scaling(model)
    for weight in model.weights:
        if weight.name.endswith("_scale"):
            weight.assign(np.exp(models.normal(*weight.shape)))
    model.backbone.enable_lora(2)
    randomize_lora(model)
    loaded = round_trip(model, path)
    assert len(loaded.trainable_weights) == len(model.trainable_weights)


@pytest.mark.one_backend
def test_quantized_by_keras(tmp_path):
    """Keras itself forgets the embeddings' scale once a policy is in a map."""
    model = models.causal_lm("llama", **TIED)
    model.quantize("int8")
    loaded = round_trip(model, tmp_path / "model")
    round_trip(loaded, tmp_path / "again")


@pytest.mark.one_backend
def test_inputs_that_keras_would_quantize_once_loaded(tmp_path):
    """With its own files too, whose loaded model computes other values."""
    other = keras.quantizers.AbsMaxQuantizer(value_range=(-7, 7))
    config = keras.quantizers.Int8QuantizationConfig(activation_quantizer=other)
    for match, arguments in (
        ("where it has no quantizer", {"mode": "int4"}),
        (r"where it has AbsMaxQuantizer .*\(-7, 7\)", {"config": config}),
    ):
        model = models.causal_lm()
        model.quantize(**arguments)
        with pytest.raises(ValueError, match=match):
            kwm.save_model(model, tmp_path / "model")
        assert not os.listdir(tmp_path)


@pytest.mark.one_backend
def test_the_tokenizer_comes_back_and_generate_works(tmp_path):
    path = tmp_path / "model"
    preprocessor = models.gpt2_preprocessor(add_end_token=False)
    model = models.make_sparse(models.causal_lm("gpt2", preprocessor))
    kwm.pack(model, dtype="int8")
    model.compile(sampler="greedy")
    # Before the file is written: it makes parts of the preprocessor.
    expected = model.generate("ab", max_length=6)
    kwm.save_model(model, path)
    loaded = kwm.load_model(path)
    assert loaded.preprocessor.get_config() == model.preprocessor.get_config()
    loaded.compile(sampler="greedy")
    assert loaded.generate("ab", max_length=6) == expected
    name = "assets/preprocessor/tokenizer/vocabulary.json"
    with Reader(path, "keras_weightmods.model", (1,)) as reader:
        vocabulary = reader.read_json(name)
    assert vocabulary == dict(model.preprocessor.tokenizer.vocabulary)


class Forgetful(hub.tokenizers.GPT2Tokenizer):
    """Its vocabulary is not in its assets."""

    def save_assets(self, dir_path):
        pass


@pytest.mark.one_backend
def test_a_preprocessor_that_cannot_be_saved_is_left_out(tmp_path):
    path = tmp_path / "model"
    good = models.gpt2_preprocessor().tokenizer
    preprocessor = hub.models.GPT2CausalLMPreprocessor(
        Forgetful(good.vocabulary, good.merges), sequence_length=8
    )
    model = models.causal_lm("gpt2", preprocessor)
    with pytest.warns(UserWarning, match=r"preprocessor .* is not saved"):
        kwm.save_model(model, path)
    assert model.preprocessor is preprocessor
    loaded = kwm.load_model(path)
    assert loaded.preprocessor is None
    models.assert_same(models.outputs(loaded, X), models.outputs(model, X))
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.one_backend
def test_layers_named_by_the_name_of_the_model(tmp_path):
    """HGNetV2 names them otherwise with a name that is given; it has none."""
    model = make("HGNetV2Backbone")
    kwm.save_model(model, tmp_path / "model")
    loaded = kwm.load_model(tmp_path / "model")
    assert loaded.name == model.name
    assert states_of(loaded) == states_of(model)
    paths = [weight.path for weight in model.weights]
    assert [weight.path for weight in loaded.weights] == paths


def across(folder, names, order):
    """Save on each backend what the next ones load; return what failed."""
    wrong = []
    for backend in order:
        program = "-m", "tests.saving.across", folder, *names
        printed = run_python(*program, backend=backend)
        wrong += json.loads(printed.splitlines()[-1])
    return wrong


@pytest.mark.heavy
def test_a_file_of_one_backend_is_loaded_by_another(tmp_path):
    """Where Keras lists the layers of the two in another order."""
    names = "two branches", "gemma3"
    for name in names:
        across_backends.save(tmp_path, name)
    # It loads torch's, and saves what is loaded here.
    assert not across(tmp_path, names, ["jax"])
    for name in names:
        across_backends.load(tmp_path / f"{name}.jax")


@pytest.mark.heavy
@pytest.mark.one_backend
def test_files_of_every_family_on_every_backend(tmp_path):
    """In both directions: the first loads again what the last saved."""
    names = [name for name, each in families().items() if each.kind != "pair"]
    backends = ["jax", "tensorflow", "torch"]
    wrong = across(tmp_path, names, backends + backends[:2])
    # What is refused by `save_model` is in no file.
    assert [each for each in wrong if each[2] != str(tmp_path)] == []
