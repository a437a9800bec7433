"""`sparse_matmul` on NVIDIA GPUs under torch. Not yet run on a GPU.

Of three products the one that `native.gpu.dispatch` holds for the fastest, by
the kernel's shape, the types and the number of rows: a decode kernel that reads
the packed arrays, cuSPARSELt as torch has it, or dense.

The last two need the kernel in a form of their own, a companion of the packed
arrays. It is made at the first product and kept for as long as the packed
values live unchanged; it is never stored.

All of a product stays on the device of its arrays, which need not be Keras'.
"""

import ctypes
import functools
import math
import warnings

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from keras_weightmods import native
from keras_weightmods.native import gpu
from keras_weightmods.native.gpu import dispatch
from keras_weightmods.native.layout import packed_arrays
from keras_weightmods.utils import checks

_NAMES = {getattr(torch, name): name for name in gpu.X_TYPES}
_VALUES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.int8: "int8",
    torch.uint8: "int4",
}
# cuSPARSELt wants this many rows, or a multiple.
_ROWS = 16


def sparse_matmul(x, values, meta, scale, n, method=None, algorithm=-1):
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
        algorithm: Int, of cuSPARSELt's, if `method` is given.

    Returns:
        Tensor of shape (..., N).
    """
    *leading, k = x.shape
    rows = math.prod(leading)
    _check_sizes(values, meta, scale, k, n)
    if method is None:
        method, algorithm = _choose(rows, x, values, k, n)
    elif reason := reason_unavailable(method):
        raise RuntimeError(reason)
    matrix = x.reshape(rows, k)
    weights = values, meta, scale
    if method == "decode":
        y = _decode(matrix, *weights, n)
    elif method == "cusparselt":
        compressed = _companions.get(weights, k, n, x.dtype, method)
        y = _cusparselt(matrix, compressed, algorithm)
    else:
        y = matrix @ _companions.get(weights, k, n, x.dtype, method)
    return y.reshape(*leading, n)


def sparse_matmul_transposed(dy, values, meta, scale, k):
    """Run the operator of this name on a GPU, dense."""
    n = dy.shape[-1]
    _check_sizes(values, meta, scale, k, n)
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


def plan(shape, x_dtype, value_dtype):
    """Return the `dispatch.Plan` for a kernel on the current GPU."""
    return dispatch.plan("torch", device_name(), shape, x_dtype, value_dtype)


def unpack(values, meta, scale, k, n, dtype):
    """Return a packed kernel as a dense tensor (K, N), on its device."""
    blocks, rows, _ = meta.shape
    kept = values
    if values.dtype is torch.uint8:
        # The words p and p + 2 of int8, in the halves of each byte.
        kept = kept.view(torch.int8)
        kept = torch.cat([kept << 4 >> 4, kept >> 4], dim=2)
        scale = scale.float().repeat_interleave(2, dim=1)[:, :rows]
    if kept.dtype is torch.int8:
        # Slot p + 4q is at [:, :, p, :, q].
        kept = kept.permute(0, 1, 4, 2, 3) * scale.reshape(blocks, -1, 1, 1, 16)
    elif values.dtype is torch.bfloat16:
        kept = kept.permute(0, 1, 3, 2)
    kept = kept.to(dtype).reshape(blocks, rows, 8, 2, 16)
    kernel = kept.new_zeros((blocks, rows, 8, 4, 16))
    kernel.scatter_(3, _places(meta), kept)
    kernel = kernel.permute(1, 2, 3, 0, 4).reshape(32 * rows, 16 * blocks)
    return kernel[:k, :n].contiguous()


def _places(meta):
    """Indices (column block, row block, group, kept value, column)."""
    blocks, rows, _ = meta.shape
    shifts = 2 * torch.arange(16, dtype=torch.int32, device=meta.device)
    places = meta.unsqueeze(2) >> shifts.reshape(-1, 1) & 3
    return places.reshape(blocks, rows, 8, 2, 16).long()


def _check_sizes(values, meta, scale, k, n):
    # The decode kernel reads this much memory, whatever is there.
    shapes = _shapes(k, n, values.dtype)
    if (values.shape, meta.shape, scale is None or scale.shape) != shapes:
        raise checks.error(
            "values, meta, scale",
            f"those of a packed kernel of shape {(k, n)}",
            (values.shape, meta.shape, scale is None or scale.shape),
        )


@functools.lru_cache(maxsize=1024)
def _shapes(k, n, dtype):
    if dtype not in _VALUES:
        raise checks.error(
            "values", "of float32, bfloat16, int8 or uint8 (int4)", dtype
        )
    arrays = packed_arrays((k, n), _VALUES[dtype])
    scale = torch.Size(arrays["scale"][0]) if "scale" in arrays else True
    return *(torch.Size(arrays[name][0]) for name in ("values", "meta")), scale


def _choose(rows, x, values, k, n):
    """Return the method and cuSPARSELt's algorithm."""
    if x.device.type != "cuda" or rows == 0:
        return "dense", -1
    chosen = _plan_on(x.device.index, k, n, x.dtype, values.dtype)
    method, algorithm = chosen.choose(rows, chosen.companions)
    if reason := reason_unavailable(method):
        native.warn_dense(reason)
        return "dense", -1
    return method, algorithm


@functools.lru_cache(maxsize=1024)
def _plan_on(index, k, n, x_dtype, value_dtype):
    types = _NAMES.get(x_dtype), _VALUES[value_dtype]
    return dispatch.plan("torch", _name_of(index), (k, n), *types)


def _decode(x, values, meta, scale, n):
    x = x.contiguous()
    values, meta = values.contiguous(), meta.contiguous()
    scale = None if scale is None else scale.contiguous()
    y = x.new_empty((x.shape[0], n))
    device = x.get_device()
    failure = gpu.library().kwm_gpu_decode(
        device,
        ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream),
        gpu.X_TYPES[_NAMES[x.dtype]],
        native.type_code(_VALUES[values.dtype]),
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


def _cusparselt(x, compressed, algorithm):
    rows = x.shape[0]
    x = torch.nn.functional.pad(x, (0, 0, 0, -rows % _ROWS))
    y = torch._cslt_sparse_mm(
        compressed, x.T, transpose_result=True, alg_id=max(algorithm, 0)
    )
    return y[:rows]


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
        values, meta, scale = weights
        with torch.no_grad():
            kernel = unpack(values, meta, scale, k, n, dtype)
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
    return _name_of(torch.cuda.current_device())


@functools.cache
def _name_of(index):
    return torch.cuda.get_device_name(index)


@functools.cache
def reason_unavailable(method):
    """Return why a method cannot be used; empty if it can."""
    if method == "dense":
        return ""
    if not torch.cuda.is_available():
        return "torch finds no NVIDIA GPU."
    if method == "cusparselt":
        if torch.backends.cusparselt.is_available():
            return ""
        return (
            f"torch {torch.__version__} was built without cuSPARSELt. Those of "
            "https://pytorch.org for CUDA 12 and 13 on Linux have it."
        )
    if torch.version.cuda is None:
        return "this torch is not built for NVIDIA GPUs."
    return gpu.load_decode(int(torch.version.cuda.split(".")[0]))
