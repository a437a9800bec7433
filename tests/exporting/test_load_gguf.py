import contextlib
import os
import pathlib
import re
import warnings

import keras
import numpy as np
import pytest

import keras_weightmods as kwm
from keras_weightmods.exporting import gguf_families, gguf_header
from tests import models
from tests.exporting.test_gguf_file import SIZES, TIED

one_backend = pytest.mark.one_backend

pytest.importorskip("keras_hub")
gguf = pytest.importorskip("gguf")

LLAMA31 = {
    "rope_frequency_adjustment_factor": 8.0,
    "rope_low_freq_factor": 1.0,
    "rope_high_freq_factor": 4.0,
    "rope_pretraining_sequence_length": 8192,
    "rope_max_wavelength": 500000.0,
}
SLIDING = {"use_sliding_window_attention": True, "sliding_window_size": 4}
SLIDING |= {"head_dim": 32, "layer_norm_epsilon": 1e-5}
FACTORS = {
    "rope_scaling_type": "su",
    "rope_scaling_short_factor": [1.05, 1.1, 1.15, 1.2, 1.4, 1.6, 2.0, 2.5],
    "rope_scaling_long_factor": [1.1, 1.5, 2.5, 4.0, 8.0, 16.0, 32.0, 64.0],
    # The texts here are longer than that.
    "pretraining_sequence_length": 8,
    "max_sequence_length": 1024,
}
CASES = {
    "llama3": ("llama3", {}),
    "llama3, tied": ("llama3", TIED),
    "llama 3.1": ("llama3", LLAMA31),
    "qwen": ("qwen", {"tie_word_embeddings": False}),
    "qwen, tied": ("qwen", {"rope_max_wavelength": 1e6}),
    "qwen3": (
        "qwen3",
        {"head_dim": 32, "sliding_window_size": None, **TIED},
    ),
    "gemma3": ("gemma3", SLIDING),
    # The last of six blocks sees all tokens.
    "gemma3, long": (
        "gemma3",
        {**SLIDING, "num_layers": 6, "global_rope_scaling_factor": 8.0},
    ),
    # The last of four blocks knows no positions.
    "smollm3": ("smollm3", {"num_layers": 5, "rope_theta": 5e6}),
    "phi3": ("phi3", {"rope_max_wavelength": 2.5e5}),
    "phi3, short": ("phi3", {**FACTORS, "pretraining_sequence_length": 512}),
    "phi3, long": ("phi3", FACTORS),
}


def made(case, **others):
    """Return a model whose norms are exact with gemma's 1 in them."""
    family, sizes = CASES[case]
    model = models.causal_lm(family, **{**SIZES, **sizes, **others})
    # SmolLM3 computes its frequencies.
    computed = [(v, models.numpy(v)) for v in model.non_trainable_weights]
    models.randomize(model, scale=0.2)
    for variable, value in computed:
        variable.assign(value)
    for variable in model.weights:
        if variable.name == "scale":
            value = np.round(models.numpy(variable) * 256) / 256
            variable.assign(value)
    return model


def exported(folder, case, **others):
    model, path = made(case, **others), folder / "model.gguf"
    kwm.export(model, path, dtype="f32")
    return model, path


def rewritten(path, fields=None, drop=(), **tensors):
    """Write a file again with other fields or tensors."""
    reader = gguf.GGUFReader(path)
    values = {k: (f.contents(), f.types) for k, f in reader.fields.items()}
    architecture = values.pop("general.architecture")[0]
    file = gguf.GGUFWriter(path, (fields or {}).pop("", architecture))
    for name, (value, kinds) in values.items():
        if name.startswith("GGUF."):
            continue
        value = (fields or {}).pop(name, value)
        if value is not None:
            inner = kinds[1] if len(kinds) > 1 else None
            file.add_key_value(name, value, kinds[0], sub_type=inner)
    for name, value in (fields or {}).items():
        kind = gguf.GGUFValueType.get_type(value)
        inner = None
        if isinstance(value, list):
            inner = gguf.GGUFValueType.get_type(value[0])
        file.add_key_value(name, value, kind, sub_type=inner)
    for tensor in reader.tensors:
        if tensor.name not in drop and tensor.name not in tensors:
            data = np.array(tensor.data)
            file.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
    for name, (data, kind) in tensors.items():
        file.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path


@one_backend
@pytest.mark.parametrize("case", CASES)
def test_what_is_exported_is_loaded_bit_for_bit(case, tmp_path):
    model, path = exported(tmp_path, case)
    again = kwm.load_gguf(path)
    assert type(again) is type(model)
    expected = model.backbone.get_config()
    assert again.backbone.get_config() == {
        **expected,
        "name": again.backbone.name,
    }
    models.assert_same(models.weights_of(again), models.weights_of(model))
    tokens = np.array([[1, 7, 20, 33, 5, 64, 12, 90, 3, 8]])
    x = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}
    models.assert_same(models.outputs(again, x), models.outputs(model, x))
    again.fit(x, tokens, verbose=0)


@one_backend
def test_one_table_for_a_file_that_has_it_twice(tmp_path):
    model, path = exported(tmp_path, "qwen")
    with pytest.raises(ValueError, match=r"differ by 1\d\d%, in filepath"):
        kwm.load_gguf(path, tie_weights=True)
    head = models.numpy(model.backbone.token_embedding.reverse_embeddings).T
    table = (head * np.float32(1.1), "F32")
    again = kwm.load_gguf(
        rewritten(path, **{"token_embd.weight": table}), tie_weights=True
    )
    embedding = again.backbone.token_embedding
    assert embedding.tie_weights
    np.testing.assert_array_equal(models.numpy(embedding.embeddings), head)
    kwm.export(again, path, dtype="f32")
    assert kwm.load_gguf(path, tie_weights=True).count_params() < (
        model.count_params()
    )


def test_in_another_dtype(tmp_path):
    model, path = exported(tmp_path, "qwen")
    for dtype in ("bfloat16", "float16", "mixed_bfloat16"):
        again = kwm.load_gguf(path, dtype=dtype)
        for one, other in zip(again.weights, model.weights, strict=True):
            assert one.dtype == keras.DTypePolicy(dtype).variable_dtype
            expected = keras.ops.cast(other.value, one.dtype)
            np.testing.assert_array_equal(
                models.numpy(one), models.numpy(expected)
            )


TYPES = "F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL"


@one_backend
@pytest.mark.parametrize("kind", TYPES.split())
def test_types_of_tensors(kind, tmp_path, monkeypatch):
    # Parts of three rows.
    monkeypatch.setattr(gguf_header, "_CHUNK", 3 * 256 * 4)
    sizes = {"num_layers": 1, "hidden_dim": 256, "num_query_heads": 4}
    _, path = exported(tmp_path, "qwen", **sizes)
    found = gguf.GGMLQuantizationType[kind]
    block, nbytes = gguf.GGML_QUANT_SIZES[found]
    rng = np.random.default_rng(0)
    data, expected = {}, {}
    for name in ("blk.0.ffn_up.weight", "token_embd.weight"):
        # Without the highest bit of an exponent in fp16: finite.
        raw = rng.integers(256, size=(96, 256 // block * nbytes)) & 0xBF
        raw = raw.astype("uint8")
        data[name], expected[name] = (
            (raw, kind),
            gguf.quants.dequantize(raw, found),
        )
    again = kwm.load_gguf(rewritten(path, **data))
    up = again.backbone.get_layer("transformer_layer_0")
    for name, variable in {
        "blk.0.ffn_up.weight": up._feedforward_intermediate_dense.kernel,
        "token_embd.weight": again.backbone.token_embedding.embeddings,
    }.items():
        value = models.numpy(variable)
        value = value.T if "ffn" in name else value
        np.testing.assert_array_equal(value, expected[name])


@one_backend
def test_files_that_do_not_fit(tmp_path):
    _, path = exported(tmp_path, "qwen", num_layers=1)
    whole = path.read_bytes()
    norm, bias = "blk.0.attn_norm.weight", "blk.0.attn_q.bias"
    ones = np.ones(32, "float32"), "F32"
    for match, change in (
        (f"{norm} is missing, for 'transformer_layer_0/self", {"drop": norm}),
        ("2 problems:\n  blk.0.attn_norm", {"drop": (norm, bias)}),
        (f"{norm} has shape .32,., expected .64,.", {norm: ones}),
        ("more.weight is not one of this", {"more.weight": ones}),
        ("no matrix token_embd.weight", {"drop": "token_embd.weight"}),
        ("architecture='gpt2'", {"fields": {"": "gpt2"}}),
        ("block_count is 2$|missing", {"fields": {"qwen2.block_count": 2}}),
        ("block_count is 9999", {"fields": {"qwen2.block_count": 9999}}),
        (
            "qwen2.embedding_length is missing",
            {"fields": {"qwen2.embedding_length": None}},
        ),
        (
            "qwen2.attention.head_count must be an int >= 1. Received: 0",
            {"fields": {"qwen2.attention.head_count": 0}},
        ),
        (
            "head_count is 4, no multiple of head_count_kv=3",
            {"fields": {"qwen2.attention.head_count_kv": 3}},
        ),
        (
            "scaling.type is 'yarn'",
            {"fields": {"qwen2.rope.scaling.type": "yarn"}},
        ),
        (
            "rope.dimension_count is 8, a head has 16",
            {"fields": {"qwen2.rope.dimension_count": 8}},
        ),
        (
            "attention.value_length is 8, a head has 16",
            {"fields": {"qwen2.attention.value_length": 8}},
        ),
        (
            "rope_freqs.weight is not one of this",
            {"rope_freqs.weight": (np.ones(8, "float32"), "F32")},
        ),
    ):
        path.write_bytes(whole)
        with pytest.raises(ValueError, match=match) as error:
            kwm.load_gguf(rewritten(path, **change))
        assert str(path) in str(error.value)
    path.write_bytes(whole)
    with pytest.warns(UserWarning, match="qwen2.logit_scale. These settings"):
        kwm.load_gguf(rewritten(path, {"qwen2.logit_scale": 2.0}))
    for case, fields, match in (
        ("gemma3", {"gemma3.rope.freq_base": 1e4}, "KerasHub has 1000000.0"),
        (
            "llama3",
            {"llama.rope.scaling.factor": 2.0},
            "KerasHub has 1.0 alone",
        ),
    ):
        _, path = exported(tmp_path, case)
        with pytest.raises(ValueError, match=match):
            kwm.load_gguf(rewritten(path, fields))
    scaled = {"gemma3.rope.scaling.type": "none"}
    scaled["gemma3.rope.scaling.factor"] = 8.0
    _, path = exported(tmp_path, "gemma3")
    again = kwm.load_gguf(rewritten(path, scaled))
    assert again.backbone.global_rope_scaling_factor == 1
    _, path = exported(tmp_path, "llama 3.1")
    factors = np.linspace(1, 8, 8, dtype="float32"), "F32"
    with pytest.raises(ValueError, match="not those of Llama"):
        kwm.load_gguf(rewritten(path, **{"rope_freqs.weight": factors}))


@one_backend
def test_phi3_that_does_not_fit(tmp_path):
    _, path = exported(tmp_path, "phi3, long")
    whole = path.read_bytes()
    scaling, qkv = "phi3.rope.scaling", "blk.0.attn_qkv.weight"
    short = "rope_factors_short.weight"
    for match, change in (
        (
            "attn_factor is 1.5, and KerasHub has 1.8257",
            {"fields": {f"{scaling}.attn_factor": 1.5}},
        ),
        (
            "attn_factor is 1.0, and",
            {"fields": {f"{scaling}.attn_factor": None}},
        ),
        (
            f"no {scaling}.original_context_length",
            {"fields": {f"{scaling}.original_context_length": None}},
        ),
        (f"it has no {short}", {"drop": short}),
        # Phi 4 mini rotates three quarters.
        ("rotates all of a head", {short: (np.ones(6, "float32"), "F32")}),
        (f"{qkv} is missing, for 'transformer_layer_0/att", {"drop": qkv}),
        (
            f"{qkv} has shape .64, 64., expected .128, 64.",
            {qkv: (np.ones((64, 64), "float32"), "F32")},
        ),
    ):
        path.write_bytes(whole)
        with pytest.raises(ValueError, match=match) as error:
            kwm.load_gguf(rewritten(path, **change))
        assert str(path) in str(error.value)
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="`Phi3CausalLM`, which has two"):
        kwm.load_gguf(path, tie_weights=True)
    # The model takes 1024 tokens.
    window = "phi3.attention.sliding_window"
    for size in (0, 1024):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            kwm.load_gguf(rewritten(path, {window: size}))
    with pytest.warns(UserWarning, match=f"{window}. These settings"):
        kwm.load_gguf(rewritten(path, {window: 1023}))


@one_backend
def test_smollm3_that_does_not_fit(tmp_path):
    _, path = exported(tmp_path, "smollm3")
    whole = path.read_bytes()
    for name, shape in (
        ("output.weight", (96, 64)),
        ("blk.0.attn_q.bias", (64,)),
        ("rope_freqs.weight", (8,)),
    ):
        path.write_bytes(whole)
        ones = np.ones(shape, "float32"), "F32"
        with pytest.raises(ValueError, match=f"{name} is not one of this"):
            kwm.load_gguf(rewritten(path, **{name: ones}))
    path.write_bytes(whole)
    text = "takes Keras' global policy alone"
    with pytest.raises(ValueError, match=f"{text}.*dtype='bfloat16'"):
        kwm.load_gguf(path, dtype="bfloat16")
    before = keras.config.dtype_policy()
    try:
        keras.config.set_dtype_policy("mixed_bfloat16")
        with pytest.raises(ValueError, match=f"{text}.*policy 'mixed_bfl"):
            kwm.load_gguf(path)
        keras.config.set_dtype_policy("bfloat16")
        dtypes = {w.dtype for w in kwm.load_gguf(path).trainable_weights}
    finally:
        keras.config.set_dtype_policy(before)
    assert dtypes == {"bfloat16"}
    with pytest.raises(ValueError, match="a model with rope_layer_enabled_lis"):
        kwm.export(made("smollm3", rope_layer_enabled_list=[True] * 5), path)


@one_backend
@pytest.mark.parametrize("case", ["smollm3", "phi3"])
def test_packed_integers_stay_in_joined_tensors(case, tmp_path):
    model, path = made(case), tmp_path / "model.gguf"
    with pytest.warns(UserWarning, match="`pack` rounded"):
        kwm.pack(model, "int4", head=None)
    # The tables become Q8_0, and nothing is rounded to nearest.
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        kwm.export(model, path, dtype="q4_0")
    again = kwm.load_gguf(path)
    kwm.unpack(model)
    for one, other in zip(again.weights, model.weights, strict=True):
        if "token_embedding" not in one.path:
            np.testing.assert_array_equal(
                models.numpy(one), models.numpy(other)
            )


@one_backend
def test_files_that_are_cut(tmp_path):
    _, path = exported(tmp_path, "qwen", num_layers=1)
    whole = path.read_bytes()
    for size in (*range(0, 1000, 7), len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="a whole GGUF file") as error:
            kwm.load_gguf(path)
        assert len(str(error.value)) < 2000
    path.write_bytes(whole[:4] + b"\0\0\0\3" + whole[8:])
    with pytest.raises(ValueError, match="version"):
        kwm.load_gguf(path)
    # Each byte of the header, as any other.
    rng = np.random.default_rng(0)
    for _ in range(60):
        bad = bytearray(whole)
        bad[rng.integers(4, 1500)] = rng.integers(256)
        path.write_bytes(bad)
        with contextlib.suppress(ValueError), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* says more of the model")
            kwm.load_gguf(path)
    with pytest.raises(FileNotFoundError):
        kwm.load_gguf(tmp_path / "none.gguf")


SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
BYTES = [*"abcdef12", "Ġ", "Ċ", "ab", "ĊĊ", "fĠ", *SPECIAL, "cd"]


def byte_pairs(**fields):
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": BYTES,
        "tokenizer.ggml.token_type": [1] * 13 + [3] * 3 + [1],
        "tokenizer.ggml.merges": ["a b", "Ċ Ċ", "f Ġ"],
        "tokenizer.ggml.eos_token_id": 15,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ messages }}",
        **fields,
    }


@one_backend
def test_byte_pairs(tmp_path):
    _, path = exported(tmp_path, "qwen", vocabulary_size=17)
    model = kwm.load_gguf(rewritten(path, byte_pairs()))
    tokenizer = model.preprocessor.tokenizer
    assert tokenizer.chat_template == "{{ messages }}"
    assert tokenizer.end_token == "<|im_end|>"
    ids = tokenizer("<|im_start|>ab12\n\nc<|im_end|>").tolist()
    assert ids == [14, 10, 6, 7, 11, 2, 15]
    # No merges make it.
    assert tokenizer("cd").tolist() == [2, 3]
    # No token crosses the end of a word.
    assert tokenizer("f a").tolist() == [5, 8, 0]
    kwm.save_model(model, tmp_path / "model.safetensors")
    saved = kwm.load_model(tmp_path / "model.safetensors")
    assert saved.preprocessor.tokenizer("f a").tolist() == [5, 8, 0]
    assert tokenizer.detokenize([10, 8, 2]) == "ab c"
    assert isinstance(model.generate("ab", max_length=6), str)
    split = {"tokenizer.ggml.pre": "smollm"}
    smollm = kwm.load_gguf(rewritten(path, split)).preprocessor.tokenizer
    # Two line ends before a word are two tokens, at the end of a text one.
    assert smollm("a\n\nb").tolist() == [0, 9, 9, 1]
    assert smollm("a\n\n").tolist() == [0, 11]
    base = {"tokenizer.ggml.eos_token_id": 13}
    base = kwm.load_gguf(rewritten(path, base)).preprocessor.tokenizer
    assert base.end_token == "<|endoftext|>"
    # A word that is a token is not merged, as by Llama 3.
    words = {"tokenizer.ggml.pre": "llama-bpe"}
    model = kwm.load_gguf(rewritten(path, words))
    kwm.save_model(model, tmp_path / "model.safetensors")
    saved = kwm.load_model(tmp_path / "model.safetensors")
    for each in (model, saved):
        assert each.preprocessor.tokenizer("cd cda").tolist() == [
            *(16, 8, 2, 3, 0)
        ]
    with pytest.warns(UserWarning, match="splits text as 'other'") as told:
        kwm.load_gguf(rewritten(path, {"tokenizer.ggml.pre": "other"}))
    assert __file__ in {w.filename for w in told if "'other'" in str(w.message)}
    whole, table = path.read_bytes(), np.ones((16, 64), "float32")
    with pytest.raises(ValueError, match="17 tokens, and token_embd"):
        kwm.load_gguf(rewritten(path, **{"token_embd.weight": (table, "F32")}))
    path.write_bytes(whole)
    for fields, match in (
        ({"tokenizer.ggml.eos_token_id": 0}, "ends texts by 'a'"),
        (
            {
                "tokenizer.ggml.eos_token_id": 15,
                "tokenizer.ggml.pre": "qwen2",
                "tokenizer.ggml.bos_token_id": 13,
                "tokenizer.ggml.add_bos_token": True,
            },
            "begins texts by '<|endoftext|>'".replace("|", r"\|"),
        ),
        ({"tokenizer.ggml.eos_token_id": 99}, "special token is too large"),
        ({"tokenizer.ggml.token_type": [1]}, "1 token_type for 17 tokens"),
        (
            {
                "tokenizer.ggml.token_type": [3] * 17,
                "tokenizer.ggml.eos_token_id": 15,
                "tokenizer.ggml.merges": None,
            },
            "lacks 'tokenizer.ggml.merges'",
        ),
        ({"tokenizer.ggml.model": "bert"}, "is of the kind 'bert'"),
    ):
        with pytest.warns(UserWarning, match=match) as told:
            model = kwm.load_gguf(rewritten(path, fields))
        texts = {str(w.message): w.filename for w in told}
        assert [f for t, f in texts.items() if re.search(match, t)] == [
            __file__
        ]
        assert model.preprocessor is None


@one_backend
def test_sentence_piece(tmp_path):
    pytest.importorskip("sentencepiece")
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>"]
    tokens += ["<end_of_turn>", *(f"<0x{i:02X}>" for i in range(256))]
    tokens += ["▁", "a", "b", "ab", "▁ab", "   "]
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 265 + [-2.0, -1.0, 0.0],
        "tokenizer.ggml.token_type": [3] * 6 + [6] * 256 + [1] * 5 + [4],
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.add_bos_token": True,
    }
    for place, name in enumerate(("padding", "eos", "bos", "unknown")):
        fields[f"tokenizer.ggml.{name}_token_id"] = place
    _, path = exported(tmp_path, "gemma3", vocabulary_size=len(tokens))
    model = kwm.load_gguf(rewritten(path, fields))
    tokenizer = model.preprocessor.tokenizer
    ids = tokenizer("<start_of_turn>ab ab   c<end_of_turn>").tolist()
    space = tokens.index("▁")
    byte = tokens.index("<0x63>")
    assert ids == [4, space + 3, space + 4, space + 5, byte, 5]
    assert tokenizer.chat_template is None
    x = model.preprocessor.generate_preprocess(["ab"], sequence_length=3)
    assert np.asarray(x["token_ids"]).tolist() == [[2, space + 3, 0]]
    assert isinstance(model.generate("ab", max_length=6), str)
    other = kwm.load_gguf(rewritten(path, {"tokenizer.ggml.eos_token_id": 5}))
    tokenizer = other.preprocessor.tokenizer
    assert (tokenizer.end_token_id, tokenizer.end_token2_id) == (1, 5)
    tokens[1] = "<end>"
    for fields, match in (
        ({"tokenizer.ggml.bos_token_id": 4}, "begins texts by '<start_of"),
        ({"tokenizer.ggml.tokens": tokens}, "Cannot find special token `'<eos"),
    ):
        with pytest.warns(UserWarning, match=match):
            assert kwm.load_gguf(rewritten(path, fields)).preprocessor is None


@one_backend
def test_tokenizers_of_smollm3_and_phi3(tmp_path):
    pytest.importorskip("sentencepiece")
    tokens = [*BYTES, "<|end_of_text|>", "<|begin_of_text|>"]
    tokens += ["<think>", "</think>"]
    fields = byte_pairs(
        **{
            "tokenizer.ggml.pre": "smaug-bpe",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [1] * 13 + [3] * 3 + [1] + [3] * 4,
        }
    )
    _, path = exported(tmp_path, "smollm3", vocabulary_size=len(tokens))
    model = kwm.load_gguf(rewritten(path, fields))
    tokenizer = model.preprocessor.tokenizer
    assert (tokenizer.end_token_id, tokenizer.end_token2_id) == (17, 15)
    assert tokenizer("<think>ab<|im_end|>").tolist() == [19, 10, 15]
    assert isinstance(model.generate("ab", max_length=6), str)
    tokens = ["<unk>", "<s>", "</s>", "<|endoftext|>", "<|end|>"]
    tokens += [*(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "▁a"]
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 263 + [-1.0],
        "tokenizer.ggml.token_type": [2] + [3] * 4 + [6] * 256 + [1] * 3,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 4,
        "tokenizer.ggml.add_bos_token": True,
    }
    _, path = exported(tmp_path, "phi3", vocabulary_size=len(tokens))
    model = kwm.load_gguf(rewritten(path, fields))
    tokenizer = model.preprocessor.tokenizer
    assert (tokenizer.end_token_id, tokenizer.end_token2_id) == (3, 4)
    x = model.preprocessor.generate_preprocess(["a<|end|>"], sequence_length=4)
    assert np.asarray(x["token_ids"]).tolist() == [[1, 263, 4, 0]]
    assert isinstance(model.generate("a", max_length=6), str)


@one_backend
def test_a_tokenizer_goes_both_ways(tmp_path):
    special = "begin_of_text end_of_text eot_id start_header_id end_header_id"
    special = [f"<|{each}|>" for each in f"{special} python_tag".split()]
    fields = byte_pairs(
        **{
            "tokenizer.ggml.pre": "llama-bpe",
            "tokenizer.ggml.tokens": [*BYTES[:11], *special],
            "tokenizer.ggml.token_type": [1] * 11 + [3] * 6,
            "tokenizer.ggml.merges": ["a b"],
            "tokenizer.ggml.bos_token_id": 11,
            "tokenizer.ggml.eos_token_id": 12,
        }
    )
    _, path = exported(tmp_path, "llama3", vocabulary_size=17)
    model = kwm.load_gguf(rewritten(path, dict(fields)))
    kwm.export(model, path)
    reader = gguf.GGUFReader(path)
    assert fields == {k: reader.fields[k].contents() for k in fields}


@one_backend
def test_gemma_3_27b_scales_its_queries_by_others(tmp_path, monkeypatch):
    own = gguf_families.FAMILIES["gemma3"].fixed
    scale = {"query_head_dim_normalize": False}
    assert own["query_head_dim_normalize"](62) is False
    # A model of 62 blocks takes ten seconds.
    monkeypatch.setitem(own, *scale, lambda blocks: blocks != 2)
    _, path = exported(tmp_path, "gemma3", **scale)
    assert not kwm.load_gguf(path).backbone.query_head_dim_normalize
    with pytest.raises(ValueError, match="query_head_dim_normalize=False"):
        kwm.export(made("gemma3"), path)


@one_backend
@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_the_same(case, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp_py_sync")
    model, path = made(case), tmp_path / "model.gguf"
    # So small that places of tokens matter, and nothing saturates.
    for variable in model.weights:
        if variable.name == "scale":
            offset = 0 if "gemma" in case else 1
            variable.assign(models.numpy(variable) / 4 + offset)
    kwm.export(model, path, dtype="f32")
    model = kwm.load_gguf(path)
    tokens = [1, 7, 20, 33, 5, 64, 12, 90, 3, 8] * 3
    x = {"token_ids": np.array([tokens])}
    x["padding_mask"] = np.ones((1, len(tokens)), "int32")
    logits = models.numpy(model(x))[0, -1]
    options = {"type_k": "f32", "type_v": "f32", "flash_attn_type": 0}
    llama = llama_cpp.Llama(str(path), n_ctx=64, n_threads=1, **options)
    llama._eval_tokens(tokens, 0)
    scores = llama._lib.llama_get_logits_ith(llama._ctx, -1)
    scores = np.array([scores[i] for i in range(96)])
    llama.close()
    # Its gelu is a table in fp16.
    error = np.abs(scores - logits).max() / np.abs(logits).max()
    assert error < (1e-3 if "gemma" in case else 1e-5), error


# Files of models that people use, in a folder.
FILES = pathlib.Path(os.environ.get("KWM_GGUF_FILES", "none"))


@one_backend
@pytest.mark.llm
@pytest.mark.heavy
@pytest.mark.parametrize(
    ("name", "prompt", "expected"),
    [
        ("qwen.gguf", "def fibonacci(n):\n", "    if n"),
        ("gemma.gguf", "The capital of France is", " the"),
    ],
)
def test_models_that_people_use(name, prompt, expected):
    if not (FILES / name).is_file():
        pytest.skip(f"KWM_GGUF_FILES names no folder with {name}")
    model = kwm.load_gguf(FILES / name, dtype="bfloat16")
    model.compile(sampler="greedy")
    size = len(model.preprocessor.tokenizer(prompt)) + 6
    text = model.generate(prompt, max_length=size, strip_prompt=True)
    assert text.startswith(expected)
