"""The compiled kernels: one C library, found and loaded at first use.

Without it, everything works by dense products.
"""

import ctypes
import functools
import os
import pathlib
import warnings
from typing import Any

_ABI_VERSION = 11
HEAD_SIZE_MULTIPLE = 16  # of `kwm_attend`
# The types of packed values.
TYPES = {
    **{"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3},
    **{"int2": 4, "int3": 5, "int5": 6, "int6": 7},
}
MASKED = 16  # added where `meta` is a mask
AVX512 = (2, 5)  # of `kwm_isa`, the second with AMX

# C's types, by the letters of Python's `struct`.
_C_TYPES = {
    "i": ctypes.c_int,
    "q": ctypes.c_int64,
    "f": ctypes.c_float,
    "P": ctypes.c_void_p,
    "s": ctypes.c_char_p,
}


class Product(ctypes.Structure):
    """`kwm_product` of kwm_native.h: a matrix, and where its product goes."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("n", "type")),
        *((name, ctypes.c_void_p) for name in ("values", "meta", "scale", "y")),
    )


# The result and the arguments of each function, as in kwm_native.h.
_SIGNATURES = {
    "kwm_abi_version": ("i", ""),
    "kwm_isa": ("i", ""),
    "kwm_set_isa": ("i", "i"),
    "kwm_matmul": ("", "PqqqiPPPPPP"),
    "kwm_matmul_bfloat16": ("", "PqqqPPPPP"),
    "kwm_matmul_int8": ("", "PqqqiPPPPPP"),
    "kwm_matmul_int8_many": ("", "PqqPqPP"),
    "kwm_matmul_transposed": ("", "PqqqiPPPPPP"),
    "kwm_values_gradient": ("", "PPqqqPPPP"),
    "kwm_attend": ("", "PPPqPqqqqqqfPPP"),
    "kwm_round_in_order": ("", "PPPPPqqffPP"),
    "kwm_search_scales": ("", "PPqqqPqfffP"),
    "kwm_multiples": ("", "PPqqqffPPP"),
    "kwm_multiples_gradient": ("", "PPPqqqffPPPP"),
    "kwm_prune_in_order": ("", "PPqqqqPP"),
    "kwm_swap_in_order": ("", "PPPPqqqqPP"),
}

_WAY_OUT = (
    "To get it, install a C++ compiler, GCC 11, clang 13 or later (on Debian: "
    "`apt-get install g++`). Then run `pip install -e .` in a clone of the "
    "package."
)

# The custom calls to register with XLA, on JAX and on TensorFlow.
XLA_TARGETS = (
    "kwm_xla_matmul",
    "kwm_xla_matmul_bfloat16",
    "kwm_xla_matmul_int8",
    "kwm_xla_matmul_transposed",
    "kwm_xla_values_gradient",
    "kwm_xla_attend",
)
_NO_XLA = (
    "the compiled library was built without the headers of jaxlib 0.8.0, as "
    "by `pip install --no-build-isolation` beside another jaxlib. " + _WAY_OUT
)


def is_available() -> bool:
    """Return whether the compiled kernels are there.

    Example:

    ```python
    from keras_weightmods import native

    print(native.is_available() or native.reason_unavailable())
    ```
    """
    return _load()[0] is not None


def reason_unavailable() -> str:
    """Return why there are no compiled kernels, and what to do.

    Empty if there are.
    """
    return _load()[1]


def library() -> Any:
    """Return the `ctypes.CDLL`, with its functions typed, or None."""
    return _load()[0]


def reason_without_xla() -> str:
    """Return why XLA cannot call the kernels; empty if it can."""
    if is_available() and xla_handler(XLA_TARGETS[0]) is None:
        return _NO_XLA
    return reason_unavailable()


def xla_handler(name: str) -> ctypes.c_void_p | None:
    """Return the address of an XLA handler, or None.

    A library built without XLA's headers has none.
    """
    handler = getattr(library(), name, None)
    return handler and ctypes.cast(handler, ctypes.c_void_p)


@functools.cache
def warn_dense(reason: str) -> None:
    """Warn, once for each reason, that products will be dense."""
    warnings.warn(
        "2:4 weights are multiplied by dense kernels, which is correct but "
        f"saves neither time nor memory: {reason}"
    )


# Not a cached function, which torch.compile would look into.
_loaded: tuple[ctypes.CDLL | None, str] | None = None


def _load():
    global _loaded
    if _loaded is None:
        _loaded = _find()
    return _loaded


def _find():
    """Return the library, or None and why."""
    # Mostly for tests and comparisons.
    if os.environ.get("KERAS_WEIGHTMODS_NATIVE") == "0":
        return None, (
            "the environment variable KERAS_WEIGHTMODS_NATIVE is 0. Unset it "
            "to use the compiled kernels."
        )
    # It does not lie beside this file. Tools that walk a package would try to
    # import it as an extension module.
    folder = pathlib.Path(__file__).parent / "lib"
    path = folder / ("kwm_native.dll" if os.name == "nt" else "kwm_native.so")
    if not path.exists():
        return None, (
            f"{folder} holds no compiled library, so there was no C++ compiler "
            f"when the package was installed, or it failed. {_WAY_OUT}"
        )
    try:
        return open_library(path), ""
    except (OSError, AttributeError) as error:
        return None, f"{path} cannot be loaded: {error}. {_WAY_OUT}"


def open_library(path):
    """Open the library at a path, and type its functions.

    Raises:
        OSError: If it cannot be opened, or is of another release.
        AttributeError: If it lacks a function.
    """
    loaded = ctypes.CDLL(os.fspath(path))
    found = loaded.kwm_abi_version()
    if found != _ABI_VERSION:
        raise OSError(
            f"it is of another release: version {found}, expected "
            f"{_ABI_VERSION}"
        )
    for name, (result, arguments) in _SIGNATURES.items():
        typed(loaded, name, result, arguments)
    return loaded


def typed(loaded, name, result, arguments):
    """Return a function of a library with its types set.

    Args:
        loaded: The library.
        name: String, the function.
        result, arguments: Strings, a letter for the type of each.
    """
    function = getattr(loaded, name)
    function.restype = _C_TYPES.get(result)
    function.argtypes = [_C_TYPES[letter] for letter in arguments]
    return function
