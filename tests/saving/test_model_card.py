"""The cards of `save_model` and `export`; tests/cli has those of commands."""

import dataclasses
import os
import pathlib
import sys

import keras
import numpy as np
import pytest

import keras_weightmods as kwm
from keras_weightmods.exporting import export as exporting
from keras_weightmods.saving import model_card
from tests import models

CARD = kwm.ModelCard("org/base", "mit", command="")


def test_a_card_says_what_the_file_is(tmp_path):
    model = models.mlp(64, 32, 8)
    steps = [kwm.sparsify(model, verbose=0)]
    with pytest.warns(UserWarning, match="rounded 2 weights"):
        steps.append(kwm.pack(model, "int4", verbose=0))
    card = kwm.ModelCard(
        base_model="org/base",
        license='"mit": 2',
        quality={
            "accuracy|top 1": 1 / 3,
            "HumanEval": "60 of\n164",
            "n": 10**7,
        },
        steps=["Trained for 3 epochs.\n", *steps],
        command="python train.py",
    )
    path = tmp_path / "small.safetensors"
    kwm.save_model(model, path, card=card)
    text = (tmp_path / "small.safetensors.md").read_text("utf-8")
    yaml = pytest.importorskip("ruamel.yaml").YAML(typ="safe")
    _, head, body = text.split("---\n", 2)
    assert yaml.load(head) == {
        "library_name": "keras_weightmods",
        "license": '"mit": 2',
        "base_model": "org/base",
        "tags": ["keras-weightmods", "2:4", "int4"],
    }
    assert "# small.safetensors\n\nA `Sequential` of 2,344 parameters, " in body
    assert "| 2 | int4 2:4 | 2,304 |\n| 2 | float32 | 40 |\n" in body
    assert "- Trained for 3 epochs.\n- Sparsify: 2:4 by magnitude; " in body
    assert "\n- Pack: 2 packed weights; the model in memory: " in body
    assert "```bash\npython train.py\n```" in body
    assert "| accuracy\\|top 1 | 0.333333 |\n| HumanEval | 60 of 164 |" in body
    assert "| n | 10000000 |" in body
    backend = keras.backend.backend()
    assert f"Keras {keras.__version__}, {backend} " in body
    code = body.split("```python\n")[1].split("```")[0]
    names = {}
    exec(code.replace('"small', f'"{tmp_path}/small'), names)
    models.assert_same_bits(
        models.weights_of(names["model"]), models.weights_of(model)
    )


@pytest.mark.one_backend
def test_what_is_not_given_is_left_out(tmp_path):
    kwm.save_model(models.mlp(), tmp_path / "a", card=kwm.ModelCard(command=""))
    text = (tmp_path / "a.md").read_text()
    for word in ("license", "base_model", "done", "Command", "quality"):
        assert word not in text
    empty = kwm.ModelCard(steps=[], command="")
    assert model_card.read(str(tmp_path / "a")) == empty


@pytest.mark.one_backend
def test_license_and_base_model_are_read_again(tmp_path):
    card = kwm.ModelCard('org/"a" \\ b', '"mit": 2', command="")
    kwm.save_model(models.mlp(), tmp_path / "a", card=card)
    assert model_card.read(str(tmp_path / "a")) == dataclasses.replace(
        card, steps=[]
    )
    # The user's own: without quotes, and with such lines in its text.
    own = "---\nbase_model:\n- org/a\nlicense: mit\n---\n\nbase_model: no\n"
    (tmp_path / "b.md").write_text(own)
    found = model_card.read(str(tmp_path / "b"))
    assert found == kwm.ModelCard(license="mit", steps=[], command="")


@pytest.mark.one_backend
def test_a_card_of_an_earlier_model_is_not_silent(tmp_path):
    model = models.mlp()
    kwm.save_model(model, tmp_path / "a", card=CARD)
    with pytest.warns(UserWarning, match="saved before.*Pass `card=`"):
        kwm.save_model(model, tmp_path / "a")
    assert "org/base" in (tmp_path / "a.md").read_text()


@pytest.mark.one_backend
def test_the_command_is_that_of_a_program(tmp_path, monkeypatch):
    words = ["/usr/bin/python", "-m", "train", "a b"]
    monkeypatch.setattr(sys, "orig_argv", words)
    kwm.save_model(models.mlp(), tmp_path / "a", card=kwm.ModelCard())
    found = model_card.read(str(tmp_path / "a")).command
    assert found == "python -m train 'a b'"
    # An interpreter.
    monkeypatch.delattr(sys.modules["__main__"], "__file__")
    kwm.save_model(models.mlp(), tmp_path / "a", card=kwm.ModelCard())
    assert "## Command" not in (tmp_path / "a.md").read_text()


@pytest.mark.one_backend
def test_a_file_that_is_no_card_is_not_replaced(tmp_path):
    model, path = models.mlp(), tmp_path / "a.safetensors"
    card = tmp_path / "a.safetensors.md"
    card.write_text("My notes.")
    with pytest.raises(FileExistsError, match="Move that file"):
        kwm.save_model(model, path, card=CARD)
    assert os.listdir(tmp_path) == [card.name]
    card.unlink()
    kwm.save_model(model, path, card=CARD)
    kwm.save_model(model, path, card=CARD)
    path.unlink()
    with pytest.raises(FileExistsError, match="overwrite=True"):
        kwm.save_model(model, path, overwrite=False, card=CARD)
    # Without its last line it is the user's own.
    card.write_text("\n".join(card.read_text().splitlines()[:-1]))
    with pytest.raises(FileExistsError, match="Move that file"):
        kwm.save_model(model, path, card=CARD)
    assert os.listdir(tmp_path) == [card.name]


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("base_model", 3),
        ("license", ""),
        ("quality", ["accuracy"]),
        ("quality", {"accuracy": [0.5]}),
        ("quality", {3: 0.5}),
        ("steps", "quantized"),
        ("steps", [3]),
        ("command", ["python"]),
    ],
)
def test_wrong_arguments(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        kwm.ModelCard(**{name: value})


@pytest.mark.one_backend
def test_another_thing_than_a_card_is_refused(tmp_path):
    for call in (kwm.save_model, kwm.export):
        with pytest.raises(ValueError, match=r"kwm\.ModelCard"):
            call(models.mlp(), tmp_path / "a", card="mit")
    assert os.listdir(tmp_path) == []


def to_folder(model, size=1):
    def write(path, progress):
        os.mkdir(path)
        np.save(f"{path}/model.safetensors.npy", np.zeros(size))
        os.rename(f"{path}/model.safetensors.npy", f"{path}/model.safetensors")

    return write


def to_file(model, size=1):
    return lambda path, _: pathlib.Path(path).write_bytes(bytes(size))


@pytest.mark.one_backend
def test_an_export_has_a_card(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "FORMATS", dict(exporting.FORMATS))
    kwm.register_export_format("plain", to_folder)
    kwm.register_export_format("raw", to_file, ending=".raw")
    model = models.make_sparse(models.mlp(64, 8))
    kwm.pack(model, verbose=0)
    with pytest.warns(UserWarning, match="dense form"):
        kwm.export(model, tmp_path / "a.raw", card=CARD, size=2048)
    text = (tmp_path / "a.raw.md").read_text()
    assert "A `Sequential` of 520 parameters, 2.0 KiB on disk." in text
    assert "- Export: raw, size=2048\n" in text
    assert "How to load" not in text
    # The file is dense, and no file of Keras.
    assert '\ntags: ["keras-weightmods"]\n' in text
    assert "2:4" not in text.split("## ")[0]
    assert "library_name" not in text
    with (
        pytest.warns(UserWarning, match="dense form"),
        pytest.warns(UserWarning, match="saved before"),
    ):
        kwm.export(model, tmp_path / "a.raw")

    folder = tmp_path / "b-0.5B"
    for _ in range(2):
        with pytest.warns(UserWarning, match="dense form"):
            kwm.export(model, folder, "plain", card=CARD)
    names = ["README.md", "model.safetensors"]
    assert sorted(os.listdir(folder)) == names
    assert "\n# b-0.5B\n" in (folder / "README.md").read_text()
    (folder / "README.md").write_text("My notes.")
    for card in (CARD, None):
        with pytest.raises(FileExistsError, match="Move that file"):
            kwm.export(model, folder, "plain", card=card)
    assert (folder / "README.md").read_text() == "My notes."
    assert sorted(os.listdir(tmp_path)) == ["a.raw", "a.raw.md", "b-0.5B"]


@pytest.mark.one_backend
def test_a_gguf_file_has_no_tags_of_formats_in_keras(tmp_path):
    model = models.make_sparse(models.mlp(64, 8))
    kwm.pack(model, verbose=0)
    model_card.write(CARD, str(tmp_path / "a.gguf"), 1, model, "gguf")
    text = (tmp_path / "a.gguf.md").read_text()
    assert '\ntags: ["keras-weightmods"]\n' in text
    assert "| 1 | float32 2:4 | 512 |" in text


@pytest.mark.one_backend
def test_each_format_says_how_to_load_its_file():
    loads = model_card._LOADS
    assert {*exporting.FORMATS} <= {*loads}
    for name, code in loads.items():
        compile(code.replace("{name}", '"a"'), name, "exec")
