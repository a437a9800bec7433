"""The walks of the documentation: what they leave, in other processes."""

import importlib.util
import pathlib

import numpy as np
import pytest

import keras_weightmods as kwm
from tests.backends import run_python
from tests.test_docstrings import STEP

PAGE = pathlib.Path(__file__).absolute().parent.parent / "docs" / "walks.md"

# The code of the page is run by tests/test_docstrings.py too.
pytestmark = [pytest.mark.one_backend, pytest.mark.heavy]

# On another backend, with the package and the files alone.
LOADED = """
import keras, numpy as np
import keras_weightmods as kwm

assert keras.backend.backend() == {backend!r}
files = np.load("classifier.npz"), np.load("llm.npz")
model = kwm.load_model("classifier.safetensors")
y = np.array(model(files[0]["x"]))
np.testing.assert_allclose(y, files[0]["y"], atol=1e-4)

model = kwm.load_model("llm.safetensors")
rows = files[1]["rows"]
x = {{"token_ids": rows, "padding_mask": np.ones_like(rows)}}
logits = np.array(model(x))
np.testing.assert_allclose(logits, files[1]["logits"], atol=1e-3)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What all walks leave, each run by itself in a process of its own."""
    folder = tmp_path_factory.mktemp("walks")
    steps = STEP.findall(PAGE.read_text())
    assert len(steps) == 4
    lines = ["import keras"]
    for code, _ in steps:
        lines += [f"exec({code!r}, {{}})", "print('---')"]
        lines.append("keras.utils.clear_session()")
    printed = run_python("-c", "\n".join(lines), cwd=folder)
    parts = printed.split("---")
    for (_, expected), part in zip(steps, parts):
        # Progress is shown where a machine is slow.
        shown = [each for each in part.splitlines() if "\x1b" not in each]
        assert " ".join(shown).split() == expected.split(), part
    return folder


def test_the_export_runs_without_this_package(folder):
    code = (
        "import sys, numpy as np, torch\n"
        "files = np.load('classifier.npz')\n"
        "model = torch.export.load('classifier.pt2').module()\n"
        "y = model(torch.from_numpy(files['x'][:1])).detach().numpy()\n"
        "assert not {'keras', 'keras_weightmods'} & {*sys.modules}\n"
        "print(abs(y - files['y'][:1]).max(), abs(y).max())"
    )
    error, largest = map(
        float, run_python("-c", code, backend="torch", cwd=folder).split()
    )
    # int8 activations are the packed product's own.
    assert error < 0.05 * largest


def test_another_backend_loads_what_was_saved(folder):
    if importlib.util.find_spec("jax") is None:
        pytest.skip("needs JAX")
    run_python("-c", LOADED.format(backend="jax"), backend="jax", cwd=folder)


def test_what_the_walks_leave_is_what_they_say(folder):
    names = {path.name for path in folder.iterdir()}
    assert {"task.safetensors", "noise.safetensors"} <= names
    assert np.load(folder / "llm.npz")["logits"].shape == (2, 32, 64)
    assert len(kwm.WeightSignature.load(folder / "noise.safetensors")) == 6
