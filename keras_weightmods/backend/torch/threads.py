"""How the compiled kernels share their work among torch's own threads."""

import ctypes
import functools

import torch

from keras_weightmods import native

# Multiply-adds below which one thread is used: to wake others that sleep or
# that the machine has given other work takes longer.
_ALONE = 2**22


def threads(work):
    """Return the last two arguments of a function of the library.

    Args:
        work: Int, the multiply-adds to do.

    Returns:
        The function that shares the work, and a pointer to its pool; None for
        both where one thread is enough.
    """
    count = torch.get_num_threads()
    if count == 1 or work < _ALONE:
        return None, None
    return _openmp(count)


class _OpenMP(ctypes.Structure):
    """`kwm_openmp` of openmp.h."""

    _fields_ = [("parallel", ctypes.c_void_p), ("threads", ctypes.c_int64)]


@functools.cache
def _openmp(count):
    # Global, as torch has loaded its runtime so.
    parallel = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    if parallel is None:
        return None, None
    pool = _OpenMP(ctypes.cast(parallel, ctypes.c_void_p), count)
    return native.library().kwm_openmp_for, ctypes.byref(pool)
