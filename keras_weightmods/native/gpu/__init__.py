"""The 2:4 kernels of NVIDIA GPUs: one library, found and loaded at first use.

It opens the CUDA libraries that JAX or torch have brought, each when it is
first needed: NVRTC, which compiles the decode kernel for the GPU that is
there, and cuSPARSELt. Nothing here has been run on a GPU yet.
"""

import ctypes
import functools
import importlib.metadata
import importlib.util
import os
import pathlib

ABI_VERSION = 1

# Types of activations, as the library numbers them.
X_TYPES = {"float32": 0, "bfloat16": 1, "float16": 2, "int8": 3}

_DRIVER = b"libcuda.so.1"

_INT = ctypes.c_int
_SIZE = ctypes.c_int64
_POINTER = ctypes.c_void_p
_TEXT = ctypes.c_char_p
_SIZE_POINTER = ctypes.POINTER(_SIZE)
_SIGNATURES = {
    "kwm_gpu_abi_version": (_INT, []),
    "kwm_gpu_load_driver": (_TEXT, [_TEXT]),
    "kwm_gpu_load_decode": (_TEXT, [_TEXT, _TEXT]),
    "kwm_gpu_load_cusparselt": (_TEXT, [_TEXT]),
    "kwm_gpu_decode_rows": (_SIZE, [_INT]),
    "kwm_gpu_compile_decode": (_TEXT, [_INT] * 4 + [_SIZE, _SIZE_POINTER]),
    "kwm_gpu_prepare_decode": (_TEXT, [_INT] * 3 + [_SIZE]),
    "kwm_gpu_decode": (
        _TEXT,
        [_INT, _POINTER, _INT, _INT, _POINTER]
        + [_SIZE] * 3
        + [_POINTER, _POINTER, _POINTER, _POINTER],
    ),
    "kwm_gpu_cusparselt_version": (_INT, [_INT]),
    "kwm_gpu_compressed_size": (
        _TEXT,
        [_INT, _SIZE, _SIZE, _INT, _SIZE_POINTER, _SIZE_POINTER],
    ),
    "kwm_gpu_compress": (
        _TEXT,
        [_INT, _POINTER, _POINTER, _SIZE, _SIZE, _INT, _POINTER, _POINTER],
    ),
    "kwm_gpu_prepare_cusparselt": (
        _TEXT,
        [_INT] + [_SIZE] * 3 + [_INT, _SIZE, _SIZE_POINTER],
    ),
    "kwm_gpu_cusparselt": (
        _TEXT,
        [_INT, _POINTER, _POINTER]
        + [_SIZE] * 3
        + [_INT, _SIZE, _POINTER, _POINTER, _POINTER],
    ),
    "kwm_gpu_cusparselt_algorithms": (
        _TEXT,
        [_INT, _SIZE, _SIZE, _SIZE, _INT, _SIZE_POINTER],
    ),
}


def library():
    """The `ctypes.CDLL`, with its functions typed; None if not available."""
    return _load()[0]


def why_not():
    """Says why the GPU library is not there; empty if it is.

    It says nothing of a GPU: the library loads without one.
    """
    return _load()[1]


def xla_handler(name):
    """The address of an XLA handler; None in a library built without them."""
    handler = getattr(library(), name, None)
    return handler and ctypes.cast(handler, ctypes.c_void_p)


@functools.cache
def load_decode(cuda):
    """Opens NVRTC for the decode kernel.

    Args:
        cuda: Int, CUDA's major version: 12 or 13.

    Returns:
        String: why the decode kernel cannot be used; empty if it can.
    """
    if library() is None:
        return why_not()
    source = pathlib.Path(__file__).with_name("decode.cu").read_bytes()
    path = _cuda_library("nvrtc", cuda)
    failure = library().kwm_gpu_load_driver(_DRIVER)
    if failure is None:
        failure = library().kwm_gpu_load_decode(source, path.encode())
    return _reason(failure, cuda)


@functools.cache
def load_cusparselt(cuda):
    """Opens cuSPARSELt.

    Args:
        cuda: Int, CUDA's major version: 12 or 13.

    Returns:
        String: why cuSPARSELt cannot be used; empty if it can.
    """
    if library() is None:
        return why_not()
    path = _cuda_library("cusparseLt", cuda)
    failure = library().kwm_gpu_load_driver(_DRIVER)
    if failure is None:
        failure = library().kwm_gpu_load_cusparselt(path.encode())
    return _reason(failure, cuda)


def decode_rows(x_dtype):
    """The most rows that the decode kernel takes; 0 if it takes none."""
    if library() is None:
        return 0
    return library().kwm_gpu_decode_rows(X_TYPES.get(x_dtype, -1))


def compressed_size(device, shape, dtype):
    """Bytes of a kernel that cuSPARSELt has compressed.

    Args:
        device: Int, ordinal of the GPU.
        shape: Pair of ints (K, N).
        dtype: String, `"bfloat16"`, `"float16"` or `"int8"`.

    Raises:
        RuntimeError: If cuSPARSELt cannot compress it.
    """
    size, workspace = _SIZE(), _SIZE()
    failure = library().kwm_gpu_compressed_size(
        device,
        *shape,
        X_TYPES[dtype],
        ctypes.byref(size),
        ctypes.byref(workspace),
    )
    check(failure)
    return size.value


def cusparselt_algorithms(device, rows, shape, dtype):
    """How many algorithms cuSPARSELt has for a product.

    Raises:
        RuntimeError: If cuSPARSELt cannot do it.
    """
    count = _SIZE()
    failure = library().kwm_gpu_cusparselt_algorithms(
        device, rows, *shape, X_TYPES[dtype], ctypes.byref(count)
    )
    check(failure)
    return count.value


def check(failure):
    """Raises RuntimeError for what a function of the library returned."""
    if failure is not None:
        raise RuntimeError(f"keras_weightmods: {failure.decode()}")


def cuda_of_wheels():
    """CUDA's major version by the installed plugin of JAX; None if unclear."""
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
    folders = {12: {"nvrtc": "cuda_nvrtc", "cusparseLt": "cusparselt"}}
    folder = folders.get(cuda, {}).get(name, f"cu{cuda}")
    spec = importlib.util.find_spec("nvidia")
    for place in (spec and spec.submodule_search_locations) or ():
        path = pathlib.Path(place, folder, "lib", file)
        if path.exists():
            return os.fspath(path)
    return file


def _reason(failure, cuda):
    if failure is None:
        return ""
    return (
        f"{failure.decode()}. The libraries come with `pip install "
        f"'keras-weightmods[cuda{cuda}]'`, the driver with the GPU."
    )


@functools.cache
def _load():
    """The library, or None and why."""
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
    """Opens a GPU library and types its functions.

    Raises:
        OSError: If it cannot be opened, or is of another release.
    """
    loaded = ctypes.CDLL(os.fspath(path))
    version = loaded.kwm_gpu_abi_version()
    if version != ABI_VERSION:
        raise OSError(
            f"it is of another release: its interface has version {version}, "
            f"expected {ABI_VERSION}"
        )
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded
