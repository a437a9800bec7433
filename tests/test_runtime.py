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
# By backend: the format, the name of the file, how to run it.
FORMATS = {
    "tensorflow": (
        "tf_saved_model",
        "saved",
        "import tensorflow as tf\n"
        "model = tf.saved_model.load(path)\n"
        "y = model.serve(x).numpy()",
    ),
    "torch": (
        "torch",
        "saved.pt2",
        "import torch\n"
        "model = torch.export.load(path).module()\n"
        "y = model(torch.from_numpy(x)).detach().numpy()\n"
        # TensorFlow imports Keras, and others, by itself.
        "assert not {'keras', 'jax', 'tensorflow'} & {*sys.modules}",
    ),
}
RUNTIME = "import keras_weightmods.runtime"


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
    kwm.export(model, folder / name, kind, keep_packed=True, verbose=0)
    return folder, models.outputs(model, x)


def run_exported(folder, *lines):
    _, name, code = FORMATS[BACKEND]
    arguments = [folder / name, folder / "x.npy", folder / "y.npy"]
    program = (
        "import sys\nimport numpy as np\n"
        "path, x = sys.argv[1], np.load(sys.argv[2])\n",
        *(f"{line}\n" for line in lines),
        f"{code}\nnp.save(sys.argv[3], y)",
    )
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    # It would make Keras take a backend that may not be installed.
    environment.pop("KERAS_BACKEND", None)
    return subprocess.run(
        [sys.executable, "-c", "".join(program), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
    )


def test_it_runs_where_the_runtime_is_imported(exported):
    """The runtime imports the framework that is installed."""
    folder, expected = exported
    other = {"torch": "tensorflow", "tensorflow": "torch"}[BACKEND]
    without = (
        "import importlib.util as util; find = util.find_spec; "
        f"util.find_spec = lambda name: name != '{other}' and find(name)"
    )
    done = run_exported(folder, without, RUNTIME)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(folder / "y.npy"), expected, atol=1e-5)


def test_without_the_import_the_error_names_it(exported):
    done = run_exported(exported[0])
    assert done.returncode == 1
    name = {"tensorflow": f"`{RUNTIME}`"}
    assert name.get(BACKEND, "keras_weightmods.sparse_matmul") in done.stderr


@pytest.mark.heavy
def test_without_the_kernels_the_error_says_why(exported):
    no_library = "import os; os.environ['KERAS_WEIGHTMODS_NATIVE'] = '0'"
    lines = no_library, f"import {BACKEND}", RUNTIME
    done = run_exported(exported[0], *lines)
    assert done.returncode == 1
    reason = {"torch": "KERAS_WEIGHTMODS_NATIVE is 0"}
    assert reason.get(BACKEND, f"`{RUNTIME}`") in done.stderr
