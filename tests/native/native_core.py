"""The C++ core alone: built by the tests, called through ctypes."""

import contextlib
import ctypes
import functools
import pathlib
import shutil
import subprocess
import tempfile

import numpy as np

from keras_weightmods import native

HERE = pathlib.Path(__file__).parent
SOURCES = HERE.parents[1] / "keras_weightmods" / "native"
CORE = [
    path
    for folder in ("", "x86", "arm")
    for path in sorted((SOURCES / folder).glob("*.cc"))
    if path.stem != "xla_handlers"
]

TYPES = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3}
ISAS = {"scalar": 0, "avx2": 1, "avx512": 2, "neon": 3, "avx_vnni": 4}
VALUES_DTYPE = {
    **{"float32": "float32", "bfloat16": "uint16"},
    **{"int8": "int8", "int4": "uint8"},
}
# bfloat16 by its bits.
SCALE_DTYPE = {"int8": "float32", "int4": "uint16"}

# As `native.open_library` takes them; the sizes are for the tests alone.
SIGNATURES = {
    **native._SIGNATURES,
    "kwm_values_bytes": ("q", "qqi"),
    "kwm_dense_values_bytes": ("q", "qqi"),
    "kwm_meta_bytes": ("q", "qq"),
    "kwm_scale_bytes": ("q", "qqi"),
}

Task = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)
ParallelFor = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, Task, ctypes.c_void_p
)


def compiler():
    return next(
        filter(None, map(shutil.which, ["c++", "g++", "clang++"])), None
    )


def build(target, *flags, command=None, sources=()):
    """Compile the core and `sources`, and return the path of `target`."""
    command = command or [compiler()]
    subprocess.run(
        [
            *command,
            "-std=c++17",
            f"-I{SOURCES / 'include'}",
            "-Wall",
            "-Wextra",
            "-Werror",
        ]
        + [*flags, *map(str, [*CORE, *sources]), "-o", str(target), "-pthread"],
        check=True,
    )
    return target


@functools.cache
def load():
    """The library, compiled once, with the types of its functions."""
    with tempfile.TemporaryDirectory() as folder:
        path = build(
            pathlib.Path(folder) / "core.so", "-O2", "-shared", "-fPIC"
        )
        return native.open_library(
            path, "kwm_abi_version", native._ABI_VERSION, SIGNATURES
        )


def isas():
    """Names of the instruction sets that this machine has."""
    here = load().kwm_isa()
    names = [name for name, i in ISAS.items() if load().kwm_set_isa(i) == i]
    load().kwm_set_isa(here)
    return names


@contextlib.contextmanager
def isa(name):
    """Run by one instruction set."""
    library = load()
    before = library.kwm_isa()
    assert library.kwm_set_isa(ISAS[name]) >= 0
    yield
    library.kwm_set_isa(before)


def pointer(array):
    return None if array is None else array.ctypes.data


def pack(kernel, dtype="float32"):
    """Return values, meta, scale and the number of bad groups."""
    kernel = np.ascontiguousarray(kernel, "float32")
    k, n = kernel.shape
    kind = TYPES[dtype]
    library = load()
    # Not zeros: what is not written shows.
    values = np.full(library.kwm_values_bytes(k, n, kind), 0xA5, "uint8")
    meta = np.full(library.kwm_meta_bytes(k, n) // 4, 0xA5A5A5A5, "uint32")
    scale = None
    if dtype in SCALE_DTYPE:
        scale = np.full(library.kwm_scale_bytes(k, n, kind), 0xA5, "uint8")
        scale = scale.view(SCALE_DTYPE[dtype])
    packed = map(pointer, [values, meta, scale])
    bad = library.kwm_pack(pointer(kernel), k, n, kind, *packed)
    return values.view(VALUES_DTYPE[dtype]), meta, scale, bad


def unpack(packed, k, n, dtype="float32"):
    kernel = np.full((k, n), np.nan, "float32")
    arrays = map(pointer, packed)
    load().kwm_unpack(*arrays, k, n, TYPES[dtype], pointer(kernel))
    return kernel


def matmul(x, packed, n, dtype="float32", parallel_for=None, transposed=False):
    """x @ W, or with transposed=True and dy for x, dy @ W^T, of k = n."""
    x = np.ascontiguousarray(x, "float32")
    rows, inner = x.shape
    out = np.full((rows, n), np.nan, "float32")
    library = load()
    shape = (n, inner) if transposed else (inner, n)
    weights = *shape, TYPES[dtype], *map(pointer, packed)
    name = "kwm_matmul_transposed" if transposed else "kwm_matmul"
    getattr(library, name)(
        pointer(x), rows, *weights, pointer(out), parallel_for, None
    )
    return out


def matmul_bfloat16(x, packed, n, parallel_for=None):
    """x @ W; x and what is returned are bfloat16 by their bits."""
    x = np.ascontiguousarray(x, "uint16")
    rows, k = x.shape
    out = np.full((rows, n), 0x7FC0, "uint16")
    values, meta = map(pointer, packed[:2])
    load().kwm_matmul_bfloat16(
        *(pointer(x), rows, k, n, values, meta, pointer(out)),
        *(parallel_for, None),
    )
    return out


def matmul_int8(x, packed, n, dtype, parallel_for=None):
    """x @ W with int8 activations; without meta W is dense."""
    x = np.ascontiguousarray(x, "float32")
    rows, k = x.shape
    out = np.full((rows, n), np.nan, "float32")
    weights = k, n, TYPES[dtype], *map(pointer, packed)
    load().kwm_matmul_int8(
        pointer(x), rows, *weights, pointer(out), parallel_for, None
    )
    return out


def matmul_int8_many(x, matrices, dtype, parallel_for=None):
    """x @ W for each of `matrices`, pairs of packed arrays and n."""
    x = np.ascontiguousarray(x, "float32")
    rows, k = x.shape
    outs = [np.full((rows, n), np.nan, "float32") for _, n in matrices]
    products = (native.Product * len(matrices))(
        *(
            native.Product(n, *map(pointer, [*packed, out]))
            for (packed, n), out in zip(matrices, outs)
        )
    )
    load().kwm_matmul_int8_many(
        *(pointer(x), rows, k, TYPES[dtype], ctypes.addressof(products)),
        *(len(matrices), parallel_for, None),
    )
    return outs


def values_gradient(x, dy, meta, parallel_for=None):
    x = np.ascontiguousarray(x, "float32")
    dy = np.ascontiguousarray(dy, "float32")
    k, n = x.shape[1], dy.shape[1]
    out = np.full(load().kwm_values_bytes(k, n, 0) // 4, np.nan, "float32")
    arrays = *map(pointer, [x, dy]), len(x), k, n, *map(pointer, [meta, out])
    load().kwm_values_gradient(*arrays, parallel_for, None)
    return out


def attend(q, keys, values, mask, scale, parallel_for=None):
    """softmax(scale * q @ keys^T) @ values."""
    out = np.full_like(q, np.nan)
    batch, places, key_heads, size = keys.shape
    stride = places * key_heads * size
    arrays = *map(pointer, [q, keys, values]), stride, pointer(mask)
    sizes = batch, q.shape[1], places, q.shape[2], key_heads, size
    load().kwm_attend(*arrays, *sizes, scale, pointer(out), parallel_for, None)
    return out
