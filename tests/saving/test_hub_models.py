"""save_model and load_model with KerasHub's language models."""

import os

import keras
import numpy as np
import pytest

import keras_weightmods as kwm
from keras_weightmods.saving.container import Reader
from tests import models
from tests.backends import breadth
from tests.matrix.hub import make
from tests.saving.test_model import randomize_lora, states_of

hub = pytest.importorskip("keras_hub")
X = {
    "token_ids": np.array([[3, 1, 4, 1, 5, 0]]),
    "padding_mask": np.array([[1, 1, 1, 1, 1, 0]]),
}


def smollm3():
    # All of its output projections have the path "o_proj/kernel".
    backbone = hub.models.SmolLM3Backbone(
        vocabulary_size=20,
        num_layers=2,
        hidden_dim=16,
        intermediate_dim=24,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=False,
        attention_dropout=0.0,
        rope_layer_enabled_list=[True, False],
        layer_types=["full_attention"] * 2,
        mlp_bias=False,
        layer_norm_epsilon=1e-5,
        max_position_embeddings=16,
        rope_theta=1e4,
        partial_rotary_factor=1.0,
    )
    return hub.models.SmolLM3CausalLM(backbone, preprocessor=None)


TIED = {"tie_word_embeddings": True}
GEMMA = {
    "use_post_ffw_norm": True,
    "final_logit_soft_cap": 30.0,
    "attention_logit_soft_cap": 5.0,
}
MODELS = {
    "llama tied": lambda: models.causal_lm("llama", **TIED),
    "smollm3": smollm3,
    "llama": models.causal_lm,
    "bfloat16": lambda: models.causal_lm("llama", **TIED, dtype="bfloat16"),
    "gemma": lambda: models.causal_lm("gemma", **GEMMA),
    "gpt2": lambda: models.causal_lm("gpt2"),
}
FURTHER = [
    pytest.param(name, marks=pytest.mark.heavy) for name in [*MODELS][2:]
]


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


@breadth("name", ["llama tied", "smollm3"])
def test_packed(name, tmp_path):
    model = models.make_sparse(MODELS[name]())
    kwm.pack(model, head="int8" if "tied" in name else None)
    loaded = round_trip(model, tmp_path / "model")
    assert loaded.compiled
    # Llama's own config forgets it.
    assert "tie_word_embeddings" not in model.backbone.get_config()
    if "tied" in name:
        assert loaded.backbone.token_embedding.tie_weights


@pytest.mark.one_backend
@pytest.mark.parametrize("name", ["llama tied", *FURTHER])
def test_plain_scaled_and_packed(name, tmp_path):
    model, path = MODELS[name](), tmp_path / "model"
    round_trip(model, path)
    kwm.attach_scaling(model)
    for weight in model.weights:
        if weight.name.endswith("_scale"):
            weight.assign(np.exp(models.normal(*weight.shape)))
    model.backbone.enable_lora(2)
    randomize_lora(model)
    loaded = round_trip(model, path)
    assert len(loaded.trainable_weights) == len(model.trainable_weights)
    model = models.make_sparse(MODELS[name]())
    kwm.pack(model)
    round_trip(model, path)


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
    text = "abcd ab"
    np.testing.assert_array_equal(
        loaded.preprocessor.tokenizer(text), model.preprocessor.tokenizer(text)
    )
    assert loaded.preprocessor.get_config() == model.preprocessor.get_config()
    loaded.compile(sampler="greedy")
    assert loaded.generate("ab", max_length=6) == expected
    name = "assets/preprocessor/tokenizer/vocabulary.json"
    with Reader(path, "keras_weightmods.model", (1,)) as reader:
        vocabulary = reader.read_json(name)
    assert vocabulary == dict(model.preprocessor.tokenizer.vocabulary)


@pytest.mark.heavy
def test_a_task_that_cannot_compile_itself(tmp_path):
    # Its own loss reads the tokenizer.
    model = make("PARSeqCausalLM")
    kwm.save_model(model, tmp_path / "model")
    loaded = kwm.load_model(tmp_path / "model")
    assert not loaded.compiled
    assert states_of(loaded) == states_of(model)


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


def hgnet_v2(**kwargs):
    return hub.models.HGNetV2Backbone(
        depths=[1, 1],
        embedding_size=8,
        hidden_sizes=[8, 16],
        stem_channels=[3, 8, 8],
        hidden_act="relu",
        use_learnable_affine_block=False,
        stackwise_stage_filters=[[8, 8, 8, 1, 1, 3], [8, 8, 16, 1, 1, 3]],
        apply_downsample=[False, True],
        use_lightweight_conv_block=[False, False],
        image_shape=(32, 32, 3),
        **kwargs,
    )


def d_fine(**kwargs):
    stages = ["stage1", "stage2"]
    return hub.models.DFineBackbone(
        backbone=hgnet_v2(out_features=stages),
        decoder_in_channels=[16, 16],
        encoder_hidden_dim=16,
        num_labels=3,
        num_denoising=0,
        learn_initial_query=False,
        num_queries=4,
        anchor_image_size=(32, 32),
        feat_strides=[4, 8],
        num_feature_levels=2,
        hidden_dim=16,
        encoder_in_channels=[8, 16],
        encode_proj_layers=[1],
        num_attention_heads=2,
        encoder_ffn_dim=16,
        num_encoder_layers=1,
        hidden_expansion=0.5,
        depth_multiplier=0.5,
        eval_idx=-1,
        num_decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=16,
        decoder_n_points=[2, 2],
        lqe_hidden_dim=8,
        num_lqe_layers=1,
        image_shape=(32, 32, 3),
        out_features=stages,
        **kwargs,
    )


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (hgnet_v2, "mine"),
        (hgnet_v2, None),
        pytest.param(d_fine, None, marks=pytest.mark.heavy),
    ],
)
def test_layers_named_by_the_name_of_the_model(make, name, tmp_path):
    # With a name that is given HGNetV2 names its layers otherwise than with
    # the one that Keras gives.
    model = make() if name is None else make(name=name)
    x = models.normal(1, 32, 32, 3)
    kwm.save_model(model, tmp_path / "model")
    loaded = kwm.load_model(tmp_path / "model")
    assert loaded.name == model.name
    if make is hgnet_v2:
        # D-FINE has layers that Keras numbers.
        paths = [weight.path for weight in model.weights]
        assert [weight.path for weight in loaded.weights] == paths
    models.assert_same(models.outputs(loaded, x), models.outputs(model, x))
