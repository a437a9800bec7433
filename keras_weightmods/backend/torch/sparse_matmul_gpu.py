"""`sparse_matmul` on NVIDIA GPUs under torch. Not yet run on a GPU.

By cuSPARSELt, as torch has it, or dense: whichever a trial on the card found
faster for the number of rows (`native.gpu.trial`). Both need the kernel in a
form of their own, a companion of the packed arrays. It is made at the first
product and kept for as long as the packed values live unchanged; it is never
stored.

All of a product stays on the device of its arrays, which need not be Keras'.

With int8 activations each row is rounded to multiples of max |x| / 127, at any
number of rows and by either product; cuSPARSELt multiplies the integers, scales
the columns in its epilogue and gives bfloat16. Where cuSPARSELt is never
faster, activations are rounded in blocks as on a CPU.
"""

import functools
import math
import warnings

import keras
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from keras_weightmods import native
from keras_weightmods.native.gpu import trial as trials
from keras_weightmods.native.layout import VALUE_TYPES, packed_arrays
from keras_weightmods.native.packed import Packed, unpack_tensor
from keras_weightmods.native.quantize import round_activations

_VALUES = {
    getattr(torch, packed_arrays((1, 1), name)["values"][1]): name
    for name in VALUE_TYPES
}
# cuSPARSELt wants this many rows, or a multiple.
_ROWS = 16


def sparse_matmul(x, values, meta, scale, n, method=None):
    """Run the operator of this name on a GPU; see `keras_weightmods.ops`.

    float32 activations are multiplied in float32. 16-bit ones are multiplied
    by the kernel rounded to their type, with sums in float32, as a dense layer
    of that type does.

    Args:
        x: Tensor of shape (..., K).
        values: Tensor of the packed values.
        meta: Tensor of their places.
        scale: Tensor of their scales, or None.
        n: Int, columns of the kernel.
        method: String, `"dense"` or `"cusparselt"`, to measure and to test.
            Defaults to the plan's.

    Returns:
        Tensor of shape (..., N).
    """
    *leading, k = x.shape
    matrix = x.reshape(math.prod(leading), k)
    method = method or _choose(matrix, n, x.dtype, values.dtype)
    weight = _companions.get((values, meta, scale), k, n, x.dtype, method)
    y = (
        _cusparselt(matrix, weight)
        if method == "cusparselt"
        else matrix @ weight
    )
    return y.reshape(*leading, n)


def sparse_matmul_int8(x, values, meta, scale, n, method=None):
    """Run the operator of this name on a GPU, for a 2:4 kernel in int8.

    Args:
        x, values, meta, scale, n: As in `sparse_matmul`.
        method: As in `sparse_matmul`, or `"blocks"`.

    Returns:
        Tensor of shape (..., N), of the precision of bfloat16.
    """
    *leading, k = x.shape
    matrix = x.reshape(math.prod(leading), k)
    weights = values, meta, scale
    method = method or _choose(matrix, n, "int8", values.dtype)
    if method == "blocks":
        kernel = _companions.get(weights, k, n, torch.float32, "dense")
        with keras.device(str(x.device)):
            y = round_activations(matrix.to(torch.float32)) @ kernel
        return y.to(x.dtype).reshape(*leading, n)
    steps, scale_of_row = round_rows(matrix)
    if method == "cusparselt":
        compressed = _companions.get(weights, k, n, torch.int8, method)
        y = _cusparselt_int8(steps, compressed, scale)
    else:
        # Below 1 in magnitude, or sums might leave the range of float16.
        units = (steps.to(torch.float32) / 128).to(x.dtype)
        y = units @ _companions.get(weights, k, n, x.dtype, "dense")
        scale_of_row = scale_of_row * 128
    return (y * scale_of_row).to(x.dtype).reshape(*leading, n)


def sparse_matmul_transposed(dy, values, meta, scale, k):
    """Run the operator of this name on a GPU, dense."""
    n = dy.shape[-1]
    weights = values, meta, scale
    return dy @ _companions.get(weights, k, n, dy.dtype, "dense").T


def sparse_values_gradient(x, dy, meta):
    """Run the operator of this name on a GPU, dense."""
    k, n = x.shape[-1], dy.shape[-1]
    blocks, rows, _ = meta.shape
    kernel = x.reshape(-1, k).T @ dy.reshape(-1, n)
    kernel = torch.nn.functional.pad(
        kernel, (0, 16 * blocks - n, 0, 32 * rows - k)
    )
    # (column block, row block, group, place in the group, column)
    kernel = kernel.reshape(rows, 8, 4, blocks, 16).permute(3, 0, 1, 2, 4)
    return kernel.gather(3, _places(meta)).reshape(blocks, 16 * rows, 16)


def plan(shape, x_dtype, value_dtype, activations="float32"):
    """Return the `trial.Plan` for a kernel on the current GPU.

    The first call for a shape and type tries both products.
    """
    kind = "int8" if activations == "int8" else getattr(torch, x_dtype)
    k, n = shape
    return _plan_on(torch.cuda.current_device(), k, n, kind, value_dtype)


def _unpacked(weights, k, n, dtype):
    """Return a packed kernel as a dense tensor (K, N), on its device.

    In int8 it is the packed integers, without their scales.
    """
    values, meta, scale = weights
    if dtype is torch.int8:
        scale = torch.ones_like(scale)
    packed = Packed(values, meta, scale, (k, n), _VALUES[values.dtype])
    # Keras' functions would move all to its default device.
    with keras.device(str(values.device)):
        return unpack_tensor(packed).to(dtype).contiguous()


def _places(meta):
    """Indices (column block, row block, group, kept value, column)."""
    blocks, rows, _ = meta.shape
    shifts = 2 * torch.arange(16, dtype=torch.int32, device=meta.device)
    places = meta.unsqueeze(2) >> shifts.reshape(-1, 1) & 3
    return places.reshape(blocks, rows, 8, 2, 16).long()


# Not a cached function: a CUDA graph that is being captured must not try.
_plans: dict[tuple, trials.Plan] = {}


def _choose(matrix, n, kind, value_dtype):
    """Return the product to take; `"blocks"` where rounded rows gain nothing.

    `kind` is the type of the activations, `"int8"` for rounded ones.
    """
    rows, k = matrix.shape
    plain = "blocks" if kind == "int8" else "dense"
    index = _index_of(matrix)
    if index is None or rows == 0:
        return plain
    about = index, k, n, kind, _VALUES[value_dtype]
    if about not in _plans and _is_capturing():
        return plain
    found = _plan_on(*about)
    return found.method(rows) if found.is_sparse else plain


def _index_of(matrix):
    """Return the ordinal of a tensor's GPU; None if it is on none."""
    return matrix.device.index if matrix.device.type == "cuda" else None


def _device(index):
    return torch.device("cuda", index)


def _plan_on(index, k, n, kind, value_dtype):
    key = index, k, n, kind, value_dtype
    if key not in _plans:
        name = str(kind).removeprefix("torch.")
        reason = trials.reason_for_dense((k, n), name, value_dtype)
        if not reason:
            reason = reason_unavailable()
            if reason:
                native.warn_dense(reason)
        _plans[key] = (
            trials.Plan((), reason) if reason else _try(index, (k, n), kind)
        )
    return _plans[key]


def _try(index, shape, kind):
    device = _device(index)
    x_dtype = torch.bfloat16 if kind == "int8" else kind
    with torch.no_grad():
        arrays = trials.sample(max(trials.ROWS), shape)
        x, steps, scale = (torch.from_numpy(a).to(device) for a in arrays)
        kernel = steps.to(x_dtype) * scale.to(x_dtype)
        compressed = steps if kind == "int8" else kernel
        compressed = torch._cslt_compress(compressed.T.contiguous())

        def sparse(x, weight):
            if kind != "int8":
                return _cusparselt(x, weight)
            rounded, scale_of_row = round_rows(x)
            y = _cusparselt_int8(rounded, weight, scale)
            return (y * scale_of_row).to(x_dtype)

        def product(multiply, weight):
            size = weight.numel() * weight.element_size()
            return trials.Product(
                multiply,
                [weight]
                + [weight.clone() for _ in range(trials.copies(size) - 1)],
            )

        return trials.trial(
            lambda rows: x[:rows].to(x_dtype),
            product(torch.matmul, kernel),
            product(sparse, compressed),
            trials.seconds_by(lambda _: torch.cuda.synchronize(device)),
            trials.ROWS,
        )


def _cusparselt(x, compressed, **options):
    rows = x.shape[0]
    x = torch.nn.functional.pad(x, (0, 0, 0, -rows % _ROWS))
    y = torch._cslt_sparse_mm(compressed, x.T, transpose_result=True, **options)
    return y[:rows]


def _cusparselt_int8(steps, compressed, scale):
    alpha = scale.reshape(-1)
    return _cusparselt(steps, compressed, alpha=alpha, out_dtype=torch.bfloat16)


def round_rows(x):
    """Round each row to int8: `x` is about `steps * scale`.

    Args:
        x: Float tensor of shape (rows, K).

    Returns:
        Pair of an int8 tensor (rows, K), -127 to 127, and a float32 tensor
        (rows, 1), the scales max |x| / 127. A row that holds NaN or infinity
        gets zeros and NaN.
    """
    x = x.to(torch.float32)
    largest = x.abs().amax(1, keepdim=True)
    scale = largest / 127
    scale = scale.where(scale >= torch.finfo(torch.float32).tiny, 1.0)
    is_finite = largest.isfinite()
    steps = (x / scale).round().where(is_finite, 0.0).to(torch.int8)
    return steps, scale.where(is_finite, float("nan"))


class _Companions:
    """Kernels made from packed arrays, as long as these live unchanged."""

    def __init__(self):
        self._kept = {}

    def get(self, weights, k, n, dtype, method):
        """The kernel for `matrix @ kernel`, or compressed by cuSPARSELt."""
        arrays = [array for array in weights if array is not None]
        key = (*(a.data_ptr() for a in arrays), k, n, dtype, method)
        versions = [_version(a) for a in arrays]
        if key in self._kept:
            kernel, storages, made_from = self._kept[key]
            if made_from == versions and not _expired(storages):
                return kernel
        for old in [k for k, kept in self._kept.items() if _expired(kept[1])]:
            del self._kept[old]
        with torch.no_grad():
            kernel = _unpacked(weights, k, n, dtype)
            if method == "cusparselt":
                kernel = torch._cslt_compress(kernel.T.contiguous())
        if _is_capturing():
            # In the graph's own memory, and empty until the graph is replayed.
            warnings.warn(
                "A CUDA graph is captured that prepares a packed kernel anew "
                "in each replay, which is correct but slow. Call the model "
                "once before the capture."
            )
            return kernel
        storages = [StorageWeakRef(a.untyped_storage()) for a in arrays]
        self._kept[key] = kernel, storages, versions
        return kernel


_companions = _Companions()


def _is_capturing():
    """Return whether work is recorded into a CUDA graph."""
    # Asking makes a context, where there is none yet.
    return torch.cuda.is_initialized() and (
        torch.cuda.is_current_stream_capturing()
    )


def _expired(storages):
    return any(storage.expired() for storage in storages)


def _version(tensor):
    # An inference tensor counts no changes.
    return 0 if tensor.is_inference() else tensor._version


def device_name():
    """Return the name of the current GPU; None where torch has none."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_name()


@functools.cache
def reason_unavailable():
    """Return why cuSPARSELt cannot be used; empty if it can."""
    if not torch.cuda.is_available():
        return "torch finds no NVIDIA GPU."
    if torch.backends.cusparselt.is_available():
        return ""
    return (
        f"torch {torch.__version__} was built without cuSPARSELt. Those of "
        "https://pytorch.org for CUDA 12 and 13 on Linux have it."
    )
