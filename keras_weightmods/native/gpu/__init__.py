"""The 2:4 kernels of NVIDIA GPUs: one library, found and loaded at first use.

It opens the CUDA libraries that JAX or torch have brought, each when it is
first needed: NVRTC, which compiles the kernels for the GPU that is there, and
cuSPARSELt. Nothing here has been run on a GPU yet.
"""

import ctypes
import functools
import importlib.metadata
import importlib.util
import os
import pathlib
import re

from keras_weightmods import native

ABI_VERSION = 2

# Types of activations, as the library numbers them.
X_TYPES = {"float32": 0, "bfloat16": 1, "float16": 2, "int8": 3}

_DRIVER = b"libcuda.so.1"

# The result and the arguments of each function; see `native.open_library`.
_SIGNATURES = {
    "kwm_gpu_abi_version": ("i", ""),
    "kwm_gpu_load_driver": ("s", "s"),
    "kwm_gpu_load_decode": ("s", "ss"),
    "kwm_gpu_load_cusparselt": ("s", "s"),
    "kwm_gpu_decode_rows": ("q", "i"),
    "kwm_gpu_compile_decode": ("s", "iiiiqPP"),
    "kwm_gpu_prepare_decode": ("s", "iiiq"),
    "kwm_gpu_decode": ("s", "iPiiPqqqPPPP"),
    "kwm_gpu_load_rounding": ("s", "ss"),
    "kwm_gpu_compile_rounding": ("s", "iiiP"),
    "kwm_gpu_prepare_rounding": ("s", "ii"),
    "kwm_gpu_round_rows": ("s", "iPiPqqqPP"),
    "kwm_gpu_cusparselt_version": ("i", "i"),
    "kwm_gpu_compressed_size": ("s", "iqqiPP"),
    "kwm_gpu_compress": ("s", "iPPqqiPP"),
    "kwm_gpu_prepare_cusparselt": ("s", "iqqqiqP"),
    "kwm_gpu_cusparselt": ("s", "iPPqqqiqPPPP"),
    "kwm_gpu_cusparselt_algorithms": ("s", "iqqqiP"),
}


def library():
    """Return the `ctypes.CDLL`, with its functions typed, or None."""
    return _load()[0]


def reason_unavailable():
    """Return why there is no GPU library; empty if there is one.

    It says nothing of a GPU: the library loads without one.
    """
    return _load()[1]


def xla_handler(name):
    """Return the address of an XLA handler; None where XLA was left out."""
    return native.xla_handler(name, library())


@functools.cache
def load_decode(cuda):
    """Open NVRTC for the decode kernel.

    Args:
        cuda: Int, CUDA's major version: 12 or 13.

    Returns:
        String: the reason why the decode kernel cannot be used; empty if it
        can.
    """
    return _open("nvrtc", cuda, "kwm_gpu_load_decode", decode_source())


def decode_source():
    """Return the text of decode.cu, with the files that it includes."""
    folder = pathlib.Path(__file__).parent
    return re.sub(
        r'^#include "(\w+\.cuh)"$',
        lambda found: (folder / found[1]).read_text(),
        (folder / "decode.cu").read_text(),
        flags=re.MULTILINE,
    ).encode()


@functools.cache
def load_rounding(cuda):
    """Open NVRTC for the kernel that rounds activations, as `load_decode`."""
    source = pathlib.Path(__file__).with_name("rounding.cu").read_bytes()
    return _open("nvrtc", cuda, "kwm_gpu_load_rounding", source)


@functools.cache
def load_cusparselt(cuda):
    """Open cuSPARSELt, as `load_decode` does NVRTC."""
    return _open("cusparseLt", cuda, "kwm_gpu_load_cusparselt")


def decode_rows(x_dtype):
    """Return the most rows that the decode kernel takes; 0 for none."""
    if library() is None:
        return 0
    return library().kwm_gpu_decode_rows(X_TYPES.get(x_dtype, -1))


def compressed_size(device, shape, dtype):
    """Return the bytes of a kernel that cuSPARSELt has compressed.

    Args:
        device: Int, ordinal of the GPU.
        shape: Pair of ints (K, N).
        dtype: String, `"bfloat16"`, `"float16"` or `"int8"`.

    Raises:
        RuntimeError: If cuSPARSELt cannot compress it.
    """
    size, workspace = ctypes.c_int64(), ctypes.c_int64()
    sizes = ctypes.byref(size), ctypes.byref(workspace)
    check(
        library().kwm_gpu_compressed_size(
            device, *shape, X_TYPES[dtype], *sizes
        )
    )
    return size.value


def cusparselt_algorithms(device, rows, shape, dtype):
    """Return how many algorithms cuSPARSELt has for a product.

    Raises:
        RuntimeError: If cuSPARSELt cannot do it.
    """
    count = ctypes.c_int64()
    failure = library().kwm_gpu_cusparselt_algorithms(
        device, rows, *shape, X_TYPES[dtype], ctypes.byref(count)
    )
    check(failure)
    return count.value


def check(failure):
    """Raise RuntimeError for what a function of the library returned."""
    if failure is not None:
        raise RuntimeError(f"keras_weightmods: {failure.decode()}")


def cuda_of_wheels():
    """Return CUDA's major version by JAX's plugin; None if unclear."""
    for cuda in (13, 12):
        try:
            importlib.metadata.distribution(f"jax-cuda{cuda}-plugin")
        except importlib.metadata.PackageNotFoundError:
            continue
        return cuda
    return None


def _cuda_library(name, cuda):
    """Path of a library in the wheels of NVIDIA, else its plain name."""
    # cuSPARSELt counts its own versions.
    version = 0 if name == "cusparseLt" else cuda
    file = f"lib{name}.so.{version}"
    # Wheels for CUDA 13 share a folder, but cuSPARSELt's before 0.9 do not.
    own = {"nvrtc": "cuda_nvrtc", "cusparseLt": "cusparselt"}[name]
    spec = importlib.util.find_spec("nvidia")
    for place in (spec and spec.submodule_search_locations) or ():
        for folder in (f"cu{cuda}", own):
            path = pathlib.Path(place, folder, "lib", file)
            if path.exists():
                return os.fspath(path)
    return file


def _open(name, cuda, load, *arguments):
    """Open the driver and a library of CUDA; the reason if it cannot."""
    if library() is None:
        return reason_unavailable()
    path = _cuda_library(name, cuda).encode()
    failure = library().kwm_gpu_load_driver(_DRIVER)
    if failure is None:
        failure = getattr(library(), load)(*arguments, path)
    if failure is None:
        return ""
    return (
        f"{failure.decode()}. The libraries come with `pip install "
        f"'keras-weightmods[cuda{cuda}]'`, the driver with the GPU."
    )


@functools.cache
def _load():
    """Return the library, or None and why."""
    path = pathlib.Path(__file__).parents[1] / "lib" / "kwm_gpu.so"
    if not path.exists():
        return None, (
            f"{path} is missing: the package was installed without a C++ "
            "compiler, or not on Linux."
        )
    try:
        return open_library(path), ""
    except (OSError, AttributeError) as error:
        return None, f"{path} cannot be loaded: {error}."


def open_library(path):
    """Open a GPU library and type its functions; see `native.open_library`."""
    name = "kwm_gpu_abi_version"
    return native.open_library(path, name, ABI_VERSION, _SIGNATURES)
