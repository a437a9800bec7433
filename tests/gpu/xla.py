"""Calls XLA handlers of the GPU library as XLA does, by fake_xla.cc."""

import ctypes
import pathlib
import shutil
import subprocess

import numpy as np
import pytest

# Of XLA's FFI.
DTYPES = {
    "int8": 2,
    "int32": 4,
    "uint8": 6,
    "float16": 10,
    "float32": 11,
    "bfloat16": 16,
}


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


def build_harness(folder):
    jaxlib = pytest.importorskip("jaxlib", reason="needs its headers")
    include = pathlib.Path(jaxlib.__file__).with_name("include")
    built = folder / "fake_xla.so"
    source = pathlib.Path(__file__).with_name("fake_xla.cc")
    subprocess.run(
        [shutil.which("g++"), "-std=c++17", "-O1", "-shared", "-fPIC"]
        + ["-isystem", include, source, "-o", built],
        check=True,
    )
    harness = ctypes.CDLL(str(built))
    harness.fake_xla_call.restype = ctypes.c_char_p
    harness.fake_xla_allocated.restype = ctypes.c_int64
    harness.fake_xla_traits.restype = ctypes.c_int64
    return harness


def caller(harness, library, fake):
    """Return a function that calls a handler: None, or what failed."""

    def call(name, inputs, results, algorithm=None, initialize=False):
        handler = getattr(library, f"kwm_gpu_xla_{name}")
        arrays = [Array.of(a) for a in (*inputs, *results)]
        number = None if algorithm is None else ctypes.c_int64(algorithm)
        failure = harness.fake_xla_call(
            ctypes.cast(handler, ctypes.c_void_p),
            initialize,
            (Array * len(arrays))(*arrays),
            len(arrays),
            len(inputs),
            None if number is None else ctypes.byref(number),
        )
        assert harness.fake_xla_allocated() == 0
        assert fake.fake_context_depth() == 0
        return failure and failure.decode()

    return call


def ffi_call_on_fake(call, targets):
    """Return what stands for `jax.ffi.ffi_call`, with handlers on a CPU."""
    import jax

    def ffi_call(target, result):
        name = target.removeprefix("kwm_gpu_")
        specs = jax.tree.leaves(result)

        def run(inputs, algorithm):
            inputs = [np.ascontiguousarray(x) for x in inputs]
            # What a handler does not write stays noise.
            results = [_noise(spec) for spec in specs]
            for stage in targets[target]:
                failure = call(
                    name + ("_initialize" if stage == "initialize" else ""),
                    inputs,
                    results,
                    algorithm,
                    stage == "initialize",
                )
                if failure:
                    raise RuntimeError(failure)
            return jax.tree.unflatten(jax.tree.structure(result), results)

        def ffi(*inputs, algorithm=None):
            def host(*given):
                return run(given, algorithm)

            return jax.pure_callback(host, result, *inputs)

        return ffi

    return ffi_call


def _noise(spec):
    array = np.empty(spec.shape, spec.dtype)
    array.view("uint8")[...] = 0xEE if array.size else 0
    return array
