"""The commands on models, each beside the call that it stands for."""

import json
import sys
import types

import keras
import numpy as np
import pytest

import keras_weightmods as kwm
from tests import models

# What the commands call is tested on all of them.
pytestmark = pytest.mark.one_backend


def test_a_model_is_made_sparse_packed_and_unpacked(run, tmp_path):
    model = models.mlp(16, 32, 8)
    model.save("model.keras")
    np.save("x.npy", models.normal(32, 16))
    line = (
        "sparsify model.keras --criterion wanda --data x.npy --rows 24 --quiet"
    )
    printed = run(f"{line} -o sparse.keras")
    assert "2:4 by wanda" in printed
    assert "Wrote sparse.keras" in printed
    kwm.sparsify(
        model, "2:4", np.load("x.npy")[:24], criterion="wanda", verbose=0
    )
    sparse = keras.saving.load_model("sparse.keras")
    models.assert_same(models.weights_of(sparse), models.weights_of(model))

    found = json.loads(
        run("pack sparse.keras --dtype int8 -o packed.safetensors --json")
    )
    assert found["output"] == "packed.safetensors"
    assert found["totals"]["packed_share"] < 0.5
    kwm.pack(model, "int8")
    packed = kwm.load_model("packed.safetensors")
    models.assert_same(models.weights_of(packed), models.weights_of(model))

    error = run("export packed.safetensors --format gguf -o a.gguf", code=1)
    assert "a KerasHub Llama" in error
    error = run("export nothing.keras -o sparse.keras --format gguf", code=1)
    assert "sparse.keras exists; --overwrite replaces it" in error
    error = run("merge packed.safetensors -o merged.keras", code=1)
    assert "LoRA" in error

    run("unpack packed.safetensors -o dense.keras")
    kwm.unpack(model)
    dense = keras.saving.load_model("dense.keras")
    models.assert_same(models.weights_of(dense), models.weights_of(model))


def test_what_a_keras_file_cannot_hold_is_not_written(run, tmp_path):
    model = models.make_sparse(models.mlp(16, 32, 8))
    kwm.attach_scaling(model)
    kwm.save_model(model, "scaled.safetensors")
    np.save("x.npy", models.normal(4, 16))
    error = run("unpack scaled.safetensors -o out.keras", code=1)
    assert "let the output end in .safetensors" in error
    assert "must end in .safetensors" in run("pack a.keras -o b.keras", code=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "scaled.safetensors",
        "x.npy",
    ]


def test_deltas(run):
    base = models.mlp(8, 4)
    base.save("base.keras")
    before = models.weights_of(base)
    base.set_weights([w + 0.5 for w in before])
    kwm.save_model(base, "tuned.safetensors")
    printed = run("delta save tuned.safetensors base.keras -o task.safetensors")
    assert "Wrote task.safetensors" in printed
    printed = run("delta apply task.safetensors base.keras -o again.keras")
    assert "2 of 2 weights changed; wrote again.keras" in printed
    again = keras.saving.load_model("again.keras", compile=False)
    for left, right in zip(models.weights_of(again), models.weights_of(base)):
        np.testing.assert_allclose(left, right, atol=1e-2)
    error = run("delta apply task.safetensors again.keras -o b.keras", code=1)
    assert "force=True" in error
    found = json.loads(
        run("delta remove task.safetensors again.keras -o back.keras --json")
    )
    back = keras.saving.load_model("back.keras", compile=False)
    for left, right in zip(models.weights_of(back), before):
        np.testing.assert_allclose(left, right, atol=1e-6)
    equal = all(map(np.array_equal, models.weights_of(back), before))
    assert found["is_clean"] == equal
    run(
        "delta save tuned.safetensors base.keras --dtype exact --whole bias"
        " -o exact.safetensors"
    )
    run("delta apply exact.safetensors base.keras -o exact.keras")
    exact = keras.saving.load_model("exact.keras", compile=False)
    models.assert_same(models.weights_of(exact), models.weights_of(base))
    error = run("delta remove exact.safetensors exact.keras -o c.keras", code=1)
    assert "the base model's own file" in error


@pytest.fixture(scope="module")
def language_model():
    return models.causal_lm("gpt2", models.gpt2_preprocessor())


# What it calls is tested on each backend: to compile it again takes a minute.
def test_language_models(run, language_model, tmp_path):
    language_model.save_to_preset("preset")
    (tmp_path / "text.txt").write_text("abc ab cdefgh " * 40)
    printed = run("evaluate preset --data text.txt --length 16 --quiet --json")
    text = (tmp_path / "text.txt").read_text()
    expected = kwm.perplexity(language_model, [text], 16, verbose=0)
    assert json.loads(printed)["perplexity"] == pytest.approx(expected)

    kwm.save_model(language_model, "llm.safetensors")
    words = ["generate", "llm.safetensors", "ab c", "d", "--max-length", "8"]
    texts = json.loads(run([*words, "--json"]))["texts"]
    language_model.compile(sampler="greedy")
    assert texts == language_model.generate(["ab c", "d"], max_length=8)

    run(
        "sparsify llm.safetensors --criterion wanda --data text.txt --length 12"
        " --quiet -o sparse.safetensors"
    )
    kwm.assert_sparse(kwm.load_model("sparse.safetensors"), "2:4")


def test_bench(run, tmp_path):
    models.mlp(8, 4).save("model.keras")
    found = json.loads(run("bench model.keras --batch-size 3 --json"))
    assert found["weights_bytes"] == 4 * (8 * 4 + 4)
    assert found["per_second"] == pytest.approx(3 / found["seconds"])
    keras.Sequential([keras.Input((None, 8)), keras.layers.Dense(2)]).save(
        "long.keras"
    )
    assert "`data` must be given" in run("bench long.keras", code=1)
    np.save("x.npy", models.normal(2, 5, 8))
    assert "inputs/s" in run("bench long.keras --data x.npy --batch-size 2")
    error = run("bench long.keras --data x.npy --batch-size 3", code=1)
    assert "of 3 inputs at least" in error
    assert "`rounds` must be" in run("bench model.keras --rounds 0", code=1)


def test_bench_and_tasks_of_a_language_model(
    run, language_model, tmp_path, monkeypatch
):
    kwm.save_model(language_model, "llm.safetensors")
    line = "bench llm.safetensors --prompt 5 --tokens 4 --rounds 1"
    found = json.loads(run(f"{line} --batch-size 2 --as-is --json"))
    assert found["written_per_second"] > 0
    assert found["read_per_second"] > 0

    asked = {}

    def simple_evaluate(**kwargs):
        asked.update(kwargs)
        scores = {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": "a"}
        return {"results": {"a_task": scores}}

    # lm-eval itself need not be installed, and fetches data.
    module = types.SimpleNamespace(simple_evaluate=simple_evaluate)
    monkeypatch.setitem(sys.modules, "lm_eval", module)
    monkeypatch.setattr(kwm, "lm_eval_model", lambda *args: args[1:])
    line = "evaluate llm.safetensors --tasks a_task --limit 3 --length 16"
    assert run(line) == "a_task: acc 0.5000\n"
    assert asked == {"model": (16, 1), "tasks": ["a_task"], "limit": 3}
    assert json.loads(run(f"{line} --json"))["results"]["a_task"]["alias"]
    assert "--data, or --tasks" in run("evaluate llm.safetensors", code=1)

    def refuse(**kwargs):
        raise KeyError("no task b_task")

    module.simple_evaluate = refuse
    error = run("evaluate llm.safetensors --tasks b_task", code=1)
    assert "names of lm-eval's tasks" in error
    assert "no task b_task" in error


def test_tasks_by_lm_eval_itself(run, language_model, tmp_path):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    kwm.save_model(language_model, "llm.safetensors")
    data = tmp_path / "rows.jsonl"
    rows = [{"q": "ab c", "choices": ["d", "ef"], "answer": i} for i in (0, 1)]
    data.write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "letters",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(data)},
            "cache_dir": str(tmp_path / "datasets"),
        },
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "letters.yaml").write_text(json.dumps(task))
    line = "evaluate llm.safetensors --length 16 --tasks"
    # The same question, of which one answer or the other is right.
    assert run(f"{line} letters.yaml") == "letters: acc 0.5000\n"
    assert "no_such_task" in run(f"{line} no_such_task", code=1)


def test_lora_is_merged(run):
    model = models.randomize(models.backbone("gpt2"))
    kwm.save_model(model, "base.safetensors")
    model.enable_lora(2)
    for weight in model.trainable_weights:
        if "lora" in weight.path:
            weight.assign(models.normal(*weight.shape))
    model.save_lora_weights("task.lora.h5")
    run("merge base.safetensors --lora task.lora.h5 -o merged.safetensors")
    kwm.merge_lora(model)
    merged = kwm.load_model("merged.safetensors")
    models.assert_same(models.weights_of(merged), models.weights_of(model))
    error = run(
        "merge base.safetensors --lora base.safetensors -o a.safetensors", 1
    )
    assert "has no LoRA for this model" in error


def test_a_delta_becomes_an_adapter_and_back(run):
    model = models.randomize(models.backbone("llama3"))
    kwm.save_model(model, "base.safetensors")
    base = models.weights_of(model)
    query = next(t for t in kwm.find_targets(model) if "query" in t.path)
    query.variable.assign(query.variable + 0.5)
    expected = models.weights_of(model)
    kwm.Patch.from_models(model, base).save("task.safetensors")
    line = "delta to-lora task.safetensors base.safetensors --rank 1"
    found = json.loads(run(f"{line} -o adapter --json"))
    assert found["error"] < 1e-3
    run("delta from-lora adapter base.safetensors -o b.safetensors")
    run("delta apply b.safetensors base.safetensors -o c.safetensors")
    again = models.weights_of(kwm.load_model("c.safetensors"))
    for left, right in zip(again, expected, strict=True):
        np.testing.assert_allclose(left, right, atol=1e-2)
    error = run(f"{line} -o adapter", code=1)
    assert "overwrite" in error


def test_files_of_other_kinds_are_named(run, tmp_path):
    models.mlp(8, 4).save("model.keras")
    np.savez("some.npz", a=np.ones(2))
    error = run("report some.npz", code=1)
    assert "an .npz file, which `numpy.load` reads" in error
    error = run("sparsify model.keras --data some.npz -o a.keras", code=1)
    assert "arrays called x" in error
    error = run("sparsify model.keras --data model.keras -o a.keras", code=1)
    assert ".npy or .npz" in error
    other = {"jax": "torch"}.get(keras.backend.backend(), "jax")
    error = run(f"report model.keras --backend {other}", code=1)
    assert f"Keras runs on {keras.backend.backend()}" in error
