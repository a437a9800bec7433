import gc
import os

import pytest

# The programs here run for a few steps: compiling them takes the time. Read
# when JAX is imported.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

ONE_BACKEND = "torch"  # the fastest of them


def pytest_collection_modifyitems(items):
    """Skips the tests of `one_backend` on all backends but one.

    It is for what makes no tensor and asks no backend: C++, files of bytes,
    NumPy alone.
    """
    import keras

    if keras.backend.backend() == ONE_BACKEND:
        return
    skip = pytest.mark.skip(
        reason=f"asks no backend: runs where the backend is {ONE_BACKEND}"
    )
    for item in items:
        if item.get_closest_marker("one_backend"):
            item.add_marker(skip)


def pytest_collection_finish():
    """Tells Python that what was imported is no garbage.

    Keras calls for a full collection at each layer that it quantizes.
    """
    gc.collect()
    gc.freeze()
