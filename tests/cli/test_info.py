"""`info` and `--help`: what they say, and that they load no backend."""

import json
import os
import pathlib
import subprocess
import sys
import time
import zipfile

import h5py
import numpy as np
import pytest

import keras_weightmods as kwm
from keras_weightmods.cli import info
from tests import models

# What the commands call is tested on all of them.
pytestmark = pytest.mark.one_backend


def light(program, **environment):
    """Run a program in a process of its own; no backend may be loaded."""
    heavy = "{'keras', 'jax', 'tensorflow', 'torch', 'keras_hub'}"
    program = f"import sys\n{program}\nassert not {heavy} & {{*sys.modules}}"
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env=environment or None,
    ).stdout


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    model = models.make_sparse(models.mlp(8, 4, name="net"))
    model.save(folder / "model.keras")
    base = model.get_weights()
    model.set_weights([w + 1 for w in base])
    kwm.Patch.from_models(model, base).save(folder / "delta.safetensors")
    model.set_weights(base)
    signature = models.make_signature(model, depth=1)
    signature.save(folder / "signature.safetensors")
    model.save_weights(folder / "a.weights.h5")
    kwm.pack(model)
    kwm.save_model(model, folder / "packed.safetensors")
    np.save(folder / "x.npy", np.ones(3))
    return folder


def test_help_and_info_load_no_backend(files):
    words = [str(files / "packed.safetensors"), "--json"]
    program = (
        "from keras_weightmods.cli.main import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit:\n    print('END')\n"
        f"main(['info', {str(files / 'model.keras')!r}]); print('END')\n"
        f"main(['info', *{words}])"
    )
    text, keras_file, packed = light(program).split("END")
    assert "sparsify" in text
    assert "net" in keras_file
    assert json.loads(packed)["about"]["version"] == 1


def test_what_is_in_a_file(files, run):
    for name, *parts in (
        ("model.keras", "a .keras file", "`keras.models.load_model`", "8x4"),
        ("packed.safetensors", "`keras_weightmods.load_model`", "uint8"),
        ("delta.safetensors", "`keras_weightmods.Patch.load`", "patch.json"),
        ("signature.safetensors", "`keras_weightmods.Patch.load`", "8x4"),
        ("a.weights.h5", "an HDF5 file", "8x4"),
    ):
        printed = run(f"info {files / name}")
        assert all(part in printed for part in parts), printed


def test_what_cannot_be_inspected(files, run, tmp_path):
    error = run(f"info {files / 'x.npy'}", code=1)
    assert "a .npy file, which `numpy.load` reads" in error
    whole = (files / "packed.safetensors").read_bytes()
    half, altered = whole[:-9], whole[:-1] + bytes([whole[-1] ^ 1])
    for content, message in ((half, "truncated"), (altered, "checksum")):
        (tmp_path / "a.safetensors").write_bytes(content)
        assert message in run("info a.safetensors", code=1)


DEEP = "[" * 100_000


def archive(path, packing=zipfile.ZIP_STORED, **members):
    """Write a `.keras` file with members in place of its own."""
    with zipfile.ZipFile(path) as whole:
        own = {name: whole.read(name) for name in whole.namelist()}
    for name, content in members.items():
        own[{"weights": "model.weights.h5"}.get(name, f"{name}.json")] = content
    with zipfile.ZipFile("a.keras", "w", packing) as file:
        for name, content in own.items():
            if content is not None:
                file.writestr(name, content)


def test_damaged_keras_files_end_in_one_message(files, run, tmp_path):
    path = files / "model.keras"
    for members in (
        *(
            {"config": text}
            for text in (DEEP, "[1]", "3", "{", b"\xff", "9" * 5000)
        ),
        *({"metadata": text} for text in (None, DEEP, "[]", "null")),
        *({"weights": content} for content in (None, b"", b"\x89HDF" * 99)),
    ):
        archive(path, **members)
        assert "a.keras cannot be read: " in run("info a.keras", code=1)
    # Bits of the archive: encrypted, compressed in an unknown way, damaged.
    archive(path, zipfile.ZIP_DEFLATED)
    assert "8x4" in run("info a.keras")
    whole = (tmp_path / "a.keras").read_bytes()
    place = whole.index(b"PK\x01\x02")
    for where, value in (
        (place + 8, 1),
        (place + 10, 77),
        (40, whole[40] ^ 255),
    ):
        changed = bytearray(whole)
        changed[where] = value
        (tmp_path / "a.keras").write_bytes(changed)
        assert "a.keras cannot be read: " in run("info a.keras", code=1)
    # Nothing in a file reaches the terminal as more than text.
    archive(path, metadata='{"a\\u001b[2J": "\\u001b[2J"}')
    assert "a\\x1b[2J" in run("info a.keras")
    archive(path, metadata='["\\u001b[2J"')
    assert "\x1b" not in run("info a.keras", code=1)
    # What would take gigabytes is refused by its size in the directory.
    for members in ({"config": bytes(2**26)}, {"weights": bytes(2**27)}):
        archive(path, zipfile.ZIP_DEFLATED, **members)
        assert os.path.getsize("a.keras") < 2**19
        assert ", more than " in run("info a.keras", code=1)


def test_links_and_many_groups_in_hdf5(tmp_path, run):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        group = file
        for _ in range(800):
            group = group.create_group("g")
        group["x"] = np.ones((3, 5))
        group["itself"] = group
        group["soft"] = h5py.SoftLink("/g")
        group["outside"] = h5py.ExternalLink("b.h5", "/")
    start = time.process_time()
    report = info.file_report(str(tmp_path / "a.h5"))
    assert time.process_time() - start < 1
    assert report.arrays == (("g/" * 800 + "x", (3, 5), "float64"),)


def test_a_backend_that_is_installed_is_taken(tmp_path):
    program = (
        "import importlib.util as util, os\n"
        "find = util.find_spec\n"
        "util.find_spec = lambda name, *rest: (\n"
        "    None if name == 'tensorflow' else find(name, *rest))\n"
        "from keras_weightmods.cli.main import choose_backend\n"
        "choose_backend(None)\n"
        "print(os.environ['KERAS_BACKEND'])"
    )
    environment = {**os.environ, "KERAS_HOME": str(tmp_path)}
    del environment["KERAS_BACKEND"]
    for configured, taken in (
        ("torch", "torch"),
        ("tensorflow", "jax"),
        ("numpy", "jax"),
        (3, "jax"),
    ):
        text = json.dumps({"backend": configured})
        (tmp_path / "keras.json").write_text(text)
        assert light(program, **environment).strip() == taken


def test_presets(run):
    model = models.causal_lm("gpt2", models.gpt2_preprocessor())
    model.save_to_preset("preset")
    report = info.file_report("preset")
    assert report.kind == "a preset"
    assert report.nbytes > len(report.arrays) > 5
    assert report.about["class_name"]
    for name, content in (
        ("task.json", "[]"),
        ("config.json", DEEP),
        ("model.weights.h5", "HDF"),
        ("b.safetensors", "{}"),
    ):
        path = pathlib.Path("preset", name)
        before = path.read_text("latin-1") if path.exists() else None
        path.write_text(content)
        assert f"{path} cannot be read: " in run("info preset", code=1)
        path.unlink()
        if before is not None:
            path.write_text(before, "latin-1")
    task = pathlib.Path("preset", "task.json")
    for text in ("[]", DEEP, '{"class_name": "os"}', '{"class_name": ["A"]}'):
        task.write_text(text)
        error = run("generate preset a", code=1)
        assert f"{task} must be JSON with the `class_name` of" in error
    task.unlink()
    pathlib.Path("preset", "config.json").write_text("[3]")
    assert "KerasHub cannot load preset" in run("generate preset a", code=1)
