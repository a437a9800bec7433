import keras
import numpy as np
import pytest
from keras import ops

from benchmarks import gguf_file, harness
from examples.data import smollm2

pytestmark = pytest.mark.one_backend

pytest.importorskip("keras_hub")
gguf = pytest.importorskip("gguf")

SIZES = {
    "vocabulary_size": 96,
    "num_layers": 2,
    "hidden_dim": 64,
    "intermediate_dim": 96,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def backbone():
    keras.utils.set_random_seed(0)
    return harness.make_llama(**SIZES).backbone


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tokenizer.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{index}" for index in range(96)])
    writer.add_token_types([1] * 96)
    writer.add_token_merges(["t 1", "t 2"])
    writer.add_eos_token_id(3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def written(path, backbone, quantization, tokenizer):
    gguf_file.write_gguf(path, backbone, quantization, tokenizer)
    return gguf.GGUFReader(path)


def weights(backbone):
    return [ops.convert_to_numpy(v) for v in backbone.weights]


def test_what_is_written_is_read_back(backbone, tokenizer, tmp_path):
    reader = written(tmp_path / "model.gguf", backbone, "F32", tokenizer)
    config = smollm2._backbone_config(reader)
    assert config == {
        **SIZES,
        "rope_max_wavelength": 10000,
        "layer_norm_epsilon": pytest.approx(1e-6),
        "tie_word_embeddings": True,
    }
    other = harness.make_llama(**SIZES).backbone
    smollm2._assign_weights(other, reader)
    for expected, found in zip(weights(backbone), weights(other)):
        np.testing.assert_array_equal(found, expected)
    assert reader.fields["tokenizer.ggml.tokens"].contents()[7] == "t7"
    assert reader.fields["tokenizer.ggml.eos_token_id"].contents() == 3


def dequantized(tensor):
    """By the formats' definition: 32 values share a float16 scale."""
    blocks = np.asarray(tensor.data).reshape(-1, tensor.data.shape[-1])
    rows = []
    for data in blocks:
        row = []
        size = {"Q8_0": 34, "Q4_0": 18}[tensor.tensor_type.name]
        for start in range(0, len(data), size):
            block = data[start : start + size]
            scale = float(block[:2].copy().view("float16")[0])
            if size == 34:
                whole = block[2:].copy().view("int8")
            else:
                whole = np.concatenate([block[2:] & 15, block[2:] >> 4]) - 8.0
            row.extend(scale * float(each) for each in whole)
        rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize("quantization", ["Q8_0", "Q4_0"])
def test_rounding_is_within_the_format(
    backbone, tokenizer, tmp_path, quantization
):
    path = tmp_path / "model.gguf"
    reader = written(path, backbone, quantization, tokenizer)
    variables = gguf_file.gguf_names(backbone)
    assert {t.name for t in reader.tensors} == set(variables)
    for tensor in reader.tensors:
        exact = gguf_file.gguf_value(tensor.name, variables[tensor.name])
        if exact.ndim == 1:
            assert tensor.tensor_type.name == "F32"
            continue
        head = tensor.name == "token_embd.weight"
        assert tensor.tensor_type.name == ("Q8_0" if head else quantization)
        groups = exact.reshape(-1, 32)
        largest = np.abs(groups).max(1, keepdims=True)
        error = np.abs(dequantized(tensor).reshape(-1, 32) - groups)
        # Half a step, of a scale that is rounded to 11 bits. Q4_0 has no +8,
        # so the largest value of the other sign loses half a step more.
        levels = {"Q8_0": 127, "Q4_0": 8}[tensor.tensor_type.name]
        steps = (1 if levels == 8 else 0.5) + levels / 2**11
        assert (error <= 1.001 * steps * largest / levels).all()


def test_rows_are_permuted_so_that_pairs_rotate():
    # Row 2 i + j of a head of llama.cpp is row i + j size / 2 of KerasHub.
    rows = np.arange(2 * 6)[:, None]
    found = gguf_file.permute(rows, heads=2)[:, 0]
    assert found.tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    np.testing.assert_array_equal(smollm2._unpermute(found[:, None], 2), rows)


def test_a_head_of_its_own_is_refused(backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(backbone.token_embedding, "tie_weights", False)
    with pytest.raises(ValueError, match="tied embeddings"):
        gguf_file.write_gguf(tmp_path / "model.gguf", backbone)
