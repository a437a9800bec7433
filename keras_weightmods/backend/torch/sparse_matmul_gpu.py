"""`sparse_matmul` on NVIDIA GPUs under torch. Not yet run on a GPU.

Products use torch's cuSPARSELt or are dense, whichever a trial on the card
found faster for the number of rows (`native.gpu.trial`). Both need the kernel
in a form of their own, a companion of the packed arrays. It is made at the
first product, kept while the packed values live unchanged, and never stored.
int8 activations are rounded as on a CPU, and multiplied dense.

A product stays on the device of its arrays, which need not be Keras'.
"""

import functools
import math
import warnings

import keras
import torch
from torch.utils.weak import WeakIdKeyDictionary

from keras_weightmods.native.gpu import trial as trials
from keras_weightmods.native.packed import Packed, unpack_tensor

# No cached functions: a CUDA graph in capture must not run a trial, and its
# results must not be kept.
_plans: dict[tuple, trials.Plan] = {}
# {packed values: {type and product: kernel, what it was made from}}.
_companions = WeakIdKeyDictionary()


def sparse_matmul(
    x, values, meta, scale, size, rounded=False, transposed=False, method=None
):
    """Run the operator of this name on a GPU; see `keras_weightmods.ops`.

    float32 activations are multiplied in float32. 16-bit ones are multiplied
    by the kernel rounded to their type, with sums in float32, as a dense layer
    of that type does.

    Args:
        x: Tensor of shape (..., K).
        values: Tensor of the packed values.
        meta: Tensor of their places.
        scale: Tensor of their scales, or None.
        size: Int, columns of the kernel, or of its transpose.
        rounded: Bool, False.
        transposed: Bool, whether to multiply by the transpose, dense.
        method: String, `"dense"` or `"cusparselt"`, to measure and to test.
            Defaults to the plan's.

    Returns:
        Tensor of shape (..., size).
    """
    *leading, inner = x.shape
    weights = values, meta, scale
    if transposed:
        return x @ _companion(weights, size, inner, x.dtype, "dense").T
    matrix = x.reshape(math.prod(leading), inner)
    method = method or _choose(matrix, size)
    kernel = _companion(weights, inner, size, x.dtype, method)
    multiply = _cusparselt if method == "cusparselt" else torch.matmul
    return multiply(matrix, kernel).reshape(*leading, size)


def plan(shape, kind, device=None):
    """Return the `trial.Plan` for a kernel on a GPU, the current by default.

    The first call for a shape and a type of activations tries both products.
    """
    device = device or torch.device("cuda", torch.cuda.current_device())
    key = device, shape, kind
    if key not in _plans:
        attempt = functools.partial(_try, *key)
        _plans[key] = trials.plan(shape, kind, reason_unavailable, attempt)
    return _plans[key]


def _choose(matrix, n):
    """Return the product to take."""
    rows, k = matrix.shape
    key = device, shape, kind = matrix.device, (k, n), _name_of(matrix.dtype)
    if key not in _plans and _is_capturing():
        return "dense"
    return plan(shape, kind, device).method(rows)


def _name_of(dtype):
    return str(dtype).removeprefix("torch.")


@torch.no_grad()
def _try(device, shape, kind):
    x, kernel = (
        torch.from_numpy(array).to(device, getattr(torch, kind))
        for array in trials.sample(max(trials.ROWS), shape)
    )
    return trials.trial(
        x,
        (torch.matmul, kernel),
        (_cusparselt, torch._cslt_compress(kernel.T.contiguous())),
        lambda _: torch.cuda.synchronize(device),
    )


def _cusparselt(x, compressed):
    rows = x.shape[0]
    x = torch.nn.functional.pad(x, (0, 0, 0, -rows % trials.MULTIPLE))
    y = torch._cslt_sparse_mm(compressed, x.T, transpose_result=True)
    return y[:rows]


@torch.no_grad()
def _companion(weights, k, n, dtype, method):
    """Return the kernel for `matrix @ kernel`, dense or compressed."""
    values, meta, scale = weights
    arrays = [array for array in weights if array is not None]
    # An inference tensor counts no changes.
    versions = [
        (a.data_ptr(), 0 if a.is_inference() else a._version) for a in arrays
    ]
    made = _companions.setdefault(values, {})
    kernel, made_from = made.get((dtype, method), (None, None))
    if made_from == versions:
        return kernel
    # int4 values are two in a byte.
    name = _name_of(values.dtype).replace("uint8", "int4")
    packed = Packed(values, meta, scale, (k, n), name)
    # Keras' functions would move all to its default device.
    with keras.device(str(values.device)):
        kernel = unpack_tensor(packed).to(dtype).contiguous()
    if method == "cusparselt":
        kernel = torch._cslt_compress(kernel.T.contiguous())
    if _is_capturing():
        # It is in the graph's own memory, and empty until the graph is
        # replayed.
        warnings.warn(
            "A CUDA graph is captured that prepares a packed kernel anew in "
            "each replay, which is correct but slow. Call the model once "
            "before the capture."
        )
    else:
        made[dtype, method] = kernel, versions
    return kernel


def _is_capturing():
    """Return whether work is recorded into a CUDA graph."""
    # Asking would make a context if there is none yet.
    return torch.cuda.is_initialized() and (
        torch.cuda.is_current_stream_capturing()
    )


def has_gpu():
    """Return whether torch has an NVIDIA GPU."""
    return torch.cuda.is_available()


@functools.cache
def reason_unavailable():
    """Return why cuSPARSELt cannot be used; empty if it can."""
    if not has_gpu():
        return "torch finds no NVIDIA GPU."
    if torch.backends.cusparselt.is_available():
        return ""
    return (
        f"torch {torch.__version__} was built without cuSPARSELt. Those of "
        "https://pytorch.org for CUDA 12 and 13 on Linux have it."
    )
