import json

import keras
import numpy as np
import pytest

from keras_weightmods import WeightSignature
from keras_weightmods.cli import main as cli
from tests import models
from tests.models import assert_same_bits, conv_net, weights_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three checkpoints, a model of another kind, and files that are none."""
    folder = tmp_path_factory.mktemp("cli")
    model = conv_net(name="net")
    for seed, name in enumerate(("init", "clean", "robust")):
        model.set_weights(models.random_weights(model, seed))
        model.save(folder / f"{name}.keras")
    other = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    other.save(folder / "other.keras")
    stem = keras.layers.Conv2D(2, 3, name="stem")
    renamed = models.sequential((6, 6, 1), stem, *conv_net().layers[1:])
    renamed.save(folder / "renamed.keras")
    (folder / "broken.keras").write_bytes(b"PK not quite")
    (folder / "broken.safetensors").write_bytes(bytes(40))
    return folder


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """Runs a line of words; checks the exit code; returns what it printed."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "100")

    def run(line, code=0):
        assert cli.main(line.split()) == code
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err
        assert bool(printed.err) == bool(code)
        return printed.err if code else printed.out

    return run


DAMAGED = "truncated, altered or of another kind"
ADD = "signature add noise.safetensors"
APPLY = "signature apply noise.safetensors"
EXTRACT = (
    "signature extract --init init.keras --clean clean.keras "
    "--robust robust.keras --statistics keep"
)


@pytest.fixture
def noise(run, folder):
    path = folder / "noise.safetensors"
    if not path.exists():
        run(f"{EXTRACT} --depth 2 --name noise -o noise.safetensors")
    return path


def load_weights(path):
    return weights_of(keras.saving.load_model(path, compile=False))


def test_extract(run, noise, folder):
    files = [folder / f"{name}.keras" for name in ("init", "clean", "robust")]
    models = [keras.saving.load_model(file) for file in files]
    expected = WeightSignature.extract(
        *models, depth=2, statistics="keep", name="noise"
    )
    assert WeightSignature.load(noise).digest == expected.digest
    first = models[0].layers[0].name
    printed = run(
        "signature extract --clean clean.keras --robust robust.keras --targets "
        f"^dense ^{first}/ -o two.safetensors"
    )
    assert "Wrote two.safetensors" in printed
    two = WeightSignature.load(folder / "two.safetensors")
    assert two.method == "difference"
    assert [e.position for e in two] == [0, 1, 12, 13, 14, 15]


def test_apply_and_remove(run, noise, folder):
    clean = load_weights(folder / "clean.keras")
    signature = WeightSignature.load(noise)
    printed = run(f"{APPLY} clean.keras --scale .5 -o new.keras")
    assert "8 of 16 weights changed; wrote new.keras" in printed
    patched = load_weights(folder / "new.keras")
    assert_same_bits(patched, signature.apply(clean, 0.5))
    run("signature remove noise.safetensors new.keras --scale .5 -o old.keras")
    for a, b in zip(load_weights(folder / "old.keras"), clean):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    # With nothing added there is nothing to round.
    printed = run(
        "signature remove noise.safetensors clean.keras --scale 0 -o same.keras"
    )
    assert "the clean checkpoint, bit for bit" in printed
    assert_same_bits(load_weights(folder / "clean.keras"), clean)


def test_add_and_quantize(run, noise, folder):
    signature = WeightSignature.load(noise)
    run(f"{ADD} noise.safetensors --weights 2 -0.5 -o sum.safetensors")
    total = WeightSignature.load(folder / "sum.safetensors")
    assert total.cosine_similarity(signature) == pytest.approx(1)
    np.testing.assert_allclose(
        total.entries[0].tensor, 1.5 * signature.entries[0].tensor, rtol=1e-6
    )
    options = {"ties": "--density .5", "dare": "--drop-rate .5 --seed 3"}
    for method in ("mean", "ties", "dare"):
        run(
            f"{ADD} sum.safetensors --method {method} "
            f"{options.get(method, '')} -o {method}.safetensors"
        )
        made = WeightSignature.load(folder / f"{method}.safetensors")
        assert made.method == method
    run(
        "signature quantize noise.safetensors --bits 4 --per-channel "
        "-o small.safetensors"
    )
    small = WeightSignature.load(folder / "small.safetensors")
    assert small.digest == signature.quantize(4, per_channel=True).digest


def test_tables(run, noise):
    printed = run("signature info noise.safetensors")
    for part in ("noise, rws: 87 entries", "3x3x1x2", "clean: SHA-256"):
        assert part in printed, part
    found = json.loads(run("signature info noise.safetensors --json"))
    assert len(found["fingerprints"]["clean"]) == 64
    printed = run("report clean.keras --pattern 1:2")
    assert "Sparsity, pattern 1:2" in printed


def test_errors_have_no_traceback(run, noise, folder):
    cases = {
        "inspect nothing.keras": "there is no file nothing.keras",
        "inspect broken.keras": "Keras cannot load broken.keras",
        "inspect broken.safetensors": DAMAGED,
        "inspect nothing.safetensors": "nothing.safetensors",
        "report clean.keras --pattern 4:2": "pattern",
        "signature info clean.keras": "a .keras file, which",
        f"{EXTRACT} --depth 5 -o a.safetensors": "kernel, 4",
        f"{EXTRACT} --targets ( -o a.safetensors": "valid regular",
        f"{EXTRACT} --depth 1 -o a.npz": "must end in .safetensors",
        f"{EXTRACT} --depth 1 -o noise.safetensors": "--overwrite",
        f"{EXTRACT} --depth 1 -o x/a.safetensors": "folder that exists",
        f"{APPLY} other.keras -o a.keras": "another architecture",
        f"{APPLY} renamed.keras -o a.keras": "stem/kernel",
        "signature remove noise.safetensors renamed.keras -o a.keras": "stem/",
        f"{APPLY} clean.keras -o clean.keras": "clean.keras exists; --overwr",
        "signature remove noise.safetensors clean.keras --scale nan "
        "-o a.keras": "`scale`",
        f"{ADD} -o a.safetensors --weights 1 2": "`weights`",
        "signature quantize broken.safetensors -o a.safetensors": DAMAGED,
    }
    before = {p: p.read_bytes() for p in folder.iterdir()}
    for line, message in cases.items():
        assert message in run(line, code=1), line
    assert {p: p.read_bytes() for p in folder.iterdir()} == before


def test_the_input_is_replaced_when_told(run, noise, folder):
    (folder / "mine.keras").write_bytes((folder / "clean.keras").read_bytes())
    run(f"{APPLY} mine.keras -o mine.keras --overwrite")
    clean = load_weights(folder / "clean.keras")
    expected = WeightSignature.load(noise).apply(clean)
    assert_same_bits(load_weights(folder / "mine.keras"), expected)
    assert not list(folder.glob(".*"))


def test_what_a_compiled_file_loses_is_said(run, noise, folder):
    model = keras.saving.load_model(folder / "clean.keras", compile=False)
    assert "compile" not in run(f"{APPLY} clean.keras -o new2.keras")
    model.compile("adam", "mse")
    model.save(folder / "compiled.keras")
    line = f"{APPLY} compiled.keras -o compiled.keras --overwrite"
    assert "What compiled.keras had of `compile`" in run(line)
    assert not keras.saving.load_model(folder / "compiled.keras").compiled
    assert json.loads(run(f"{line} --json"))["was_compiled"] is False


def test_usage(capsys):
    for line in ("", "signature", "nothing", "signature quantize a --bits 3"):
        with pytest.raises(SystemExit) as error:
            cli.main(line.split())
        assert error.value.code == 2
        assert "usage: keras-weightmods" in capsys.readouterr().err
    assert len(cli.COMMANDS) == 22
    for words in ("", *cli.COMMANDS):
        with pytest.raises(SystemExit) as error:
            cli.main([*words.split(), "--help"])
        assert error.value.code == 0
        printed = capsys.readouterr().out
        assert "examples:\n  keras-weightmods" in printed
