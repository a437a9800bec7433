import ctypes
import itertools

import numpy as np
import pytest


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def backwards(rng):
    """A kwm_parallel_for that cuts at random, and the counts it was given."""
    from tests.native import library

    calls = []

    @library.ParallelFor
    def run(pool, count, grain, task, context):
        calls.append(count)
        cuts = [0, *sorted(rng.integers(0, count + 1, 3)), count]
        for begin, end in reversed([*itertools.pairwise(cuts)]):
            if begin < end:
                task(context, int(begin), int(end))

    # What is cast holds `run`.
    return ctypes.cast(run, ctypes.c_void_p), calls
