import keras
import numpy as np
import pytest

from examples.data import smollm2
from tests.models import assert_same, outputs

keras_hub = pytest.importorskip("keras_hub")
gguf = pytest.importorskip("gguf")

pytestmark = pytest.mark.one_backend

TOKENS = ["<|endoftext|>", "<|im_end|>", "a", "b", "1", "Ġ", "Ċ", "ab", "ĊĊ"]


def write_gguf(path, architecture="llama", drop=None):
    """A GGUF of two blocks; returns its weights as a Hugging Face file has."""
    random = np.random.default_rng(0)
    heads, kv_heads, hidden, inner, vocabulary = 4, 2, 32, 64, len(TOKENS)
    head = hidden // heads
    shapes = {"token_embd": (vocabulary, hidden), "output_norm": (hidden,)}
    for i in range(2):
        for names, *shape in (
            ("attn_norm ffn_norm", hidden),
            ("attn_q attn_output", hidden, hidden),
            ("attn_k attn_v", kv_heads * head, hidden),
            ("ffn_gate ffn_up", inner, hidden),
            ("ffn_down", hidden, inner),
        ):
            for name in names.split():
                shapes[f"blk.{i}.{name}"] = shape
    weights = {
        f"{name}.weight": random.normal(size=shape).astype("float32")
        for name, shape in shapes.items()
    }
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in (
        *(("vocab_size", vocabulary), ("block_count", 2)),
        *(("embedding_length", hidden), ("feed_forward_length", inner)),
        *(("head_count", heads), ("head_count_kv", kv_heads)),
        *(("rope_freq_base", 1000.0), ("layer_norm_rms_eps", 1e-5)),
        *(("token_list", TOKENS), ("token_merges", ["a b", "Ċ Ċ"])),
        *(("token_types", [3, 3] + [1] * 7), ("eos_token_id", 1)),
        *(("tokenizer_model", "gpt2"), ("tokenizer_pre", "smollm")),
    ):
        getattr(writer, f"add_{key}")(value)
    for name, value in weights.items():
        for kind, count in (("attn_q", heads), ("attn_k", kv_heads)):
            if kind in name:  # as llama.cpp's converter does
                halves = value.reshape(count, 2, head // 2, hidden)
                value = halves.swapaxes(1, 2).reshape(value.shape)
        if name != drop:
            writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A file, and its weights."""
    path = str(tmp_path_factory.mktemp("gguf") / "small.gguf")
    return path, write_gguf(path)


def test_weights_land_where_they_belong(small):
    path, weights = small
    model = smollm2.load_smollm2(path=path)
    backbone = model.backbone
    assert len(backbone.weights) == len(weights)
    assert backbone.tie_word_embeddings
    assert backbone.rope_max_wavelength == 1000.0

    by_path = {v.path: keras.ops.convert_to_numpy(v) for v in backbone.weights}
    for i in range(2):
        block = f"transformer_layer_{i}"
        for path, name, shape in (
            ("self_attention/query", "attn_q", (32, 4, 8)),
            ("self_attention/key", "attn_k", (32, 2, 8)),
            ("self_attention/value", "attn_v", (32, 2, 8)),
            ("self_attention/attention_output", "attn_output", (4, 8, 32)),
            ("feedforward_gate_dense", "ffn_gate", (32, 64)),
            ("feedforward_intermediate_dense", "ffn_up", (32, 64)),
            ("feedforward_output_dense", "ffn_down", (64, 32)),
        ):
            expected = weights[f"blk.{i}.{name}.weight"].T.reshape(shape)
            assert_same(by_path[f"{block}/{path}/kernel"], expected)
    table = by_path["token_embedding/embeddings"]
    assert_same(table, weights["token_embd.weight"])


def test_reloaded_model_is_still_tied(small, tmp_path):
    model = smollm2.load_smollm2(path=small[0], dtype="float32")
    model.save(tmp_path / "model.keras")
    model.save_to_preset(tmp_path / "preset")
    tokens = np.array([[2, 3, 7, 4]], "int32")
    inputs = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}
    expected = outputs(model, inputs)
    for copy in (
        keras.models.load_model(tmp_path / "model.keras"),
        keras_hub.models.CausalLM.from_preset(str(tmp_path / "preset")),
    ):
        assert_same(outputs(copy, inputs), expected)
        assert copy.backbone.count_params() == model.backbone.count_params()
        assert copy.preprocessor.tokenizer("ab a").tolist() == [7, 5, 2]


def test_tokenizer_splits_as_smollm2(small):
    tokenizer = smollm2.load_tokenizer(small[0])
    assert tokenizer("ab11").tolist() == [7, 4, 4]
    # Two line ends before a word are two tokens, at the end of a text one.
    assert tokenizer("a\n\nb").tolist() == [2, 6, 6, 3]
    assert tokenizer("a\n\n").tolist() == [2, 8]
    assert tokenizer("a<|im_end|>").tolist() == [2, 1]
    assert tokenizer.detokenize([2, 6, 3]) == "a\nb"
    assert tokenizer.start_token_id is None
    # Were they the same, generate() would end at the first place to fill.
    assert tokenizer.end_token_id == 1
    assert tokenizer.pad_token_id == 0
    # Raw strings are packed without an end.
    model = smollm2.load_smollm2(path=small[0], sequence_length=4)
    x, y, weight = model.preprocessor(["ab1"])
    assert np.asarray(x["token_ids"]).tolist() == [[7, 4, 0, 0]]
    assert np.asarray(y).tolist() == [[4, 0, 0, 0]]
    assert np.asarray(weight).tolist() == [[1, 0, 0, 0]]


def test_wrong_files(tmp_path):
    path = str(tmp_path / "other.gguf")
    write_gguf(path, architecture="gpt2")
    with pytest.raises(ValueError, match="architecture='gpt2'"):
        smollm2.load_smollm2(path=path)
    path = str(tmp_path / "part.gguf")
    write_gguf(path, drop="blk.1.ffn_up.weight")
    with pytest.raises(ValueError, match="transformer_layer_1/feedforward_int"):
        smollm2.load_smollm2(path=path)
    with pytest.raises(FileNotFoundError):
        smollm2.load_smollm2(path=tmp_path / "none.gguf")


@pytest.mark.llm
@pytest.mark.heavy
def test_the_real_tokenizer():
    tokenizer = smollm2.load_tokenizer()
    assert tokenizer.vocabulary_size() == 49152
    text = "In 1790, the President's message:\n\n  “Union”  and peace."
    ids = tokenizer(text)
    assert tokenizer.detokenize(ids) == text
    tokens = [tokenizer.id_to_token(int(i)) for i in ids]
    assert tokens[:6] == ["In", "Ġ", "1", "7", "9", "0"]
