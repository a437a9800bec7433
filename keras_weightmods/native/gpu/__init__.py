"""cuSPARSELt for JAX: find it, and call the library's functions for it.

torch has its own cuSPARSELt. Nothing here has been run on a GPU yet.
"""

import ctypes
import functools
import importlib.util
import os
import pathlib

from keras_weightmods import native

# The numbers of XLA's FFI.
_TYPES = {"bfloat16": 16, "float16": 10}
_DRIVER = "libcuda.so.1"


@functools.cache
def load_cusparselt():
    """Open the CUDA driver and cuSPARSELt, for the CUDA of JAX's plugin.

    Returns:
        String: the reason why cuSPARSELt cannot be used; empty if it can.
    """
    if reason := native.reason_without_xla():
        return reason
    cuda = 12 if importlib.util.find_spec("jax_cuda12_plugin") else 13
    load = native.typed(native.library(), "kwm_gpu_load", "s", "ss")
    failure = load(_DRIVER.encode(), cusparselt_path(cuda).encode())
    if failure is None:
        return ""
    return (
        f"{failure.decode()}. cuSPARSELt comes with `pip install "
        f"nvidia-cusparselt-cu{cuda}`, the driver with the GPU."
    )


def cusparselt_path(cuda):
    """Return the path of cuSPARSELt in NVIDIA's wheels, else its plain name."""
    # It has version numbers of its own.
    file = "libcusparseLt.so.0"
    spec = importlib.util.find_spec("nvidia")
    for place in (spec and spec.submodule_search_locations) or ():
        # Wheels for CUDA 13 share a folder, except those before 0.9.
        for folder in (f"cu{cuda}", "cusparselt"):
            path = pathlib.Path(place, folder, "lib", file)
            if path.exists():
                return os.fspath(path)
    return file


def compressed_size(device, shape, dtype):
    """Return the bytes of a kernel compressed by cuSPARSELt.

    Args:
        device: Int, ordinal of the GPU.
        shape: Pair of ints (K, N).
        dtype: String, `"bfloat16"` or `"float16"`.

    Raises:
        RuntimeError: If cuSPARSELt cannot compress it.
    """
    size = ctypes.c_int64()
    function = native.typed(
        native.library(), "kwm_gpu_compressed_size", "s", "iqqiP"
    )
    failure = function(device, *shape, _TYPES[dtype], ctypes.byref(size))
    if failure is not None:
        raise RuntimeError(f"keras_weightmods: {failure.decode()}")
    return size.value
