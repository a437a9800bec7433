import functools
import warnings

import keras
import numpy as np
import pytest

import keras_weightmods as kwm
from benchmarks import harness
from keras_weightmods import native
from keras_weightmods.core.reparameterization import reparameterizations
from keras_weightmods.exporting import gguf_families, gguf_file
from tests import models
from tests.native.test_packed import dense_step
from tests.packing.test_pack import leave_out_native

pytestmark = pytest.mark.one_backend

pytest.importorskip("keras_hub")
gguf = pytest.importorskip("gguf")

SIZES = {"vocabulary_size": 96, "num_layers": 2, "hidden_dim": 64}
SIZES |= {"intermediate_dim": 96, "num_query_heads": 4}
SIZES |= {"num_key_value_heads": 2}
TIED = {"tie_word_embeddings": True}
LLAMA = gguf_families.FAMILIES["llama"]
# The size of a head.
SIZE = 16


@pytest.fixture(scope="module")
def backbone():
    keras.utils.set_random_seed(0)
    return harness.make_llm(**SIZES).backbone


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


def written(path, model, dtype, **kwargs):
    kwm.export(model, path, format="gguf", dtype=dtype, **kwargs)
    return gguf.GGUFReader(path)


def test_what_is_written_is_read_back(backbone, tokenizer, tmp_path):
    path = tmp_path / "model.gguf"
    card = kwm.ModelCard("org/base", "mit", steps=["Trained.", "Rounded."])
    options = {"tokenizer_from": tokenizer, "card": card}
    reader = written(path, backbone, "f32", **options)
    for key, value in {
        "general.license": "mit",
        "general.base_model.0.name": "org/base",
        "general.description": "Trained.\nRounded.",
    }.items():
        assert reader.fields[key].contents() == value
    assert (tmp_path / "model.gguf.md").is_file()
    assert reader.fields["llama.vocab_size"].contents() == 96
    assert reader.fields["tokenizer.ggml.tokens"].contents()[7] == "t7"
    assert reader.fields["tokenizer.ggml.eos_token_id"].contents() == 3


@pytest.mark.parametrize("quantization", ["Q8_0", "Q4_0"])
def test_matrices_are_rounded_and_vectors_are_not(
    backbone, tmp_path, quantization
):
    path = tmp_path / "model.gguf"
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        reader = written(path, backbone, quantization.lower())
    told = [str(w.message) for w in told if w.filename == __file__]
    if quantization == "Q4_0":
        (text,) = told
        assert text.startswith("14 matrices were rounded to nearest")
        assert "kwm.quantize" in text
    else:
        assert told == []
    variables = gguf_file.tensors(LLAMA, backbone)
    assert {t.name for t in reader.tensors} == set(variables)
    for tensor in reader.tensors:
        exact = gguf_file.tensor_value(
            LLAMA, tensor.name, variables[tensor.name], SIZE
        )
        kind = "Q8_0" if tensor.name == "token_embd.weight" else quantization
        kind = "F32" if exact.ndim == 1 else kind
        assert tensor.tensor_type.name == kind
        found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        # Q4_0 has no +8, so the largest value of a sign loses a step.
        step = {"F32": 0.0, "Q8_0": 0.6 / 127, "Q4_0": 1.01 / 8}[kind]
        np.testing.assert_allclose(found, exact, atol=step * abs(exact).max())


def decoded(tensor):
    """Integers of a tensor of GGUF and their scales, by its definition."""
    size = {"Q4_0": 18, "Q8_0": 34}[tensor.tensor_type.name]
    blocks = tensor.data.reshape(len(tensor.data), -1, size)
    scales = np.frombuffer(blocks[..., :2].tobytes(), "<f2")
    integers = blocks[..., 2:].view("int8")
    if size == 18:
        codes = blocks[..., 2:].astype("int8")
        integers = np.concatenate([codes & 15, (codes >> 4) & 15], -1) - 8
    integers = integers.reshape(len(blocks), -1)
    return integers, scales.repeat(32).reshape(integers.shape)


def packed_integers(item):
    """The same of a packed weight, (N, K) each, by `native/layout.py`."""
    arrays = {k: models.numpy(v) for k, v in item.named.items()}
    values, scales, meta = map(arrays.get, ("values", "scale", "meta"))
    columns, rows, words = values.shape[:3]
    made = np.zeros((columns, rows, 32, 16), "int32")
    bits = int(item.form.dtype[3:])
    for slot in range(32 if meta is None else 16):
        word, place = divmod(slot, 4) if meta is None else (slot % 4, slot // 4)
        integers = values[:, :, word % words, :, place].astype("int32")
        if meta is None:
            lines = np.moveaxis(values[..., place], 2, 0)
            integers = np.apply_along_axis(dense_step, 0, lines, word)
        elif bits == 4:
            integers = integers >> 4 * (word // words) & 15
            integers -= 16 * (integers > 7)
        row = np.full(integers.shape, slot)
        if meta is not None:
            row = 4 * (slot // 2) + (meta >> 2 * slot & 3)
        np.put_along_axis(made, row[:, :, None], integers[:, :, None], 2)
    made = made.transpose(1, 2, 0, 3).reshape(rows * 32, columns * 16)
    scales = scales.reshape(columns, -1, 16).swapaxes(0, 1)
    scales = scales.reshape(-1, columns * 16)
    scales = scales.repeat(64 if bits < 8 else rows * 32, axis=0)
    inputs, units = item.shape
    return made.T[:units, :inputs], scales.T[:units, :inputs]


@pytest.mark.parametrize(
    ("kind", "dtype", "sizes"),
    [
        ("quantized", "q4_0", {"num_layers": 1, "intermediate_dim": 64}),
        ("held", "q4_0", {"dtype": "bfloat16"}),
        # Rows of a group and a half.
        ("int4", "q8_0", {"hidden_dim": 96, "tie_word_embeddings": False}),
        ("2:4", "q4_0", {"hidden_dim": 96, "tie_word_embeddings": False}),
        ("int8", "q8_0", {"dtype": "bfloat16"}),
        ("int3", "q4_0", {"num_layers": 1}),
        ("int5", "q8_0", {"num_layers": 1}),
        ("int6", "q8_0", {"num_layers": 1}),
    ],
)
def test_integers_leave_as_they_are(kind, dtype, sizes, tmp_path, monkeypatch):
    if kind == "held":
        # Its layers have dense weights, in their own type.
        leave_out_native(monkeypatch)
        monkeypatch.setattr(native, "warn_dense", lambda reason: None)
    model = models.causal_lm("llama3", **{**SIZES, **TIED, **sizes})
    models.randomize(model)
    path = tmp_path / "model.gguf"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`pack` rounded|All was rounded")
        if kind == "quantized":
            tokens = np.random.default_rng(0).integers(96, size=(16, 8))
            x = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}
            kwm.quantize(model, x, refine=None)
            plain = written(tmp_path / "plain.gguf", model, dtype).tensors
        if kind == "2:4":
            models.make_sparse(model)
        others = {"quantized": None, "2:4": "int4", "held": "int4"}
        kwm.pack(model, others.get(kind, kind))
        warnings.filterwarnings("ignore", "14 packed weights .* in dense form")
        tensors = written(path, model, dtype).tensors
    if kind == "quantized":
        for one, other in zip(plain, tensors, strict=True):
            assert one.data.tobytes() == other.data.tobytes()
    items = {i.target.path: i for i in reparameterizations(model)}
    assert (kind == "2:4") is any(i.pattern for i in items.values())
    assert (kind == "held") is any(i.is_held for i in items.values())
    for tensor in tensors:
        item = items.pop(LLAMA.variable_paths(tensor.name)[0], None)
        if item is None:
            # An untied look-up is not packed.
            is_table = tensor.name == "token_embd.weight"
            assert tensor.tensor_type.name == ("Q8_0" if is_table else "F32")
            continue
        assert tensor.tensor_type.name == dtype.upper()
        integers, scales = packed_integers(item)
        if tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
            heads = item.target.shape[1]
            integers = gguf_families.permute(integers, heads)
            scales = gguf_families.permute(scales, heads)
        found = decoded(tensor)
        # A scale of int3 and its integers may change their signs.
        signs = np.sign(found[1]) * np.sign(scales) if kind == "int3" else 1
        found = found[0] * signs, found[1] * signs
        np.testing.assert_array_equal(found[0], integers)
        # fp16 has all bits of the scales of int4, and 11 of those of int8.
        tolerance = 2**-11 if kind == "int8" else 0
        np.testing.assert_allclose(found[1], scales, rtol=tolerance)
    assert not items


def test_groups_of_32_and_scales_that_fp16_has_not(tmp_path):
    path, rng = tmp_path / "model.gguf", np.random.default_rng(0)
    backbone = harness.make_llm(**SIZES).backbone
    for name, (variable,) in gguf_file.tensors(LLAMA, backbone).items():
        value = gguf_file.tensor_value(LLAMA, name, [variable], SIZE)
        if value.ndim == 2:
            # (inputs, units) of all kernels but the embeddings.
            integers = rng.integers(-8, 8, size=value.T.shape)
            scales = rng.integers(128, 256, size=value.T.shape) / 2**14
            scales = scales[::32].repeat(32, axis=0)
            kernel = (integers * scales).astype("float32")
            kernel = kernel.T if "embd" in name else kernel
            variable.assign(kernel.reshape(variable.shape))
    (gate,) = gguf_file.tensors(LLAMA, backbone)["blk.1.ffn_gate.weight"]

    def check(atol):
        reader = written(path, backbone, "q4_0")
        weights = gguf_file.tensors(LLAMA, backbone)
        for tensor in reader.tensors:
            exact = gguf_file.tensor_value(
                LLAMA, tensor.name, weights[tensor.name], SIZE
            )
            if exact.ndim == 2:
                assert tensor.tensor_type.name == "Q4_0"
                found = np.multiply(*decoded(tensor))
                np.testing.assert_allclose(found, exact, rtol=0, atol=atol)

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        check(0)
    kernel = models.numpy(gate)
    kernel[:32] *= 2.0**-20
    gate.assign(kernel)
    text = "1 matrices, 'transformer_layer_1/feedforward_gate_dense/kernel'"
    with pytest.warns(UserWarning, match=text):
        check(8 / 2**25)
    path.unlink()
    for value in (1e5, np.nan):
        kernel[0, 0] = value
        gate.assign(kernel)
        for dtype in ("f16", "q8_0"):
            with pytest.raises(ValueError, match="Use dtype='f32'"):
                written(path, backbone, dtype)
    assert not path.exists()


def test_rows_are_permuted_so_that_pairs_rotate():
    # Row 2 i + j of a head of llama.cpp is row i + j size / 2 of KerasHub.
    rows = np.arange(2 * 6)[:, None]
    found = gguf_families.permute(rows, heads=2)[:, 0]
    assert found.tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    found = gguf_families.permute(found[:, None], heads=2, back=True)
    np.testing.assert_array_equal(found, rows)


LONG = {
    "rope_frequency_adjustment_factor": 8.0,
    "rope_low_freq_factor": 1.0,
    "rope_high_freq_factor": 4.0,
    "rope_pretraining_sequence_length": 32,
}


@pytest.mark.parametrize("kind", ["packed", "untied", "long", "f16", "q8_0"])
def test_llama_cpp_writes_the_same_tokens(kind, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    sizes = {"tie_word_embeddings": kind != "untied", **SIZES}
    sizes |= LONG if kind == "long" else {}
    model = models.causal_lm("llama3", **sizes)
    # So large that places of tokens matter.
    models.randomize(model, scale=0.2)
    for variable in model.weights:
        if variable.name == "scale":
            variable.assign(np.ones(64))
    if kind == "packed":
        models.make_sparse(model)
        # The dense form has inputs in floats.
        kwm.pack(model, dtype="int8", head=None, activations="float32")
    dtype = kind if kind in gguf_file.DTYPES else "f32"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*exported in dense form")
        path = tmp_path / "model.gguf"
        kwm.export(model, path, format="gguf", dtype=dtype)
    # Else its cache is in float16.
    cache = dict.fromkeys(("type_k", "type_v"), llama_cpp.GGML_TYPE_F32)
    options = {"n_ctx": 64, "logits_all": True, "n_threads": 1}
    llama = llama_cpp.Llama(str(path), verbose=False, **options, **cache)
    tokens = [1, 7, 20, 33, 5, 64, 12, 90, 3, 8]
    for _ in range(6):
        x = {"token_ids": np.array([tokens])}
        x["padding_mask"] = np.ones((1, len(tokens)), "int32")
        logits = models.numpy(model(x))[0, -1]
        llama.reset()
        llama.eval(tokens)
        scores = np.array(llama.scores[len(tokens) - 1])
        assert scores.argmax() == logits.argmax()
        error = np.abs(scores - logits).max() / np.abs(logits).max()
        assert error < {"q8_0": 0.05, "f16": 0.005}.get(dtype, 1e-4), error
        tokens.append(int(logits.argmax()))


def test_the_tokenizer_of_a_llama3_model(tmp_path):
    from keras_hub import models as hub

    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    special += ["<|start_header_id|>", "<|end_header_id|>"]
    tokens = [*"abcdefgh", "Ġ", "ab", "Ġab", *special]
    tokens += [f"unused{i}" for i in range(96 - len(tokens))]
    tokenizer = hub.Llama3Tokenizer(
        {token: i for i, token in enumerate(tokens)}, ["a b", "Ġ ab"]
    )
    preprocessor = hub.Llama3CausalLMPreprocessor(tokenizer, sequence_length=8)
    model = models.causal_lm("llama3", preprocessor, **SIZES)
    reader = written(tmp_path / "model.gguf", model, "f32")
    fields = {name: f.contents() for name, f in reader.fields.items()}
    assert fields["tokenizer.ggml.tokens"] == tokens
    assert fields["tokenizer.ggml.merges"] == ["a b", "Ġ ab"]
    assert fields["tokenizer.ggml.token_type"][8:13] == [1, 1, 1, 3, 3]
    llama_cpp = pytest.importorskip("llama_cpp")
    llama = llama_cpp.Llama(str(tmp_path / "model.gguf"), verbose=False)
    text = "ab abcd ab"
    expected = [tokenizer.start_token_id, *map(int, tokenizer(text))]
    assert llama.tokenize(text.encode()) == expected


def test_what_the_file_cannot_hold_is_refused(backbone, tokenizer, tmp_path):
    path = tmp_path / "model.gguf"
    make = functools.partial(models.backbone, "llama3")
    scaled, lora, quantized = make(), make(), make()
    kwm.attach_scaling(scaled)
    lora.enable_lora(2)
    quantized.quantize("int8")
    odd = make(hidden_dim=48, num_query_heads=2)
    far = make(rope_position_scaling_factor=2.0)
    missing = tmp_path / "none.gguf"
    for model, match, options in (
        (make(), "of 96 tokens, and .*=20", {"tokenizer_from": tokenizer}),
        (models.mlp(), "of the kinds Llama3, Qwen, Qwen3, Gemma3", {}),
        (odd, "hidden_dim=48. Use dtype='f16'", {"dtype": "q8_0"}),
        (backbone, "one of", {"dtype": "int3"}),
        (backbone, "a GGUF file", {"tokenizer_from": missing}),
        (far, "rope_position_scaling_factor=2.0", {}),
        (scaled, r"kwm.fold\(model\)", {}),
        (lora, "kwm.merge_lora", {}),
        (quantized, "quantized by Keras", {}),
    ):
        with pytest.raises(ValueError, match=match):
            kwm.export(model, path, format="gguf", **options)
        assert not path.exists()
