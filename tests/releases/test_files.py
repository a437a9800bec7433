"""The files of all releases are read, and give what they gave."""

import numpy as np
import pytest

import keras_weightmods as kwm
from tests.models import assert_same_bits, outputs, weights_of
from tests.releases import files

RELEASES = sorted(path.parent for path in files.FOLDER.glob("*/outputs.npz"))


def test_this_release_has_files():
    assert files.FOLDER / kwm.__version__ in RELEASES


@pytest.mark.parametrize("folder", RELEASES, ids=lambda path: path.name)
def test_files_are_read(folder):
    with np.load(folder / "outputs.npz") as expected:
        names = {path.stem for path in folder.glob("*.safetensors")}
        assert names == set(expected)
        for name, output in expected.items():
            path = folder / f"{name}.safetensors"
            if name.startswith(("packed", "scaled")):
                received = outputs(kwm.load_model(path), files.X)
            else:
                received = patched(path)
            np.testing.assert_allclose(received, output, atol=2e-4)


def patched(path):
    """Return the outputs of a model that is patched, and then clean again."""
    model = files.net(1)
    before = weights_of(model)
    patch = kwm.Patch.load(path)
    patch.apply(model)
    received = outputs(model, files.X)
    patch.remove(model)
    assert_same_bits(weights_of(model), before)
    return received
