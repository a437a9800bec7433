"""`sparse_matmul` on NVIDIA GPUs under torch. Not yet run on a GPU.

Of three products the one that was measured to be the fastest for the kernel's
shape, the types and the number of rows: a decode kernel that reads the packed
arrays, torch's own semi-structured tensors, or dense.

The last two need the kernel in a form of their own, a companion of the packed
arrays. It is made at the first product and kept for as long as the packed
values live unchanged; it is never stored.
"""

import ctypes
import functools
import math

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from keras_weightmods import native
from keras_weightmods.native import gpu
from keras_weightmods.native.gpu import dispatch
from keras_weightmods.native.packed import Packed, unpack_tensor

_NAMES = {getattr(torch, name): name for name in gpu.X_TYPES}


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
        method: String, one of `dispatch.METHODS`, to measure and to test.
            Defaults to the fastest.

    Returns:
        Tensor of shape (..., N).
    """
    k = x.shape[-1]
    packed = Packed(values, meta, scale, (k, n), _NAMES[values.dtype])
    rows = math.prod(x.shape[:-1])
    if method is None:
        method = _choose(rows, x, packed)
    matrix = x.reshape(rows, k)
    if method == "decode":
        y = _decode(matrix, packed)
    else:
        kernel = _companions.get(packed, x.dtype, method)
        if method == "cusparselt":
            y = torch.nn.functional.linear(matrix, kernel)
        else:
            y = matrix @ kernel
    return y.reshape(*x.shape[:-1], n)


def sparse_matmul_transposed(dy, values, meta, scale, k):
    """Run the operator of this name on a GPU, dense."""
    shape = k, dy.shape[-1]
    packed = Packed(values, meta, scale, shape, _NAMES[values.dtype])
    return dy @ _companions.get(packed, dy.dtype, "dense").T


def sparse_values_gradient(x, dy, meta):
    """Run the operator of this name on a GPU, dense."""
    k, n = x.shape[-1], dy.shape[-1]
    blocks, rows, _ = meta.shape
    kernel = x.reshape(-1, k).T @ dy.reshape(-1, n)
    kernel = torch.nn.functional.pad(
        kernel, (0, 16 * blocks - n, 0, 32 * rows - k)
    )
    # (column block, row block, group, kept value, place in the group, column)
    kernel = kernel.reshape(rows, 8, 1, 4, blocks, 16)
    kernel = kernel.permute(4, 0, 1, 2, 3, 5).expand(-1, -1, -1, 2, -1, -1)
    shifts = 2 * torch.arange(16, dtype=torch.int32, device=meta.device)
    places = meta.unsqueeze(2) >> shifts.reshape(-1, 1) & 3
    places = places.reshape(blocks, rows, 8, 2, 1, 16).long()
    return kernel.gather(4, places).reshape(blocks, 16 * rows, 16)


def plan(shape, x_dtype, value_dtype):
    """Return the `dispatch.Plan` for a kernel on the current GPU."""
    return dispatch.plan("torch", device_name(), shape, x_dtype, value_dtype)


def _choose(rows, x, packed):
    if x.device.type != "cuda" or rows == 0 or 0 in packed.shape:
        return "dense"
    chosen = plan(packed.shape, _NAMES.get(x.dtype), packed.dtype)
    method, _ = chosen.choose(rows, chosen.companion)
    reason = reason_unavailable(method)
    if reason:
        native.warn_dense(reason)
        return "dense"
    return method


def _decode(x, packed):
    n = packed.shape[1]
    x = x.contiguous()
    values, meta = packed.values.contiguous(), packed.meta.contiguous()
    scale = None if packed.scale is None else packed.scale.contiguous()
    y = x.new_empty((x.shape[0], n))
    device = x.device.index
    failure = gpu.library().kwm_gpu_decode(
        device,
        ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream),
        gpu.X_TYPES[_NAMES[x.dtype]],
        native.type_code(packed.dtype),
        x.data_ptr(),
        *x.shape,
        n,
        values.data_ptr(),
        meta.data_ptr(),
        None if scale is None else scale.data_ptr(),
        y.data_ptr(),
    )
    gpu.check(failure)
    return y


class _Companions:
    """Kernels made from packed arrays, as long as these live unchanged."""

    def __init__(self):
        self._kept = {}

    def get(self, packed, dtype, method):
        """The kernel for `matrix @ kernel`, or semi-structured for `linear`."""
        arrays = packed.values, packed.meta
        key = (*(a.data_ptr() for a in arrays), packed.shape, dtype, method)
        versions = [_version(a) for a in arrays]
        if key in self._kept:
            kernel, storages, made_from = self._kept[key]
            if made_from == versions and not _expired(storages):
                return kernel
        for old in [k for k, kept in self._kept.items() if _expired(kept[1])]:
            del self._kept[old]
        with torch.no_grad():
            kernel = unpack_tensor(packed).to(dtype)
            if method == "cusparselt":
                kernel = kernel.T.contiguous()
                kernel = torch.sparse.to_sparse_semi_structured(kernel)
        storages = [StorageWeakRef(a.untyped_storage()) for a in arrays]
        self._kept[key] = kernel, storages, versions
        return kernel


_companions = _Companions()


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
def reason_unavailable(method):
    """Return why a method cannot be used; empty if it can."""
    if method == "dense":
        return ""
    if not torch.cuda.is_available():
        return "torch finds no NVIDIA GPU."
    if method == "cusparselt":
        if hasattr(torch.sparse, "to_sparse_semi_structured"):
            return ""
        return f"torch {torch.__version__} has no semi-structured tensors."
    if torch.version.cuda is None:
        return "this torch is not built for NVIDIA GPUs."
    return gpu.load_decode(int(torch.version.cuda.split(".")[0]))
