"""The commands on models, each beside the call that it stands for."""

import json
import pathlib
import sys

import keras
import numpy as np
import pytest

import keras_weightmods as kwm
from keras_weightmods.cli import main as cli
from tests import models

# What the commands call is tested on all of them.
pytestmark = pytest.mark.one_backend


def load_weights(path):
    load = keras.saving.load_model if ".keras" in path else kwm.load_model
    return models.weights_of(load(path))


def interrupted(*arguments, **options):
    raise KeyboardInterrupt


def test_what_a_keras_file_cannot_hold_is_not_written(run, tmp_path):
    model = models.mlp()
    kwm.attach_compander(model)
    kwm.save_model(model, "a.safetensors")
    base = [weight + 0.5 for weight in model.get_weights()]
    kwm.Patch.from_models(model, base).save("b.safetensors")
    line = "patch apply a.safetensors b.safetensors --force -o out.keras"
    assert "is reparameterized" in run(line, code=1)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"a.safetensors", "b.safetensors"}


# What it calls is tested on each backend: to compile it again takes a minute.
def test_language_models(run, tmp_path, monkeypatch):
    model = models.causal_lm("gpt2", models.gpt2_preprocessor())
    (tmp_path / "text.txt").write_text("abc ab cdefgh " * 40)
    model.save_to_preset("preset")
    words = ["generate", "preset", "ab c", "d", "--max-length", "8"]
    texts = json.loads(run([*words, "--json"]))["texts"]
    model.compile(sampler="greedy")
    assert texts == model.generate(["ab c", "d"], max_length=8)

    kwm.save_model(model, "llm.safetensors")
    data = "--data text.txt --length 12 --rows 4 --quiet"
    run(f"sparsify llm.safetensors --criterion wanda {data} -o a.safetensors")
    kwm.assert_sparse(kwm.load_model("a.safetensors"), "2:4")
    data += " --resume steps"
    line = f"quantize --refine none llm.safetensors {data} -o b.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(kwm, "save_model", interrupted)
        run(line, code=130)
    assert len(list((tmp_path / "steps").iterdir())) > 3
    run(line)
    assert not (tmp_path / "steps").exists()
    found = json.loads(run("pack b.safetensors -o c.safetensors --json"))
    assert found["totals"]["packed_share"] < 0.3
    assert run("generate c.safetensors a --max-length 99").startswith("a")
    kwm.export(models.backbone("qwen"), "qwen.gguf")
    twice = models.backbone("qwen", tie_word_embeddings=False)
    table = twice.token_embedding
    table.reverse_embeddings.assign(np.transpose(table.embeddings))
    kwm.export(twice, "twice.gguf")
    run("sparsify qwen.gguf -o d.safetensors")
    kwm.assert_sparse(kwm.load_model("d.safetensors"), "2:4")
    for name in ("preset", "qwen.gguf"):
        line = f"sparsify {name} --policy bfloat16 --overwrite"
        run(f"{line} -o d.safetensors")
        half = kwm.load_model("d.safetensors")
        assert {w.dtype for w in half.trainable_weights} == {"bfloat16"}
    for line, size in (("", 640), (" --tie-weights", 320)):
        run(f"sparsify twice.gguf{line} --overwrite -o d.safetensors")
        tables = kwm.load_model("d.safetensors").backbone.token_embedding
        assert tables.count_params() == size
    line = "generate preset a --tie-weights"
    assert "needs a .gguf file" in run(line, code=1)
    line = "generate d.safetensors a --policy bfloat16"
    assert "whose layers have their own" in run(line, code=1)
    models.mlp(8, 4).save("a.keras")
    assert "a.keras, a Sequential" in run("generate a.keras a", code=1)
    assert "no file a.gguf" in run("generate a.gguf a", code=1)


def assert_close(path, weights, atol):
    for pair in zip(load_weights(path), weights, strict=True):
        np.testing.assert_allclose(*pair, atol=atol)


def test_patches(run):
    base = models.mlp(8, 4)
    base.save("base.keras")
    before = models.weights_of(base)
    tuned = [w + 0.5 for w in before]
    base.set_weights(tuned)
    kwm.save_model(base, "tuned.safetensors")
    extract = "patch extract tuned.safetensors base.keras"
    assert "Wrote task.safetensors" in run(f"{extract} -o task.safetensors")
    run(f"{extract} --dtype exact --whole bias -o exact.safetensors")
    assert "dense" in run("patch info task.safetensors")
    for line, expected, atol in (
        ("apply base.keras task.safetensors", tuned, 1e-2),
        ("remove out.keras task.safetensors", before, 1e-6),
        ("apply base.keras exact.safetensors", tuned, 0),
    ):
        run(f"patch {line} -o out.keras --overwrite")
        assert_close("out.keras", expected, atol)
    for line, message in (
        ("patch apply out.keras exact.safetensors -o c.keras", "force=True"),
        ("patch remove out.keras exact.safetensors -o c.keras", "own file"),
        (f"{extract} --depth 1 -o c.safetensors", "for a --signature"),
    ):
        assert message in run(line, 1)
    assert not list(pathlib.Path().glob("c.*"))


def test_signatures(run):
    model = models.conv_net(name="net")
    for seed, name in enumerate(("init", "clean", "robust")):
        model.set_weights(models.random_weights(model, seed))
        model.save(f"{name}.keras")
    run(
        "patch extract robust.keras clean.keras --signature --init init.keras "
        "--depth 2 -o noise.safetensors"
    )
    signature = kwm.Patch.load("noise.safetensors")
    expected = kwm.WeightSignature.extract(
        *map(keras.saving.load_model, ("init.keras", "clean.keras")), model, 2
    )
    assert signature.digest == expected.digest
    line = "patch apply clean.keras noise.safetensors --scale .5"
    run(f"{line} -o clean.keras --overwrite")
    model.set_weights(models.random_weights(model, 1))
    expected.apply(model, 0.5)
    models.assert_same_bits(
        load_weights("clean.keras"), models.weights_of(model)
    )
    assert not list(pathlib.Path().glob(".*"))


def test_a_patch_becomes_an_adapter_and_back(run):
    model = models.randomize(models.backbone("llama3"))
    kwm.save_model(model, "base.safetensors")
    base = models.weights_of(model)
    query = next(t for t in kwm.find_targets(model) if "query" in t.path)
    query.variable.assign(query.variable + 0.5)
    expected = models.weights_of(model)
    kwm.Patch.from_models(model, base).save("task.safetensors")
    line = "patch to-lora base.safetensors task.safetensors --rank 1"
    assert json.loads(run(f"{line} -o adapter --json"))["error"] < 1e-3
    run("patch from-lora base.safetensors adapter -o b.safetensors")
    run("patch apply base.safetensors b.safetensors -o c.safetensors")
    assert_close("c.safetensors", expected, 1e-2)


CONFIG = """\
merge_method: ties
base_model: base.safetensors
models:
  - model: a.safetensors
    parameters: {weight: 1}
  - model: b.safetensors
    parameters: {weight: 0.5}
parameters: {density: 0.5}
"""


def test_a_configuration_is_merged(run):
    model, files = models.mlp(), ["a.safetensors", "b.safetensors"]
    for seed, name in enumerate((*files, "base.safetensors")):
        model.set_weights(models.random_weights(model, seed))
        kwm.save_model(model, name)
    pathlib.Path("config.yaml").write_text(CONFIG)
    run("merge config.yaml --quiet -o out.safetensors")
    options = {"base": name, "weights": [1, 0.5], "density": 0.5, "verbose": 0}
    kwm.merge(files, "mine.safetensors", "ties", **options)
    out, mine = map(pathlib.Path, ("out.safetensors", "mine.safetensors"))
    assert out.read_bytes() == mine.read_bytes()
    line = "merge a.safetensors --set colour=1 --quiet -o c.safetensors"
    assert "colour" in run(line, code=1)


def test_cards(run):
    model = models.mlp(16, 16)
    for name in ("a", "b"):
        kwm.save_model(model, f"{name}.safetensors")
    pathlib.Path("c.keras.md").write_text("My notes.")
    line = "sparsify a.safetensors --license mit --base-model org/a"
    assert "Move that file" in run(f"{line} -o c.keras", code=1)
    pathlib.Path("c.keras.md").unlink()
    assert "Wrote c.keras\nWrote c.keras.md" in run(f"{line} -o c.keras")
    pack = "pack c.keras --quiet -o d.safetensors"
    run(pack)
    card = pathlib.Path("d.safetensors.md").read_text()
    # What the card of the model says comes first.
    for text in (
        'license: "mit"\nbase_model: "org/a"\n',
        "- Sparsify: 2:4 by magnitude; 1 kernels",
        "\n- Pack: 1 packed weights; ",
        f"\nkeras-weightmods {line} -o c.keras\nkeras-weightmods {pack}\n",
    ):
        assert text in card
    assert "pack" not in pathlib.Path("c.keras.md").read_text()
    run("merge a.safetensors b.safetensors --quiet -o f.safetensors")
    card = pathlib.Path("f.safetensors.md").read_text()
    assert "# f.safetensors\n\n" in card
    assert "- Merge: linear: 2 weights merged into f.safetensors" in card
    pytest.importorskip("torch")
    with pytest.warns(UserWarning, match="dense form"):
        assert "Wrote g.pt2.md" in run("export d.safetensors -o g.pt2")
    card = pathlib.Path("g.pt2.md").read_text()
    assert "\n- Pack: 1 packed weights; " in card
    assert "\n- Export: torch\n" in card


def test_errors_name_the_file_and_write_nothing(run, tmp_path, monkeypatch):
    models.mlp(8, 4).save("model.keras")
    np.savez("some.npz", a=np.ones(2))
    for name in ("broken.keras", "broken.safetensors"):
        (tmp_path / name).write_bytes(b"PK not quite")
    (tmp_path / "zip.keras").write_bytes(b"PK\x03\x04 and no more")
    (tmp_path / "binary.txt").write_bytes(bytes(range(200, 256)))
    (tmp_path / "empty.npy").touch()
    (tmp_path / "zip.npy").write_bytes((tmp_path / "some.npz").read_bytes())
    other = {"jax": "torch"}.get(keras.backend.backend(), "jax")
    cases = {
        "info nothing.keras": "there is no file nothing.keras",
        "pack nothing -o a.safetensors": "preset='nothing'",
        "pack broken.keras -o a.safetensors": "Keras cannot load broken.keras",
        "merge model.keras zip.keras -o a.safetensors": "load zip.keras: ",
        "pack zip.keras -o a.safetensors": "Keras cannot load zip.keras: ",
        "pack some.npz -o a.safetensors": "an .npz file, which `numpy.load`",
        "sparsify model.keras --data binary.txt -o a.keras": "a text in UTF-8",
        "sparsify model.keras --data zip.npy -o a.keras": "in a .npy file",
        "sparsify model.keras --data no.npy -o a.keras": "no file no.npy",
        "sparsify model.keras --data empty.npy -o a.keras": "in a .npy file",
        "sparsify model.keras -o model.keras": "--overwrite replaces it",
        "sparsify model.keras -o x/a.keras": "folder that exists",
        "export model.keras -o a.gguf": "a KerasHub language model",
        f"info model.keras --backend {other}": "Keras runs on",
    }
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    for line, message in cases.items():
        assert message in run(line, code=1), line
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before
    monkeypatch.setitem(sys.modules, "keras_hub", None)
    error = run("generate llama3 a", code=1)
    assert "such as llama3, needs keras-hub. Install with: pip" in error


def test_usage(capsys):
    for line in ("", "patch", "nothing", "pack a -o b.keras"):
        with pytest.raises(SystemExit) as error:
            cli.main(line.split())
        assert error.value.code == 2
        assert "usage: keras-weightmods" in capsys.readouterr().err
    for words in ("", *cli.COMMANDS):
        with pytest.raises(SystemExit) as error:
            cli.main([*words.split(), "--help"])
        assert error.value.code == 0
        printed = capsys.readouterr().out
        assert "examples:\n  keras-weightmods" in printed
