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


def blocks(language):
    text = PAGE.read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


# The commands are tested on each backend in `test_models.py`.
@pytest.mark.filterwarnings("ignore:AdamS. this schedule")
def test_the_commands_of_the_page_run(run, tmp_path):
    models.mlp(16, 16, 4).save("model.keras")
    x = models.normal(32, 16)
    np.savez("data.npz", x=x, y=x[:, :4])
    (recipe,) = blocks("yaml")
    (tmp_path / "recipe.yaml").write_text(recipe)
    for line in "".join(blocks("bash")).splitlines():
        program, *words = shlex.split(line)
        assert program == "keras-weightmods"
        run(words)
    packed = kwm.load_model("result/4-pack.safetensors")
    kwm.unpack(packed)
    kwm.assert_sparse(packed, "2:4")


def test_the_page_names_all_commands():
    text = PAGE.read_text()
    for words in cli.COMMANDS:
        assert re.search(rf"`(\w+ )?{words.split()[-1]}\b", text), words
