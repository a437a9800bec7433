"""The operators of `sparse_matmul` on torch, by `torch.library`.

An exported program calls them by name. So this file imports no Keras, which
would load a backend, unless it must.
"""

import functools
import importlib
import math

import torch

from keras_weightmods import native
from keras_weightmods.backend.torch.threads import threads
from keras_weightmods.native.layout import packed_arrays
from keras_weightmods.utils import checks

_TYPES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.int8: "int8",
    torch.uint8: "int4",
}

_library = torch.library.Library("keras_weightmods", "DEF")
_library.define(
    "sparse_matmul("
    "Tensor x, Tensor values, Tensor meta, Tensor? scale, SymInt n) -> Tensor"
)
_library.define(
    "sparse_matmul_int8("
    "Tensor x, Tensor values, Tensor? meta, Tensor scale, SymInt n) -> Tensor"
)
_library.define(
    "sparse_matmul_transposed("
    "Tensor dy, Tensor values, Tensor? meta, Tensor? scale, SymInt k) -> Tensor"
)
_library.define(
    "sparse_values_gradient(Tensor x, Tensor dy, Tensor meta) -> Tensor"
)


def _on_gpu(name):
    """Return the operator on a GPU."""

    def run(*arguments):
        return getattr(_gpu_module(), name)(*arguments)

    return run


@functools.cache
def _gpu_module():
    module = "keras_weightmods.backend.torch.sparse_matmul_gpu"
    return importlib.import_module(module)


for _name in (
    "sparse_matmul",
    "sparse_matmul_int8",
    "sparse_matmul_transposed",
    "sparse_values_gradient",
):
    _library.impl(_name, _on_gpu(_name), "CUDA")


@torch.library.impl(_library, "sparse_matmul", "CPU")
def _matmul(x, values, meta, scale, n):
    k = x.shape[-1]
    if x.dtype is values.dtype is torch.bfloat16:
        weights = bfloat16_weights_of(k, n, values, meta)
        return _multiply("kwm_matmul_bfloat16", x, weights, n)
    _check_float32(x)
    weights = weights_of(k, n, values, meta, scale)
    return _multiply("kwm_matmul", x, weights, n)


@torch.library.impl(_library, "sparse_matmul_int8", "CPU")
def _matmul_int8(x, values, meta, scale, n):
    _check_float32(x)
    if values.dtype not in (torch.int8, torch.uint8):
        raise checks.error("values", "of int8 or uint8", values.dtype)
    is_dense = meta is None
    weights = weights_of(x.shape[-1], n, values, meta, scale, is_dense)
    return _multiply("kwm_matmul_int8", x, weights, n)


@torch.library.impl(_library, "sparse_matmul_transposed", "CPU")
def _matmul_transposed(dy, values, meta, scale, k):
    n = dy.shape[-1]
    if meta is None:
        form = importlib.import_module("keras_weightmods.native.packed")
        packed = form.Packed(
            values, None, scale, (k, n), _TYPES[values.dtype], "int8"
        )
        return dy @ form.unpack_tensor(packed).T
    if dy.dtype is values.dtype is torch.bfloat16:
        dx = _matmul_transposed(dy.float(), values, meta, scale, k)
        return dx.to(dy.dtype)
    _check_float32(dy)
    weights = weights_of(k, n, values, meta, scale)
    return _multiply("kwm_matmul_transposed", dy, weights, k)


def _multiply(name, x, weights, size):
    """Return a product by a function of the library, of `size` columns."""
    x = x.contiguous()
    *leading, inner = x.shape
    rows = math.prod(leading)
    y = x.new_empty((*leading, size))
    getattr(_compiled(), name)(
        x.data_ptr(),
        rows,
        *weights,
        y.data_ptr(),
        *threads(rows * inner * size),
    )
    return y


@torch.library.impl(_library, "sparse_values_gradient", "CPU")
def _values_gradient(x, dy, meta):
    k, n = x.shape[-1], dy.shape[-1]
    _check_float32(x)
    _check_float32(dy)
    x, dy = x.contiguous(), dy.contiguous()
    rows = math.prod(x.shape[:-1])
    if rows != math.prod(dy.shape[:-1]):
        raise ValueError(
            "`x` and `dy` must have as many rows. Received: shapes "
            f"{tuple(x.shape)} and {tuple(dy.shape)}"
        )
    arrays = _arrays(k, n, "float32")
    _check("meta", meta, *arrays["meta"])
    dvalues = x.new_empty(arrays["values"][0])
    arguments = x.data_ptr(), dy.data_ptr(), rows, k, n, meta.data_ptr()
    _compiled().kwm_values_gradient(
        *arguments, dvalues.data_ptr(), *threads(rows * k * n)
    )
    return dvalues


@torch.library.register_fake("keras_weightmods::sparse_matmul")
@torch.library.register_fake("keras_weightmods::sparse_matmul_int8")
@torch.library.register_fake("keras_weightmods::sparse_matmul_transposed")
def _fake_matmul(x, values, meta, scale, size):
    return x.new_empty((*x.shape[:-1], size))


@torch.library.register_fake("keras_weightmods::sparse_values_gradient")
def _fake_values_gradient(x, dy, meta):
    blocks, rows, columns = meta.shape
    return x.new_empty((blocks, 16 * rows, columns))


def _save(ctx, inputs, output):
    x, values, meta, scale, _ = inputs
    ctx.k = x.shape[-1]
    needs_x = ctx.needs_input_grad[1]
    ctx.save_for_backward(x if needs_x else None, values, meta, scale)


def _backward(ctx, dy):
    x, values, meta, scale = ctx.saved_tensors
    ops = torch.ops.keras_weightmods
    dx = dvalues = None
    if ctx.needs_input_grad[0]:
        dx = ops.sparse_matmul_transposed(dy, values, meta, scale, ctx.k)
    if ctx.needs_input_grad[1]:
        if values.dtype is not torch.float32:
            raise ValueError(
                f"Only float32 values have gradients. Received: {values.dtype}"
            )
        dvalues = ops.sparse_values_gradient(x, dy, meta)
    return dx, dvalues, None, None, None


for _name in ("sparse_matmul", "sparse_matmul_int8"):
    torch.library.register_autograd(
        f"keras_weightmods::{_name}",
        _backward,
        setup_context=_save,
        lib=_library,
    )


def _compiled():
    """Return the library; an exported model cannot do without it."""
    library = native.library()
    if library is None:
        raise RuntimeError(
            "The compiled kernels of keras_weightmods are missing, by which a "
            f"packed model multiplies: {native.reason_unavailable()}"
        )
    return library


def _check_float32(x):
    if x.dtype is not torch.float32:
        raise checks.error("x", "float32", x.dtype)


def weights_of(k, n, values, meta, scale, dense=False):
    """Return the arguments of the library for the weights, checked."""
    dtype = _TYPES.get(values.dtype)
    if dtype is None:
        raise checks.error("values", f"of {[*_TYPES]}", values.dtype)
    arrays = _arrays(k, n, dtype, dense)
    _check("values", values, *arrays["values"])
    if not dense:
        _check("meta", meta, *arrays["meta"])
    if "scale" in arrays:
        _check("scale", scale, *arrays["scale"])
    pointers = [
        None if x is None else x.data_ptr() for x in (values, meta, scale)
    ]
    return k, n, native.TYPES[dtype], *pointers


def bfloat16_weights_of(k, n, values, meta):
    """Return those of bfloat16 values, whose type is not an argument."""
    *_, values, meta, _ = weights_of(k, n, values, meta, None)
    return k, n, values, meta


@functools.lru_cache(maxsize=1024)
def _arrays(k, n, dtype, dense=False):
    """`packed_arrays` with sizes and types of torch."""
    arrays = packed_arrays((k, n), dtype, dense)
    return {
        name: (torch.Size(shape), getattr(torch, array_dtype))
        for name, (shape, array_dtype) in arrays.items()
    }


def _check(name, tensor, shape, dtype):
    # The library reads this much memory, whatever is there.
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
