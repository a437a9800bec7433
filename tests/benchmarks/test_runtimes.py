import json
import math
import sys
import types

import numpy as np
import pytest

import keras_weightmods as kwm
from benchmarks import peers, quality, runtimes
from benchmarks.pages import packed
from tests import models

pytestmark = pytest.mark.one_backend


def fake_report():
    def row(form, weights, speed, perplexity):
        return {
            "form": form,
            "weights": weights,
            "about": "made up",
            "resident_bytes": 900e6,
            "model_bytes": 300e6,
            "file_bytes": 100e6,
            "weight_bytes": None,
            "tokens_per_second": dict.fromkeys(runtimes.TASKS, speed),
            "ratios": dict.fromkeys(runtimes.TASKS, speed / 20),
            "perplexity": {"held_out": perplexity, "code": 2 * perplexity},
        }

    rows = [
        row("jax: dense float32", "dense", 20.0, 10.0),
        row("jax: packed int8", "2:4", 60.0, 25.0),
    ]
    rows[0]["file_bytes"] = 400e6
    rows.append(row("torch: dynamic int8", "dense", 50.0, 10.1))
    rows[-1] |= {"file_bytes": None, "weight_bytes": 150e6}
    runtimes.add_ratios(rows)
    return {
        "machine": {
            "cpu": "one",
            "cores": 2,
            "cores_used": 2,
            "threads": "2",
            "system": "Linux",
            "python": "3.11",
        },
        "model": "smollm2",
        "new_tokens": 128,
        "rounds": 5,
        "together": 8,
        "prompts": {"short": 8, "long": 512},
        "rows": rows,
        "left_out": {"OpenVINO GenAI int4": "not installed: openvino_genai"},
    }


def test_forms_begin_with_the_dense_model_of_the_first_backend():
    found = runtimes.forms(["torch", "jax"])
    assert found[0].label == "torch: dense float32"
    labels = [form.label for form in found]
    assert len(set(labels)) == len(labels)
    assert {
        "jax: packed int8, compiled",
        "llama.cpp Q4_0",
        "llama.cpp dense int4, int4 head",
        "ik_llama dense int4, int4 head",
        "ONNX Runtime GenAI int4",
        "OpenVINO GenAI int4",
        "torch: packed int8, compiled",
        "torch: torchao int4, compiled",
    } < set(labels)
    assert "torch: packed int8" not in labels
    assert "torch: dynamic int8" in labels
    assert "torch: dynamic int8, compiled" not in labels
    both = {form.label for form in runtimes.forms(["torch"], plain=True)}
    assert {"torch: packed int8", "torch: packed int8, compiled"} < both
    chosen = runtimes.forms(["jax"], rows=["packed int8", "Q8_0"])
    names = [name for name in runtimes.PACKED if "packed int8" in name]
    assert [form.label for form in chosen] == [
        "jax: dense float32",
        *(f"jax: {name}, compiled" for name in names),
        "llama.cpp Q8_0",
    ]
    chosen = runtimes.forms(["jax"], ["16:32"], files={"16:32 int4": "x"})
    assert [form.file for form in chosen[1:]] == ["16:32 int4"]
    assert set(runtimes.SOURCES) == set(quality.MODELS)
    chosen = runtimes.forms(["jax"], rows=["llama.cpp Q4", "-imatrix"])
    labels = [form.label for form in chosen[1:]]
    assert labels == [f"llama.cpp {x}" for x in ("Q4_0", "Q4_1", "Q4_K_M")]
    # A wish for llama.cpp is none for its fork.
    chosen = runtimes.forms(["jax"], rows=["llama.cpp Q4_0"])
    assert "ik_llama Q4_0" not in [form.label for form in chosen]


def test_keep_does_not_keep_another_file_than_the_one_asked_for(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(runtimes, "folder_of", lambda args: tmp_path)
    written = []
    monkeypatch.setattr(runtimes, "command", written.append)
    done = types.SimpleNamespace(returncode=0)
    monkeypatch.setattr(runtimes.subprocess, "run", lambda *_, **__: done)
    rows = ["jax: dense int4", "jax: new"]
    files = {"dense int4, int8 head": "mine", "new": "mine"}
    wanted = runtimes.forms(["jax"], rows, files=files)
    for name in ("tokens.npz", *(form.file for form in wanted)):
        (tmp_path / name).touch()
    args = ["--keep", "--backends=jax", "--rounding=0", "--files"]
    pairs = ";".join(f"{k}={v}" for k, v in files.items())
    runtimes.make_files(wanted, runtimes.parse_arguments([*args, pairs]))
    assert written == [f"--write={name}" for name in files]


def test_a_file_of_any_name_is_linked(tmp_path, monkeypatch):
    # Other files with such a name are made by SparseGPT.
    monkeypatch.setattr(runtimes, "folder_of", lambda args: tmp_path / "made")
    (tmp_path / "mine").write_text("content")
    args = runtimes.parse_arguments([f"--files=sparse x={tmp_path / 'mine'}"])
    runtimes.write_file("sparse x", args)
    assert (tmp_path / "made" / "sparse x").read_text() == "content"


def test_a_file_for_no_row_is_refused():
    args = ["--backends=jax", "--rows=jax: dense int4", "--files=new=x"]
    with pytest.raises(SystemExit, match="files for new"):
        runtimes.compare(runtimes.parse_arguments(args))


def test_perplexity_of_logits():
    logits = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    found = peers.perplexity_of(
        np.array([[0, 1, 2]]), lambda row: logits[: len(row)] + 7
    )
    assert found == pytest.approx(math.exp(-(math.log(0.25 * 0.8)) / 2))


@pytest.mark.parametrize("name", ["LlamaCpp", "IkLlamaCpp"])
def test_runtimes_of_gguf_agree_with_keras(name, tmp_path):
    module = {"LlamaCpp": "llama_cpp", "IkLlamaCpp": "ik_llama_cpp"}[name]
    pytest.importorskip(module)
    pytest.importorskip("keras_hub")
    pytest.importorskip("gguf")
    model = models.causal_lm(
        "llama3", hidden_dim=64, vocabulary_size=96, num_query_heads=2
    )
    models.randomize(model, scale=0.2)
    path = tmp_path / "model.gguf"
    kwm.export(model, path, format="gguf", dtype="f32")
    rows = np.arange(30).reshape(2, 15) * 7 % 96
    runtime = getattr(peers, name)(path, threads=1)
    found = runtime.perplexity(rows)
    expected = kwm.Perplexity(model, batch_size=2)(rows, verbose=0)
    assert found == pytest.approx(expected, rel=0.01)
    assert runtime.generate(rows, 3).shape == (2, 3)
    assert module.replace("_", "-") in runtime.about()


class FakeGenerator:
    """Next token: one more. As that of ONNX Runtime GenAI."""

    def __init__(self, model, parameters):
        self.rows = np.zeros((parameters.options["batch_size"], 0), int)
        self.length = parameters.options["max_length"]

    def append_tokens(self, tokens):
        self.rows = np.concatenate([self.rows, tokens], axis=1)
        assert self.rows.shape[1] <= self.length

    def generate_next_token(self):
        self.append_tokens(self.rows[:, -1:] + 1)

    def get_sequence(self, index):
        return self.rows[index]

    def get_logits(self):
        # The next token has a quarter of the probability.
        shares = np.full(7, 0.75 / 6)
        shares[self.rows[0, -1] + 1] = 0.25
        return np.log(shares)[None, None].astype("float32")


def test_calls_of_onnxruntime_genai(monkeypatch, tmp_path):
    seen = []
    parameters = types.SimpleNamespace(
        set_search_options=lambda **options: vars(parameters).update(
            options=options
        )
    )
    genai = types.SimpleNamespace(
        Config=lambda folder: types.SimpleNamespace(overlay=seen.append),
        Model=lambda config: "model",
        GeneratorParams=lambda model: parameters,
        Generator=FakeGenerator,
        __version__="0",
    )
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", genai)
    decoder = {"sliding_window": {"window_size": 9}}
    config = json.dumps({"model": {"decoder": decoder}})
    (tmp_path / "genai_config.json").write_text(config)
    runtime = peers.OnnxRuntimeGenAI(tmp_path, threads=3)
    assert '"intra_op_num_threads": 3' in seen[0]
    found = runtime.generate(np.array([[1, 2], [5, 6]]), 3)
    np.testing.assert_array_equal(found, [[3, 4, 5], [7, 8, 9]])
    assert runtime.perplexity(np.array([[1, 2, 3]])) == pytest.approx(4)
    # No cache is shorter than the window.
    assert parameters.options["max_length"] == 9


def test_page_and_plot(tmp_path):
    pytest.importorskip("matplotlib")
    page = packed.runtimes(fake_report())
    assert (
        "| jax: packed int8 | 2:4 | 60.0 | 60.0 | 60.0 | 900 | 300 | 100 "
        "| 2.500 |" in page
    )
    assert "| 900 | 300 |  | 1.010 |" in page
    assert "Q4_1" in page
    other = {"model": "qwen_coder", "rounding_rows": 48}
    page = packed.runtimes(fake_report() | other)
    assert page.startswith("Qwen2.5-Coder-0.5B")
    assert "Q4_K_M" in page
    assert "to nearest" not in page
    assert "not installed" in page
    for draw in (runtimes.plot, runtimes.plot_sizes):
        draw(fake_report(), tmp_path / "plot.png")
        assert (tmp_path / "plot.png").stat().st_size > 1000
        (tmp_path / "plot.png").unlink()


def test_squares_of_inputs_have_the_names_of_the_file():
    pytest.importorskip("keras_hub")
    model = models.causal_lm("llama3", tie_word_embeddings=True)
    models.randomize(model)
    backbone = model.backbone
    tokens = np.arange(24).reshape(2, 12) % backbone.vocabulary_size
    found = peers.input_squares(
        model, {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}
    )
    assert len(found) == 7 * backbone.num_layers
    layer = backbone.get_layer("transformer_layer_0")
    (scale,) = layer._self_attention_layernorm.weights
    x = models.numpy(backbone.token_embedding.embeddings)[tokens]
    norm = np.sqrt(np.mean(np.square(x), -1, keepdims=True) + 1e-6)
    expected = np.mean(np.square(x / norm * models.numpy(scale)), axis=(0, 1))
    for name in ("attn_q", "attn_k", "attn_v"):
        squares = found[f"blk.0.{name}.weight"]
        np.testing.assert_allclose(squares, expected, rtol=1e-3)


def test_dense_weights_are_rounded_as_the_quality_is_measured(
    monkeypatch, tmp_path
):
    monkeypatch.setattr(runtimes, "CACHE", tmp_path)
    args = runtimes.parse_arguments(["--rounding", "256"])
    path = runtimes.rounded_file("85 MB", args)
    seen = []
    monkeypatch.setattr(quality, "run", seen.append)
    runtimes.write_rounded(path, args)
    (options,) = seen
    assert options.save / f"{options.methods} {options.seeds}.npz" == path
    assert (options.steps, options.self_share) == (256, 0.125)
    methods = quality.make_methods(1)
    assert set(runtimes.ROUNDED.values()) < set(methods)
    # `--methods` separates names by commas.
    assert not [name for name in methods if "," in name]
