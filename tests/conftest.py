import gc
import os
import tempfile

import pytest

# The programs here run for a few steps: compiling them takes the time. Read
# when JAX is imported.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# And a program that an earlier test compiled is not compiled again, nor that of
# a `cond` or a loop that JAX runs eagerly. The processes of tests share it.
COMPILED = tempfile.TemporaryDirectory(prefix="kwm-tests-jax-")
for name, value in {
    "JAX_COMPILATION_CACHE_DIR": COMPILED.name,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.02",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}.items():
    os.environ.setdefault(name, value)

ONE_BACKEND = "torch"  # the fastest of them


def pytest_addoption(parser):
    parser.addoption(
        "--breadth",
        action="store_true",
        help="every case on every backend, and the tests marked `heavy`",
    )


def pytest_collection_modifyitems(config, items):
    """Skips `heavy`, and `one_backend` on all backends but one.

    `make breadth` runs what is skipped here.

    JAX compiles, and TensorFlow traces, anew for each shape and fit. The marker
    is for code without tensors or backends (C++, files of bytes, NumPy alone),
    and for arguments, messages, reports and raw strings. It is also for cases
    after the first: more shapes, settings and families of models, and
    invariants of a function that meets its reference on each backend. `breadth`
    in tests/backends.py marks the further cases of a table.

    Every public name keeps a test on each backend for each kind of layer and
    model that it takes. Gradients, compiled steps, autocast and low precision,
    donation, random state, distribution and files that go from one backend to
    another stay on all.
    """
    import keras

    if config.getoption("breadth"):
        return
    skipped = {"heavy": "takes long: runs in `make breadth`"}
    if keras.backend.backend() != ONE_BACKEND:
        skipped["one_backend"] = (
            f"shows the same on each backend: runs on {ONE_BACKEND}"
        )
    for item in items:
        for name, reason in skipped.items():
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module", autouse=True)
def _old_objects_are_no_garbage():
    """Keep the collector off what earlier files and imports have left.

    Keras calls for a full collection at each layer that it quantizes.
    """
    gc.collect()
    gc.freeze()
