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


def test_the_commands_of_the_page_run(run):
    model = models.mlp(16, 16, 4)
    model.save("model.keras")
    np.save("x.npy", models.normal(32, 16))
    for seed, name in enumerate(("first", "second", "base")):
        model.set_weights(models.random_weights(model, seed))
        kwm.save_model(model, f"{name}.safetensors")
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    for line in "".join(blocks).splitlines():
        program, *words = shlex.split(line)
        assert program == "keras-weightmods"
        run(words)
    packed = kwm.load_model("packed.safetensors")
    kwm.unpack(packed)
    kwm.assert_sparse(packed, "2:4")


def test_the_page_names_all_commands():
    text = PAGE.read_text()
    for words in cli.COMMANDS:
        assert re.search(rf"`(\w+ )?{words.split()[-1]}\b", text), words
