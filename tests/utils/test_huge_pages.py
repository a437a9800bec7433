"""Arrays in huge pages."""

import mmap
import pathlib
import sys

import numpy as np
import pytest

from keras_weightmods.utils import huge_pages

pytestmark = [
    pytest.mark.one_backend,
    pytest.mark.skipif(sys.platform != "linux", reason="of Linux"),
]


def huge_bytes(array):
    """Bytes of huge pages in the mapping of an array."""
    is_own = False
    for line in pathlib.Path("/proc/self/smaps").read_text().splitlines():
        name, *values = line.split()
        if "-" in name:
            start, end = (int(x, 16) for x in name.split("-"))
            is_own = start <= array.ctypes.data < end
        elif is_own and name == "AnonHugePages:":
            return 1024 * int(values[0])
    return 0


def test_an_array_moves_with_its_contents():
    size, small = 2**23, np.zeros(3)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    array = np.frombuffer(memory, "int64")
    array[:] = np.arange(len(array))
    memory.madvise(mmap.MADV_HUGEPAGE)
    assert huge_bytes(array) == 0
    # A part of a page is enough.
    huge_pages.collapse([None, small, array[100:-100]])
    np.testing.assert_array_equal(array, np.arange(len(array)))
    if not huge_bytes(array):
        pytest.skip("the system has no MADV_COLLAPSE, or no room")
    assert huge_bytes(array) >= size // 2


@pytest.mark.parametrize("enabled", [None, "always madvise [never]"])
def test_nothing_without_the_system(monkeypatch, tmp_path, enabled):
    settings = tmp_path / "transparent_hugepage"
    if enabled:
        settings.mkdir()
        (settings / "enabled").write_text(enabled)
    monkeypatch.setattr(huge_pages, "_SETTINGS", settings)
    monkeypatch.setattr(huge_pages, "ctypes", None)
    huge_pages.collapse([np.zeros(2**20)])
