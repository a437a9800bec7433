"""The operators of `sparse_matmul` and attention on torch, by `torch.library`.

An exported program calls the product operators by name. So this file imports
Keras, which loads a backend, only if it must.
"""

import ctypes
import functools
import importlib
import math

import torch

from keras_weightmods import native
from keras_weightmods.native.layout import (
    dtype_of,
    packed_arrays,
    pattern_of,
)
from keras_weightmods.utils import checks

_TYPES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.int8: "int8",
    torch.uint8: "uint8",
}

_library = torch.library.Library("keras_weightmods", "DEF")
# Multiply by the kernel or its transpose, with `size` columns. Without `meta`
# it is a dense matrix. A `meta` of four axes is a mask. `rounded` rounds
# activations to int8.
_library.define(
    "sparse_matmul(Tensor x, Tensor values, Tensor? meta, Tensor? scale, "
    "SymInt size, bool rounded=False, bool transposed=False) -> Tensor"
)
_library.define(
    "sparse_values_gradient(Tensor x, Tensor dy, Tensor meta) -> Tensor"
)
# Without gradients: recordings call `attend` and bypass the operator.
_library.define(
    "attend(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale) -> Tensor"
)


@torch.library.impl(_library, "sparse_matmul", "CUDA")
def _matmul_on_gpu(*arguments):
    module = "keras_weightmods.backend.torch.sparse_matmul_gpu"
    return importlib.import_module(module).sparse_matmul(*arguments)


@torch.library.impl(_library, "sparse_matmul", "CPU")
def _matmul(x, values, meta, scale, size, rounded=False, transposed=False):
    inner = x.shape[-1]
    if pattern_of(meta) != "2:4" and not rounded:
        form = importlib.import_module("keras_weightmods.native.packed")
        shape = (size, inner) if transposed else (inner, size)
        kind = shape, _dtype(values, meta), "int8"
        matrix = form.unpack_tensor(form.Packed(values, meta, scale, *kind))
        return x @ (matrix.T if transposed else matrix)
    arrays = values, meta, scale
    if transposed:
        weights = weights_of(size, inner, *arrays)
        function = _compiled().kwm_matmul_transposed
        return multiply(function, x.float(), weights, size).to(x.dtype)
    function, weights = product(x.dtype, inner, size, *arrays, rounded)
    return multiply(function, x, weights, size)


def product(x_dtype, k, n, values, meta, scale, rounded):
    """Return the library's function for a product.

    Args:
        x_dtype: The type of the activations.
        rounded: Bool, whether they are rounded to int8.
        k, n, values, meta, scale: As of `weights_of`.

    Returns:
        The function, and its arguments for the weights.
    """
    weights = weights_of(k, n, values, meta, scale)
    if not rounded and x_dtype is values.dtype is torch.bfloat16:
        # Their type is no argument.
        *_, values, meta, _ = weights
        return _compiled().kwm_matmul_bfloat16, (k, n, values, meta)
    if x_dtype is not torch.float32:
        raise checks.error("x", "float32", x_dtype)
    if not rounded:
        return _compiled().kwm_matmul, weights
    if values.dtype not in (torch.int8, torch.uint8):
        raise checks.error("values", "of int8 or uint8", values.dtype)
    return _compiled().kwm_matmul_int8, weights


def multiply(function, x, weights, size):
    """Return a product by a function of the library, of `size` columns."""
    x = x.contiguous()
    leading = x.shape[:-1]
    rows = math.prod(leading)
    y = x.new_empty((*leading, size))
    function(x.data_ptr(), rows, *weights, y.data_ptr(), *threads())
    return y


@torch.library.impl(_library, "sparse_values_gradient", "CPU")
def _values_gradient(x, dy, meta):
    k, n = x.shape[-1], dy.shape[-1]
    x, dy = x.float().contiguous(), dy.float().contiguous()
    rows = math.prod(x.shape[:-1])
    arrays = _arrays(k, n, "float32")
    _check("meta", meta, *arrays["meta"])
    dvalues = x.new_empty(arrays["values"][0])
    arguments = x.data_ptr(), dy.data_ptr(), rows, k, n, meta.data_ptr()
    _compiled().kwm_values_gradient(*arguments, dvalues.data_ptr(), *threads())
    return dvalues


@torch.library.impl(_library, "attend", "CPU")
def attend(q, k, v, mask, scale):
    """Call the operator itself, without torch's dispatch."""
    batch, places, key_heads, size = k.shape
    inner = (key_heads * size, size, 1)
    if k.stride() != v.stride() or k.stride()[1:] != inner:
        k, v = k.contiguous(), v.contiguous()
    q = q.contiguous()
    seen = None if mask is None else mask.contiguous()
    out = torch.empty_like(q)
    queries, heads = q.shape[1:3]
    native.library().kwm_attend(
        *(q.data_ptr(), k.data_ptr(), v.data_ptr(), k.stride(0)),
        None if seen is None else seen.data_ptr(),
        *(batch, queries, places, heads, key_heads, size, scale),
        out.data_ptr(),
        *threads(),
    )
    return out


@torch.library.register_fake("keras_weightmods::sparse_matmul")
def _fake_matmul(x, values, meta, scale, size, rounded=False, transposed=False):
    return x.new_empty((*x.shape[:-1], size))


@torch.library.register_fake("keras_weightmods::sparse_values_gradient")
def _fake_values_gradient(x, dy, meta):
    blocks, rows, columns = meta.shape
    return x.new_empty((blocks, 16 * rows, columns))


def _save(ctx, inputs, output):
    x, values, meta, scale, _, _, ctx.transposed = inputs
    ctx.inner = x.shape[-1]
    needs_x = ctx.needs_input_grad[1]
    ctx.save_for_backward(x if needs_x else None, values, meta, scale)


def _backward(ctx, dy):
    x, *weights = ctx.saved_tensors
    ops = torch.ops.keras_weightmods
    dx = dvalues = None
    if ctx.needs_input_grad[0]:
        back = not ctx.transposed
        dx = ops.sparse_matmul(dy, *weights, ctx.inner, False, back)
    if ctx.needs_input_grad[1]:
        values, meta, _ = weights
        if values.dtype is not torch.float32:
            raise ValueError(
                f"Only float32 values have gradients. Received: {values.dtype}"
            )
        pair = (dy, x) if ctx.transposed else (x, dy)
        dvalues = ops.sparse_values_gradient(*pair, meta)
    return dx, dvalues, None, None, None, None, None


torch.library.register_autograd(
    "keras_weightmods::sparse_matmul",
    _backward,
    setup_context=_save,
    lib=_library,
)


def _compiled():
    """Return the library; an exported model cannot do without it."""
    library = native.library()
    if library is None:
        raise RuntimeError(
            "A packed model needs the compiled kernels of keras_weightmods, "
            f"which are missing: {native.reason_unavailable()}"
        )
    return library


def weights_of(k, n, values, meta, scale):
    """Return the arguments of the library for the weights, checked.

    Without `meta` they are a dense matrix.
    """
    dtype, pattern = _dtype(values, meta), pattern_of(meta)
    given = {"values": values, "meta": meta, "scale": scale}
    for name, spec in _arrays(k, n, dtype, pattern).items():
        _check(name, given[name], *spec)
    pointers = [x if x is None else x.data_ptr() for x in given.values()]
    kind = native.TYPES[dtype] + native.MASKED * (pattern == "16:32")
    return k, n, kind, *pointers


def _dtype(values, meta):
    kind = _TYPES.get(values.dtype)
    if kind is None:
        raise checks.error("values", f"of {[*_TYPES]}", values.dtype)
    # The check of the arrays refuses values without these five axes.
    pattern = pattern_of(meta) if values.dim() == 5 else "2:4"
    return dtype_of(values, kind, pattern)


@functools.lru_cache(maxsize=1024)
def _arrays(k, n, dtype, pattern="2:4"):
    """`packed_arrays` with sizes and types of torch."""
    arrays = packed_arrays((k, n), dtype, pattern)
    return {
        name: (torch.Size(shape), getattr(torch, array_dtype))
        for name, (shape, array_dtype) in arrays.items()
    }


def _check(name, tensor, shape, dtype):
    # The library reads this much memory without a check.
    if (
        tensor is None
        or tensor.shape != shape
        or tensor.dtype != dtype
        or not tensor.is_cpu
        or not tensor.is_contiguous()
    ):
        received = tensor if tensor is None else (tensor.shape, tensor.dtype)
        expected = f"contiguous, on the CPU, of {shape} and {dtype}"
        raise checks.error(name, expected, received)


def threads():
    """Return the last two arguments of a function of the library.

    Returns:
        The function that shares the work, and a pointer to its pool; None for
        both with one thread. The library wakes none for little work.
    """
    count = torch.get_num_threads()
    return (None, None) if count == 1 else _openmp(count)


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
