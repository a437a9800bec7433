"""Calls the GPU's XLA handlers as XLA does, by fake_xla.cc, on a CPU."""

import ctypes
import pathlib
import shutil
import subprocess

import numpy as np
import pytest

from keras_weightmods import native

HERE = pathlib.Path(__file__).parent
SOURCES = pathlib.Path(native.__file__).parent
# The numbers of XLA's FFI.
DTYPES = {"int8": 2, "uint8": 6, "float16": 10, "float32": 11, "bfloat16": 16}


class Array(ctypes.Structure):
    _fields_ = [
        ("dtype", ctypes.c_int64),
        ("rank", ctypes.c_int64),
        ("dims", ctypes.c_int64 * 5),
        ("data", ctypes.c_void_p),
    ]

    @classmethod
    def of(cls, array):
        dims = (ctypes.c_int64 * 5)(*array.shape)
        dtype = DTYPES[array.dtype.name]
        return cls(dtype, array.ndim, dims, array.ctypes.data)


def compile_shared(source, built, *flags):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    command = [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", *flags]
    subprocess.run([*command, source, "-o", built], check=True)
    return built


class FakeGpu:
    """The library over a fake of the driver and of cuSPARSELt.

    It is a copy of the library, which has opened nothing else.
    """

    def __init__(self, folder):
        jaxlib = pytest.importorskip("jaxlib", reason="needs its headers")
        include = pathlib.Path(jaxlib.__file__).with_name("include")
        xla = HERE / "fake_xla.cc", folder / "fake_xla.so"
        self.xla = ctypes.CDLL(compile_shared(*xla, f"-isystem{include}"))
        self.xla.fake_xla_call.restype = ctypes.c_char_p
        self.xla.fake_xla_allocated.restype = ctypes.c_int64
        cuda = HERE / "fake_cuda.cc", folder / "fake_cuda.so"
        folders = [f"-I{SOURCES / name}" for name in ("include", "gpu")]
        self.path = compile_shared(*cuda, *folders)
        self.cuda = ctypes.CDLL(self.path)
        self.library = fresh_library(folder)
        path = str(self.path).encode()
        assert self.library.kwm_gpu_load(path, path) is None

    def call(self, name, inputs, results):
        """Call a handler: None, or what failed."""
        arrays = [Array.of(a) for a in (*inputs, *results)]
        handler = ctypes.cast(getattr(self.library, name), ctypes.c_void_p)
        given = (Array * len(arrays))(*arrays)
        sizes = len(arrays), len(inputs)
        failure = self.xla.fake_xla_call(handler, given, *sizes)
        assert self.xla.fake_xla_allocated() == 0
        assert self.cuda.fake_context_depth() == 0
        return failure and failure.decode()

    def ffi_call(self, target, result, vmap_method=None):
        """Stand for `jax.ffi.ffi_call`, on a CPU."""
        import jax

        def host(*inputs):
            y = np.empty(result.shape, result.dtype)
            # What a handler does not write stays noise.
            y.view("uint8")[...] = 0xEE
            inputs = [np.ascontiguousarray(x) for x in inputs]
            if failure := self.call(target, inputs, [y]):
                raise RuntimeError(failure)
            return y

        return lambda *inputs: jax.pure_callback(host, result, *inputs)


def fresh_library(folder):
    """Return a copy of the library, with the functions for a GPU typed."""
    if native.xla_handler("kwm_gpu_cusparselt") is None:
        pytest.skip("the library was built without the XLA handlers")
    own = shutil.copy(SOURCES / "lib" / "kwm_native.so", folder / "copy.so")
    library = native.open_library(own)
    native.typed(library, "kwm_gpu_load", "s", "ss")
    native.typed(library, "kwm_gpu_compressed_size", "s", "iqqiP")
    return library
