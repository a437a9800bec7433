"""Exported models with packed kernels, in processes of their own."""

import importlib.metadata
import os
import subprocess
import sys

import keras
import numpy as np
import pytest

import keras_weightmods as kwm
from keras_weightmods.ops.sparse_matmul import reason_for_dense
from tests import models

BACKEND = keras.backend.backend()
# By backend: the format of Keras, the name of the file, how to run it.
FORMATS = {
    "tensorflow": (
        "tf_saved_model",
        "saved",
        "import tensorflow as tf\n"
        "model = tf.saved_model.load(path)\n"
        "y = model.serve(x).numpy()\n",
    ),
    "torch": (
        "torch",
        "saved.pt2",
        "import torch\n"
        "model = torch.export.load(path).module()\n"
        "y = model(torch.from_numpy(x)).detach().numpy()\n",
    ),
}
START = "import sys\nimport numpy as np\npath, x = sys.argv[1], None\n"
END = "np.save(sys.argv[3], y)\n"
# TensorFlow imports Keras, and others, by itself.
NO_KERAS = "assert not {'keras', 'jax', 'tensorflow'} & {*sys.modules}\n"


def run_code(*lines, folder):
    name = FORMATS[BACKEND][1]
    arguments = [folder / name, folder / "x.npy", folder / "y.npy"]
    code = "\n".join([START, "x = np.load(sys.argv[2])", *lines, END])
    code += NO_KERAS if BACKEND == "torch" else ""
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    # What would make Keras take a backend that may not be installed.
    environment.pop("KERAS_BACKEND", None)
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
    )


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The folder of a packed model, and what it makes of the inputs there."""
    if BACKEND not in FORMATS:
        pytest.skip("on JAX packed models are exported dense")
    if reason := reason_for_dense():
        pytest.skip(reason)
    if importlib.metadata.version(BACKEND).startswith("2.9."):
        pytest.skip("torch 2.9 loads no integer weights")
    folder = tmp_path_factory.mktemp("exported")
    model = models.make_sparse(models.mlp(64, 32, 8))
    kwm.pack(model, dtype="int8")
    x = models.normal(1, 64)
    np.save(folder / "x.npy", x)
    kind, name, _ = FORMATS[BACKEND]
    model.export(str(folder / name), format=kind, verbose=False)
    return folder, models.outputs(model, x)


@pytest.mark.parametrize("first", [True, False])
def test_it_runs_where_this_package_is_imported(first, exported):
    folder, expected = exported
    # Many ask whether a package is there before they import it.
    asks = f"import importlib.util; importlib.util.find_spec('{BACKEND}')"
    lines = ["import keras_weightmods", asks, FORMATS[BACKEND][2]]
    if not first:
        lines.insert(0, f"import {BACKEND}")
    done = run_code(*lines, folder=folder)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(folder / "y.npy"), expected, atol=1e-5)


def test_without_the_import_the_error_names_it(exported):
    done = run_code(FORMATS[BACKEND][2], folder=exported[0])
    assert done.returncode == 1
    name = {"tensorflow": "`import keras_weightmods`"}
    assert name.get(BACKEND, "keras_weightmods.sparse_matmul") in done.stderr


def test_without_the_kernels_the_error_says_why(exported):
    no_library = "import os; os.environ['KERAS_WEIGHTMODS_NATIVE'] = '0'"
    lines = no_library, "import keras_weightmods", FORMATS[BACKEND][2]
    done = run_code(*lines, folder=exported[0])
    assert done.returncode == 1
    reason = {"torch": "KERAS_WEIGHTMODS_NATIVE is 0"}
    assert reason.get(BACKEND, "`import keras_weightmods`") in done.stderr
