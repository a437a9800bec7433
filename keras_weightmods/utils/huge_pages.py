"""Arrays in huge pages of Linux, from which a processor reads faster.

A processor looks the address of each page up, and reads ahead within a page.
The pages are of 4 KB, and huge ones usually of 2 MB.
"""

import ctypes
import pathlib
import sys
from collections.abc import Iterable

import numpy as np

_SETTINGS = pathlib.Path("/sys/kernel/mm/transparent_hugepage")
_COLLAPSE = 25  # MADV_COLLAPSE, of Linux 6.1 and later
# Bytes of an array that is small.
_SMALL = 2**14


def collapse(arrays: Iterable[np.ndarray | None]) -> None:
    """Move arrays to huge pages, with what else lies in these.

    Their addresses and contents stay. Nothing happens where the system has no
    huge pages, or its administrator has turned them off.

    Args:
        arrays: Contiguous arrays. None and small ones are left out.
    """
    if sys.platform != "linux" or not _SETTINGS.exists():
        return
    if "[never]" in (_SETTINGS / "enabled").read_text():
        return
    size = int((_SETTINGS / "hpage_pmd_size").read_text())
    pages: set[int] = set()
    for array in arrays:
        if array is not None and array.nbytes >= _SMALL:
            first = array.ctypes.data
            last = first + array.nbytes - 1
            pages.update(range(first // size, last // size + 1))
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    for page in sorted(pages):
        # Where it fails, as beside memory of another kind, all stays as it was.
        madvise(page * size, size, _COLLAPSE)
