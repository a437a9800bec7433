"""`sparse_matmul` on NVIDIA GPUs under torch. Not yet run on a GPU.

Of three products the one that `native.gpu.dispatch` holds for the fastest, by
the kernel's shape, the types and the number of rows: a decode kernel that reads
the packed arrays, cuSPARSELt as torch has it, or dense.

The last two need the kernel in a form of their own, a companion of the packed
arrays. It is made at the first product and kept for as long as the packed
values live unchanged; it is never stored.

All of a product stays on the device of its arrays, which need not be Keras'.

With int8 activations each row is rounded to multiples of max |x| / 127, at any
number of rows and by any of the products; where none of them is known to gain,
in blocks as on a CPU. cuSPARSELt multiplies the integers, scales the columns in
its epilogue and gives bfloat16; one kernel then scales the rows.
"""

import ctypes
import functools
import math
import warnings

import keras
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from keras_weightmods import native
from keras_weightmods.native import gpu
from keras_weightmods.native.gpu import dispatch, first_contact
from keras_weightmods.native.layout import packed_arrays
from keras_weightmods.native.quantize import round_activations
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
    _check_weights(values, meta, scale, k, n)
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


def sparse_matmul_int8(x, values, meta, scale, n, method=None, algorithm=-1):
    """Run the operator of this name on a GPU, for a 2:4 kernel in int8.

    Args:
        x, values, meta, scale, n, method, algorithm: As of `sparse_matmul`.

    Returns:
        Tensor of shape (..., N), of the precision of bfloat16.
    """
    *leading, k = x.shape
    rows = math.prod(leading)
    weights = values, meta, scale
    _check_weights(*weights, k, n)
    if method is None:
        method, algorithm = _choose(rows, x, values, k, n, "int8")
    elif reason := reason_unavailable(method):
        raise RuntimeError(reason)
    if method == "blocks":
        kernel = _companions.get(weights, k, n, torch.float32, "dense")
        with keras.device(str(x.device)):
            x_rounded = round_activations(x.to(torch.float32))
        return (x_rounded @ kernel).to(x.dtype)
    matrix = x.reshape(rows, k)
    if method == "cusparselt":
        compressed = _companions.get(weights, k, n, torch.int8, method)
        y = _cusparselt_int8(matrix, compressed, scale, algorithm)
        return y.reshape(*leading, n)
    steps, scale_of_row = _rounded(matrix, rows)
    if method == "decode":
        # Integers of 8 bits are exact in bfloat16.
        y = _decode(steps.to(torch.bfloat16), *weights, n)
    else:
        # Below 1 in magnitude, or sums might leave the range of float16.
        units = (steps.to(torch.float32) / 128).to(x.dtype)
        y = units @ _companions.get(weights, k, n, x.dtype, "dense")
        scale_of_row = scale_of_row * 128
    return _scaled(y, scale_of_row, x.dtype).reshape(*leading, n)


def sparse_matmul_transposed(dy, values, meta, scale, k):
    """Run the operator of this name on a GPU, dense."""
    n = dy.shape[-1]
    _check_weights(values, meta, scale, k, n)
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
    """Return the `dispatch.Plan` for a kernel on the current GPU.

    It counts on cuSPARSELt where a product by it was tried and right; the
    first call for a shape and type tries it.
    """
    name = device_name()
    if name is None or value_dtype not in dispatch.VALUE_TYPES:
        kind = "int8" if activations == "int8" else x_dtype
        return dispatch.plan("torch", name, shape, kind, value_dtype)
    (k, n), index = shape, torch.cuda.current_device()
    kind = "int8" if activations == "int8" else getattr(torch, x_dtype)
    values = next(t for t, name in _VALUES.items() if name == value_dtype)
    return _plan_on(index, k, n, kind, values)


def unpack(values, meta, scale, k, n, dtype):
    """Return a packed kernel as a dense tensor (K, N), on its device.

    In int8 it is the packed integers, without their scales.
    """
    blocks, rows, _ = meta.shape
    kept = values
    if values.dtype is torch.uint8:
        # The words p and p + 2 of int8, in the halves of each byte.
        kept = kept.view(torch.int8)
        kept = torch.cat([kept << 4 >> 4, kept >> 4], dim=2)
        scale = scale.float().repeat_interleave(2, dim=1)[:, :rows]
    if kept.dtype is torch.int8:
        # Slot p + 4q is at [:, :, p, :, q].
        kept = kept.permute(0, 1, 4, 2, 3)
        if dtype is not torch.int8:
            kept = kept * scale.reshape(blocks, -1, 1, 1, 16)
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


@functools.lru_cache(maxsize=4096)
def _check_sizes(k, n, dtype, values, meta, scale):
    """Raise ValueError unless a packed kernel has arrays of these shapes.

    The decode kernel reads this much memory, whatever is there. Of a hot call
    it is one look-up in the cache.
    """
    if dtype not in _VALUES:
        raise checks.error(
            "values", "of float32, bfloat16, int8 or uint8 (int4)", dtype
        )
    arrays = packed_arrays((k, n), _VALUES[dtype])
    shapes = tuple(
        torch.Size(arrays[name][0]) if name in arrays else None
        for name in ("values", "meta", "scale")
    )
    if (values, meta, scale) != shapes:
        raise checks.error(
            "values, meta, scale",
            f"those of a packed kernel of shape {(k, n)}",
            (values, meta, scale),
        )


def _check_weights(values, meta, scale, k, n):
    shape = None if scale is None else scale.shape
    _check_sizes(k, n, values.dtype, values.shape, meta.shape, shape)


# Not cached functions: a CUDA graph that is being captured must not try.
_plans: dict[tuple, dispatch.Plan] = {}
_chosen: dict[tuple, tuple[str, int]] = {}
_MOST_CHOSEN = 2**14


def _choose(rows, x, values, k, n, kind=None):
    """Return the method and cuSPARSELt's algorithm.

    `kind` is `"int8"` where activations are rounded; `"blocks"` for a method
    then says that no product gains by whole rows.
    """
    index = _index_of(x)
    if index is None or rows == 0:
        return ("dense" if kind is None else "blocks"), -1
    about = index, k, n, kind or x.dtype, values.dtype
    known = _chosen.get((rows, about))
    if known is not None:
        return known
    if about not in _plans and _is_capturing():
        return "dense", -1
    found = _plan_on(*about)
    known = found.choose(rows, found.companions)
    if reason := reason_unavailable(known[0]):
        native.warn_dense(reason)
        known = "dense", -1
    if known[0] == "cusparselt":
        text = kind or _NAMES[x.dtype]
        card = _name_of(index), (k, n), rows, text
        first_contact.warn_published(found, *card)
    if kind is not None and not found.is_sparse:
        known = "blocks", -1
    if len(_chosen) == _MOST_CHOSEN:
        _chosen.clear()
    _chosen[rows, about] = known
    return known


def _index_of(x):
    """Return the ordinal of a tensor's GPU; None if it is on none."""
    return x.device.index if x.device.type == "cuda" else None


def _plan_on(index, k, n, kind, value_dtype):
    """`kind` is the type of the activations, `"int8"` for rounded ones."""
    key = index, k, n, kind, value_dtype
    if key not in _plans:
        name = _name_of(index)
        text = kind if kind == "int8" else _NAMES.get(kind)
        _plans[key] = first_contact.trusted(
            dispatch.plan("torch", name, (k, n), text, _VALUES[value_dtype]),
            name,
            (k, n),
            text,
            functools.partial(reason_unavailable, "cusparselt"),
            functools.partial(_try_cusparselt, index, kind),
        )
    return _plans[key]


def _try_cusparselt(index, kind, trial):
    """Return a `Trial`'s product by cuSPARSELt, and the dense one."""
    device = _device(index)
    x_dtype = torch.bfloat16 if kind == "int8" else kind
    with torch.no_grad():
        x = torch.from_numpy(trial.x).to(device, x_dtype)
        columns = torch.from_numpy(trial.columns).to(device)
        scale = torch.from_numpy(trial.scale).to(device)
        steps = torch.from_numpy(trial.steps).to(device)
        steps = steps.index_select(1, columns)
        kernel = steps.to(x_dtype) * scale.to(x_dtype)
        if kind == "int8":
            compressed = torch._cslt_compress(steps.T.contiguous())
            y = _cusparselt_int8(x, compressed, scale, trial.algorithm)
        else:
            compressed = torch._cslt_compress(kernel.T.contiguous())
            y = _cusparselt(x, compressed, trial.algorithm)
        # Sums of small numbers, and exact; not all in float32 at once.
        parts = [x.float() @ part.float() for part in kernel.split(4096, 1)]
        return y.float().cpu().numpy(), torch.cat(parts, 1).cpu().numpy()


def _device(index):
    return torch.device("cuda", index)


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


def _cusparselt_int8(x, compressed, scale, algorithm):
    rows = x.shape[0]
    steps, scale_of_row = _rounded(x, -(-rows // _ROWS) * _ROWS)
    y = torch._cslt_sparse_mm(
        compressed,
        steps.T,
        alpha=scale.reshape(-1),
        out_dtype=torch.bfloat16,
        transpose_result=True,
        alg_id=max(algorithm, 0),
    )
    return _scaled(y[:rows], scale_of_row, x.dtype)


def _scaled(y, scale_of_row, dtype):
    """`y * scale_of_row`, multiplied in float32, in one kernel."""
    return torch.mul(y, scale_of_row, out=y.new_empty(y.shape, dtype=dtype))


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


def _rounded(x, padded):
    """`round_rows`, with rows of zeros up to `padded`; by one kernel on a GPU.

    That takes rows of a multiple of four entries.
    """
    rows, k = x.shape
    if _index_of(x) is None or k % 4 or reason_unavailable("rounding"):
        steps, scale = round_rows(x)
        return torch.nn.functional.pad(steps, (0, 0, 0, padded - rows)), scale
    x = x.contiguous()
    if x.data_ptr() % 16:
        x = x.clone()
    steps = x.new_empty((padded, k), dtype=torch.int8)
    scale = x.new_empty((rows, 1), dtype=torch.float32)
    device = x.get_device()
    failure = gpu.library().kwm_gpu_round_rows(
        device,
        ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream),
        gpu.X_TYPES[_NAMES[x.dtype]],
        x.data_ptr(),
        rows,
        padded,
        k,
        steps.data_ptr(),
        scale.data_ptr(),
    )
    gpu.check(failure)
    return steps, scale


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
    """Return why a method, or `"rounding"`, cannot be used; else ""."""
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
    load = gpu.load_decode if method == "decode" else gpu.load_rounding
    return load(int(torch.version.cuda.split(".")[0]))
