"""Recipes: what is refused before a model is loaded, runs, and resumed ones."""

import json
import pathlib
import re
import subprocess
import sys
import time
import warnings

import keras
import numpy as np
import pytest

import keras_weightmods as kwm
from keras_weightmods.cli import files, recipes
from keras_weightmods.cli.recipe import check_recipe, read_recipe
from tests import models

# A few steps are enough here.
pytestmark = [
    pytest.mark.filterwarnings("ignore:AdamS. this schedule"),
    # What the stages call is tested on all of them.
    pytest.mark.one_backend,
]

STAGES = [
    {"sparsify": {"criterion": "wanda"}},
    {"cast": {"epochs": 2, "batch_size": 8, "loss": "mse"}},
    {"quantize": {"group_size": 8, "refine": None}},
    {"pack": {"dtype": "int8"}},
]
RECIPE = {
    "model": "model.keras",
    "output": "out",
    "seed": 3,
    "data": {"file": "data.npz", "rows": 32},
    "stages": STAGES,
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model and its data."""
    monkeypatch.chdir(tmp_path)
    models.mlp(16, 16, 4).save("model.keras")
    x = models.normal(40, 16)
    np.savez("data.npz", x=x, y=x[:, :4])
    np.savez("inputs.npz", x=x)
    return tmp_path


def write(recipe, name="recipe.json"):
    pathlib.Path(name).write_text(json.dumps(recipe))
    return name


def results(output="out"):
    found = sorted(pathlib.Path(output).glob("*.safetensors"))
    return {path.name: path.read_bytes() for path in found}


PACKED = "2-pack.safetensors"
NAMES = [
    f"{i + 1}-{name}.safetensors"
    for i, name in enumerate(("sparsify", "cast", "quantize", "pack"))
]


# The stages themselves are tested on each backend, where they are made.
def test_a_run_and_one_that_is_killed_between(run, folder, monkeypatch):
    name = write(RECIPE)
    found = json.loads(run(f"run {name} --quiet --json"))
    assert [each["stage"] for each in found["done"]] == [
        "source",
        *(next(iter(stage)) for stage in STAGES),
    ]
    whole = results()
    assert [*whole] == NAMES
    kwm.assert_sparse(kwm.load_model("out/3-quantize.safetensors"), "2:4")
    kwm.load_model("out/4-pack.safetensors")
    report = json.loads(pathlib.Path("out/1-sparsify.json").read_text())
    assert report["criterion"] == "wanda"
    # Once more is nothing to do.
    run(f"run {name} --quiet")

    for killed in ("cast", "quantize"):
        output = f"again-{killed}"
        with monkeypatch.context() as patched:

            def kill(self, options):
                raise KeyboardInterrupt

            patched.setitem(recipes._STAGES, killed, kill)
            error = run(f"run {name} --quiet -o {output}", code=130)
            assert "interrupted" in error
            stages = [*NAMES][: [*recipes._STAGES].index(killed) - 1]
            assert [*results(output)] == stages
        run(f"run {name} --quiet -o {output}")
        assert results(output) == whole


def test_the_stages_are_calls_of_the_library(run, folder):
    run(f"run {write({**RECIPE, 'stages': STAGES[:1]})} --quiet")
    model = keras.saving.load_model("model.keras")
    x = np.load("data.npz")["x"][:32]
    kwm.sparsify(model, "2:4", x, criterion="wanda", verbose=0)
    sparse = kwm.load_model("out/1-sparsify.safetensors")
    models.assert_same(models.weights_of(sparse), models.weights_of(model))


def test_a_recipe_that_merges(run, folder, monkeypatch):
    for number in range(3):
        model = models.mlp(16, 16, 4)
        model.set_weights(models.random_weights(model, number))
        kwm.save_model(model, f"{number}.safetensors")
    merge = {
        "models": ["0.safetensors", "1.safetensors"],
        "base": "2.safetensors",
        "method": "ties",
        "weights": [1, {"bias": 0, "": [1, 0.5]}],
        "density": 0.5,
    }
    recipe = {"merge": merge, "output": "out"}
    assert "can be run: merge" in run(f"run {write(recipe)} --check")
    assert not pathlib.Path("out").exists()
    with monkeypatch.context() as patched:
        # The files are merged out of core, and no model is loaded after it.
        patched.setattr(files, "load_model", None)
        run(f"run {write(recipe)} --quiet")
    loaded = kwm.load_model("out/0-merge.safetensors")
    state = json.loads(pathlib.Path("out/state.json").read_text())
    size = sum(weight.nbytes for weight in loaded.get_weights())
    assert state["done"][0]["bytes"] == size
    kwm.merge(output="mine.safetensors", verbose=0, **merge)
    mine = pathlib.Path("mine.safetensors").read_bytes()
    assert results() == {"0-merge.safetensors": mine}
    assert "# Merged models" in pathlib.Path("out/README.md").read_text()
    # And on with it; killed on the way.
    more = {**recipe, "output": "more", "stages": ["sparsify"]}
    name = write(more, "more.json")
    with monkeypatch.context() as patched:

        def kill(self):
            raise KeyboardInterrupt

        patched.setattr(recipes.Run, "_merge", kill)
        run(f"run {name} --quiet", code=130)
        assert results("more") == {}
    run(f"run {name} --quiet")
    assert [*results("more")] == ["0-merge.safetensors", NAMES[0]]

    monkeypatch.setattr(files, "load_model", None)
    for match, wrong in (
        ("`model` must be left out", {"model": "model.keras"}),
        ("unknown: .'dense'", {"merge": {**merge, "dense": 1}}),
        ("`models` must be a file that is", {"merge": {"models": ["no"]}}),
        ("`base` must be what", {"merge": {**merge, "base": None}}),
        ("`density` must be", {"merge": {**merge, "density": 2}}),
        ("a .keras file", {"merge": {**merge, "base": "model.keras"}}),
    ):
        with pytest.raises(ValueError, match=match):
            check_recipe({**recipe, **wrong})


def test_the_card_and_the_state(run, folder):
    stages = ["sparsify", {"pack": {"dtype": "bfloat16"}}]
    run(f"run {write({**RECIPE, 'stages': stages})} --quiet")
    card = pathlib.Path("out/README.md").read_text()
    for part in (
        "| pack | dtype='bfloat16' |",
        'kwm.load_model("2-pack.safetensors")',
        f"- keras {keras.__version__}",
        f"- backend {keras.backend.backend()}",
        f"- keras-weightmods {kwm.__version__}",
        "Seed 3",
        '"model": "model.keras"',
    ):
        assert part in card, part
    state = json.loads(pathlib.Path("out/state.json").read_text())
    assert state["seed"] == 3
    sizes = [each["bytes"] for each in state["done"]]
    assert sizes[0] == sizes[1] > sizes[2]


def test_what_is_there_is_not_overwritten(run, folder):
    name = write({**RECIPE, "stages": ["sparsify"]})
    run(f"run {name} --quiet")
    before = results()
    other = write({**RECIPE, "seed": 4, "stages": ["sparsify"]}, "other.json")
    error = run(f"run {other} --quiet", code=1)
    assert "the output of another recipe" in error
    more = {**RECIPE, "stages": ["sparsify", {"pack": {"dtype": "int8"}}]}
    run(f"run {write(more, 'more.json')} --quiet")
    assert results() == before | {PACKED: results()[PACKED]}
    error = run(f"run {name} --quiet", code=1)
    assert "the output of another recipe" in error
    before = results()
    pathlib.Path("mine").mkdir()
    pathlib.Path("mine/file").touch()
    error = run(f"run {name} -o mine", code=1)
    assert "not the output of a recipe" in error
    assert results() == before


PROBLEMS = {
    "model: ": {"model": "nothing.keras"},
    "`seed` must be": {"seed": -1},
    "unknown: ['colour']": {"colour": 1},
    "data: unknown: ['path']": {"data": {"path": "data.npz"}},
    "data: `file` must be a file that is there": {"data": {"file": "no.npz"}},
    "data: `rows` must be": {"data": {"rows": 0}},
    "evaluate: `data` must be": {"evaluate": {}},
    "stages: `stages` must be a list": {"stages": {}},
    "stages: `stage` must be one of": {"stages": ["prune"]},
    "in the order": {"stages": ["pack", "sparsify"]},
    "stages: unknown: ['patern']": {"stages": [{"sparsify": {"patern": 1}}]},
    "sparsify: Expected|sparsify: `pattern`|sparsify: A pattern": {
        "stages": [{"sparsify": {"pattern": "4:2"}}]
    },
    "sparsify: `criterion` must be": {
        "stages": [{"sparsify": {"criterion": "x"}}]
    },
    "sparsify: `targets` must be": {"stages": [{"sparsify": {"targets": "("}}]},
    "sparsify: needs `data`": {
        "data": {},
        "stages": [{"sparsify": {"criterion": "wanda"}}],
    },
    "cast: `temperature` must be": {"stages": [{"cast": {"temperature": 0}}]},
    "cast: `epochs` must be": {"stages": [{"cast": {"epochs": 0}}]},
    "cast: Could not interpret|cast: Unknown": {
        "stages": [{"cast": {"loss": "none such"}}]
    },
    "cast: `init` is that of the stage": {
        "stages": ["sparsify", {"cast": {"init": "wanda"}}]
    },
    "quantize: `bits` must be": {"stages": [{"quantize": {"bits": 9}}]},
    "pack: int8 activations need": {
        "stages": [{"pack": {"activations": "int8", "dtype": "float32"}}]
    },
    "export: `filepath` must be": {"stages": ["export"]},
    "export: `dtype` must be|export: The format 'gguf' needs": {
        "stages": [
            {"export": {"format": "gguf", "filepath": "a.gguf", "dtype": "x"}}
        ]
    },
}


@pytest.mark.parametrize("message", PROBLEMS)
def test_all_is_checked_before_a_model_is_loaded(message, folder, monkeypatch):
    monkeypatch.setattr(files, "load_model", None)
    with pytest.raises(ValueError) as error:
        check_recipe({**RECIPE, **PROBLEMS[message]})
    parts = message.split("|")
    assert any(part in str(error.value) for part in parts), str(error.value)
    assert not pathlib.Path("out").exists()


def test_all_problems_are_listed_at_once(folder):
    recipe = {**RECIPE, "seed": "a", "stages": [{"pack": {"dtype": "int1"}}]}
    with pytest.raises(ValueError, match="2 problems") as error:
        check_recipe({**recipe})
    assert "`seed`" in str(error.value)
    assert "pack: `dtype`" in str(error.value)


def test_a_recipe_that_does_not_fit_the_model(run, folder):
    stages = ["sparsify", "cast"]
    error = run(f"run {write({**RECIPE, 'stages': stages})} --quiet", code=1)
    assert "needs a `loss`" in error
    assert results() == {}


def test_check_runs_nothing(run, folder):
    printed = run(f"run {write(RECIPE)} --check")
    assert "The recipe can be run: sparsify, cast, quantize, pack" in printed
    assert not pathlib.Path("out").exists()


def test_yaml(folder, monkeypatch):
    text = (
        "model: model.keras\n"
        "output: out\n"
        "stages:\n"
        "  - sparsify: {learning_rate: 1e-3, refine: [swaps]}\n"
        "  - pack:\n"
        "data: {file: data.npz}\n"
    )
    pathlib.Path("a.yaml").write_text(text)
    recipe = check_recipe(read_recipe("a.yaml"))
    assert recipe.stages[0][1]["learning_rate"] == 1e-3
    assert recipe.options_of("pack") == {}
    for more, message in (("model: b\n", "duplicate"), ("a: [\n", "valid")):
        pathlib.Path("b.yaml").write_text(text + more)
        with pytest.raises(ValueError, match=message):
            read_recipe("b.yaml")
    pathlib.Path("b.json").write_text('{"seed": 1, "seed": 2}')
    with pytest.raises(ValueError, match="twice"):
        read_recipe("b.json")
    monkeypatch.setitem(sys.modules, "ruamel.yaml", None)
    with pytest.raises(ImportError, match=re.escape("[cli]")):
        read_recipe("a.yaml")


def killed_after(name, stages, output):
    """Run a recipe in a process of its own, killed once `stages` are done."""
    state = pathlib.Path(output, "state.json")
    command = [sys.executable, "-m", "keras_weightmods.cli.main", "run", name]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    done: list = []
    try:
        while len(done) < stages and process.poll() is None:
            time.sleep(0.02)
            if state.exists():
                done = json.loads(state.read_text())["done"]
    finally:
        process.kill()
        process.wait()
    return [each["stage"] for each in done]


def test_a_language_model(run, folder):
    """The whole chain, killed and resumed: rows that it writes itself, CAST
    from a one-shot start, 4 bits, packed, exported, perplexity."""
    model = models.causal_lm("gpt2", models.gpt2_preprocessor())
    kwm.save_model(model, "llm.safetensors")
    pathlib.Path("text.txt").write_text("abc ab cdefgh hgf ed " * 20)
    recipe = {
        "model": "llm.safetensors",
        "output": "llm",
        "data": {
            "file": "text.txt",
            "rows": 6,
            "length": 8,
            "self_generated": 2,
        },
        "stages": [
            "sparsify",
            {"cast": {"batch_size": 4, "scaling_groups": 0}},
            {"quantize": {"group_size": 8, "refine": None}},
            {"pack": {"dtype": "int4", "head": "int8"}},
            {"export": {"format": "transformers", "filepath": "hf"}},
        ],
        "evaluate": {"data": "text.txt", "length": 8, "batch_size": 8},
    }
    name = write(recipe)
    assert killed_after(name, 2, "llm") == ["source", "sparsify"]
    first = pathlib.Path("llm/1-sparsify.safetensors")
    written = first.stat().st_mtime_ns
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*exported in dense form")
        run(f"run {name} --quiet")
    assert first.stat().st_mtime_ns == written
    rows = np.load("llm/rows.npy")
    assert rows.shape == (8, 8)
    sparse = kwm.load_model("llm/2-cast.safetensors")
    kwm.assert_sparse(sparse, "2:4")
    state = json.loads(pathlib.Path("llm/state.json").read_text())
    text = pathlib.Path("text.txt").read_text()
    expected = kwm.perplexity(sparse, [text], 8, batch_size=8, verbose=0)
    assert state["done"][2]["perplexity"] == pytest.approx(expected, rel=1e-4)
    names = "source", "sparsify", "cast", "quantize", "pack", "export"
    assert tuple(each["stage"] for each in state["done"]) == names
    packed = kwm.load_model("llm/4-pack.safetensors")
    assert any(w.name == "kernel_meta" for w in packed.weights)
    assert "perplexity" in pathlib.Path("llm/README.md").read_text()
    assert pathlib.Path("llm/hf/model.safetensors").is_file()
