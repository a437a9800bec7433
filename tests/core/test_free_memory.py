"""What does not fit into memory is said before it is trained."""

import ctypes
import mmap
import os
import pathlib
import resource
import warnings

import numpy as np
import pytest

import keras_weightmods as kwm
from keras_weightmods.core import free_memory
from tests.models import mlp
from tests.sparsity import casts

SYSTEM = "MemTotal: 4000000 kB\nMemAvailable:   {} kB\n"


@pytest.fixture
def free(tmp_path, monkeypatch):
    def set_free(kib, limit="max", used=0):
        system = tmp_path / "meminfo"
        system.write_text(SYSTEM.format(kib))
        monkeypatch.setattr(free_memory, "_SYSTEM", system)
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text(f"{used}\n")
        monkeypatch.setattr(free_memory, "_CONTAINER", tmp_path)

    return set_free


def warned(nbytes):
    variables = mlp(8, 16, 4).trainable_variables
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        free_memory.warn_if_short("f", variables, nbytes, "Train less.")
    return [str(w.message) for w in found]


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("kib", "limit", "used", "free_bytes"),
    [
        (100, "max", 0, 102_400),
        (100, 50_000, 20_000, 30_000),
        (9, "x", 0, 9216),
    ],
)
def test_the_smaller_of_system_and_container_counts(
    free, kib, limit, used, free_bytes
):
    free(kib, limit, used)

    assert warned(free_bytes) == []
    (text,) = warned(free_bytes + 1)
    assert "Received: " in text
    assert text.endswith("Train less.")


@pytest.mark.one_backend
def test_a_system_that_does_not_say_is_not_checked(free, tmp_path):
    free(1)
    (tmp_path / "meminfo").write_text("MemTotal: 1 kB\n")

    assert warned(2**60) == []


def test_cast_says_what_it_needs(free):
    free(0)
    cast = casts.compiled()

    with pytest.warns(UserWarning, match=r"`CAST.fit` needs .* free memory"):
        casts.fit(cast)


def test_lift_says_what_it_needs(free):
    free(0)
    model = mlp(8, 16, 4)
    model.compile(kwm.SparseAdamW(0.01), "mse")
    callback = kwm.PrincipalMaskCallback(0.25, None, 2)

    with pytest.warns(UserWarning, match="`PrincipalMaskCallback` needs .*"):
        callback.attach(model)


needs_glibc = pytest.mark.skipif(
    not pathlib.Path("/proc/self/statm").exists()
    or not hasattr(ctypes.CDLL(None), "malloc_trim"),
    reason="needs Linux with glibc",
)


@pytest.mark.one_backend
@needs_glibc
def test_memory_between_arrays_goes_back():
    def resident():
        pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
        return int(pages) * mmap.PAGESIZE

    # Small enough for the heap, and every second one is freed.
    arrays = [np.ones(2**13) for _ in range(2000)]
    del arrays[::2]
    before = resident()
    free_memory.give_back()
    assert before - resident() > sum(x.nbytes for x in arrays) / 2
    assert len(arrays) == 1000


@pytest.mark.one_backend
@needs_glibc
def test_freed_memory_is_kept_within_the_scope(monkeypatch):
    names = "MALLOC_", "GLIBC_TUNABLES"
    for name in [x for x in os.environ if x.startswith(names)]:
        monkeypatch.delenv(name)

    def faults():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        np.ones(2**24)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    np.ones(2**24)
    outside = faults()
    with free_memory.kept():
        np.ones(2**24)
        assert faults() < outside / 10
    assert faults() > outside / 2


@pytest.mark.one_backend
@needs_glibc
def test_settings_of_the_user_stay(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "100000")
    called = []
    monkeypatch.setattr(
        free_memory, "_of_glibc", lambda name: lambda *args: called.append(args)
    )
    with free_memory.kept():
        pass
    assert not called
