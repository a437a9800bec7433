"""The compiled library through ctypes, on every instruction set."""

import contextlib
import ctypes
import dataclasses
import mmap
import os

import ml_dtypes
import numpy as np
import pytest

from keras_weightmods import native

if not native.is_available():
    pytest.skip(native.reason_unavailable(), allow_module_level=True)

LIBRARY = native.library()
ISAS = {"scalar": 0, "avx2": 1, "avx512": 2, "neon": 3, "avx_vnni": 4, "amx": 5}
Task = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
ParallelFor = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, Task, ctypes.c_void_p
)


@contextlib.contextmanager
def isa(name):
    """Run by one instruction set."""
    before = LIBRARY.kwm_isa()
    assert LIBRARY.kwm_set_isa(ISAS[name]) >= 0
    yield
    LIBRARY.kwm_set_isa(before)


def isas():
    """Names of the instruction sets that this machine has."""
    here = LIBRARY.kwm_isa()
    names = [name for name, i in ISAS.items() if LIBRARY.kwm_set_isa(i) == i]
    LIBRARY.kwm_set_isa(here)
    return names


def guarded(array):
    """Return a copy that ends where the process may not read on."""
    if array is None or not array.size or os.name == "nt":
        return array
    pages = -(-array.nbytes // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    end = ctypes.c_void_p(start + pages * mmap.PAGESIZE)
    assert ctypes.CDLL(None).mprotect(end, mmap.PAGESIZE, 0) == 0
    offset = pages * mmap.PAGESIZE - array.nbytes
    copy = np.frombuffer(memory, "uint8", array.nbytes, offset)
    copy = copy.view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def guarded_weights(packed):
    """Return a packed kernel in arrays of exactly their size."""
    names = "values", "meta", "scale"
    arrays = {name: guarded(getattr(packed, name)) for name in names}
    return dataclasses.replace(packed, **arrays)


def pointer(array):
    return None if array is None else array.ctypes.data


def result(*shape, dtype="float32"):
    # What is not written shows.
    return guarded(np.full(shape, np.nan, dtype))


def matmul(x, packed, parallel_for=None, transposed=False):
    """x @ W by the activations that `packed` names; dy @ W^T transposed."""
    dtype = ml_dtypes.bfloat16 if x.dtype == ml_dtypes.bfloat16 else "float32"
    x = guarded(np.ascontiguousarray(x, dtype))
    y = result(len(x), packed.shape[0 if transposed else 1], dtype=dtype)
    arrays = map(pointer, (packed.values, packed.meta, packed.scale))
    weights = *packed.shape, type_of(packed), *arrays
    name = "kwm_matmul"
    if transposed:
        name = "kwm_matmul_transposed"
    elif packed.activations == "int8":
        name = "kwm_matmul_int8"
    elif dtype != "float32":
        name = "kwm_matmul_bfloat16"
        k, n, _, values, meta, _ = weights
        weights = k, n, values, meta
    function = getattr(LIBRARY, name)
    function(pointer(x), len(x), *weights, pointer(y), parallel_for, None)
    return y


def type_of(packed):
    masked = native.MASKED if packed.pattern == "16:32" else 0
    return native.TYPES[packed.dtype] + masked


def matmul_int8_many(x, kernels, parallel_for=None):
    """x @ W for each kernel, by one call."""
    x = guarded(x)
    outs = [result(len(x), packed.shape[1]) for packed in kernels]
    products = (native.Product * len(kernels))(
        *(
            native.Product(
                packed.shape[1],
                type_of(packed),
                *map(pointer, (packed.values, packed.meta, packed.scale, y)),
            )
            for packed, y in zip(kernels, outs)
        )
    )
    LIBRARY.kwm_matmul_int8_many(
        *(pointer(x), *x.shape, ctypes.addressof(products)),
        *(len(kernels), parallel_for, None),
    )
    return outs


def values_gradient(x, dy, packed, parallel_for=None):
    """The gradient of the values of a packed kernel."""
    x, dy = guarded(x), guarded(dy)
    out = result(*packed.values.shape)
    LIBRARY.kwm_values_gradient(
        *(pointer(x), pointer(dy), len(x), *packed.shape),
        *(pointer(packed.meta), pointer(out), parallel_for, None),
    )
    return out


def attend(q, keys, values, mask, scale, parallel_for=None):
    """softmax(scale * q @ keys^T) @ values."""
    q, keys, values, mask = map(guarded, (q, keys, values, mask))
    out = result(*q.shape)
    batch, places, key_heads, size = keys.shape
    stride = places * key_heads * size
    arrays = *map(pointer, [q, keys, values]), stride, pointer(mask)
    sizes = batch, q.shape[1], places, q.shape[2], key_heads, size
    LIBRARY.kwm_attend(*arrays, *sizes, scale, pointer(out), parallel_for, None)
    return out
