"""docs/cli.md: its commands run, and name all that there are."""

import pathlib
import re
import shlex

import numpy as np
import pytest

import keras_weightmods as kwm
from keras_weightmods.cli import main as cli
from tests import models

# What the commands call is tested on all of them.
pytestmark = pytest.mark.one_backend

PAGE = pathlib.Path(__file__).absolute().parents[2] / "docs" / "cli.md"


def test_the_commands_of_the_page_do_what_the_calls_do(run):
    model, x = models.mlp(16, 16, 4), models.normal(200, 16)
    names = ("first", "second", "base")
    for seed, name in enumerate(names):
        model.set_weights(models.random_weights(model, seed))
        kwm.save_model(model, f"{name}.safetensors")
    model.save("model.keras")
    np.save("x.npy", x)
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    for line in "".join(blocks).splitlines():
        program, *words = shlex.split(line)
        assert program == "keras-weightmods"
        run(words)
    kwm.sparsify(model, "2:4", x[:128], criterion="wanda", verbose=0)
    kwm.pack(model, "int8", verbose=0)
    packed = kwm.load_model("packed.safetensors")
    models.assert_same_bits(*map(models.weights_of, (packed, model)))
    first, second, base = (f"{name}.safetensors" for name in names)
    options = {"base": base, "density": 0.4, "verbose": 0}
    kwm.merge([first, second], "mine.safetensors", "ties", **options)
    files = map(pathlib.Path, ("merged.safetensors", "mine.safetensors"))
    assert len({file.read_bytes() for file in files}) == 1


def test_the_page_names_all_commands():
    text = PAGE.read_text()
    for words in cli.COMMANDS:
        assert re.search(rf"`(\w+ )?{words.split()[-1]}\b", text), words
