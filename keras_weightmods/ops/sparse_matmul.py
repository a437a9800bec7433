"""The product of an activation and a packed kernel."""

from typing import Any

import keras
from keras import ops

from keras_weightmods import backend, native
from keras_weightmods.native.packed import check_packed, dense_matmul
from keras_weightmods.utils import checks


def sparse_matmul(x: Any, packed: Any) -> Any:
    """Multiplies by a packed kernel: `x @ unpack_kernel(packed)`.

    On a CPU, compiled kernels read only the packed weights, and use the threads
    of the backend. If they are missing, one warning says why, and each call
    unpacks the kernel, which is slow: unpack it once and for all then. The sums
    are in float32, whatever the type of `x`, and rounded to it once. If `x` and
    the values are bfloat16 and the processor has AVX512-BF16, products of 28
    rows and more are made two at a time. Each is exact, but values below
    2 ** -126 count as zero.

    With `packed.activations == "int8"`, each row of `x` is split into blocks of
    32 entries. A block is rounded to multiples of its s = max |x| / 127. The
    products are of integers, and each block's sum is exact. The error of an
    output is at most the sum over the blocks of s / 2 times their sum of |w|,
    so an outlier costs its own block alone. A block with NaN or infinity makes
    all outputs of its row that read the block NaN. On CPUs with AMX, calls of
    32 rows and more round `x` and the kernel to bfloat16 instead. The error is
    smaller on average, and at most twice as large. Kernels of pattern 16:32
    have compiled products for int8 activations alone. With others each call
    unpacks them.

    On an NVIDIA GPU, JAX and torch multiply by cuSPARSELt or dense. A trial on
    the card, once for each shape and type, finds which is faster for the number
    of rows. The kernel is rounded to the type of a 16-bit `x` there, as in a
    dense layer. int8 activations are multiplied dense. This has not yet been
    run on a GPU.

    Gradients flow to `x`, as if it was not rounded. They also flow to float32
    values, at the kept places: the pattern never changes.

    Args:
        x: Float tensor of shape (..., K).
        packed: `Packed` of a kernel of shape (K, N), see `pack_kernel`.

    Returns:
        Tensor of shape (..., N), in the type of `x`.

    Raises:
        ValueError: If `x` is not a float tensor, its last axis is not K, or
            `packed` is not `Packed`.

    Example:

    ```python
    import numpy as np
    from keras_weightmods.ops import pack_kernel, sparse_matmul

    packed = pack_kernel(np.array([[3.0], [0.0], [0.0], [-2.0]]))
    y = sparse_matmul(np.array([[1.0, 2.0, 3.0, 4.0]], "float32"), packed)
    assert float(y[0, 0]) == -5.0
    ```
    """
    check_packed(packed)
    if not ops.is_tensor(x):
        x = checks.check_tensor("x", x)
    dtype = keras.backend.standardize_dtype(x.dtype)
    if not keras.backend.is_float_dtype(dtype):
        raise ValueError(
            "`x` must be a float tensor, since the products are of float32. "
            f"Received: x of type {dtype}. Cast it: "
            "`keras.ops.cast(x, 'float32')`"
        )
    if len(x.shape) < 1 or x.shape[-1] != packed.shape[0]:
        raise ValueError(
            f"`x` must have {packed.shape[0]} entries in its last axis, the "
            f"contraction of the packed kernel of shape {packed.shape}. "
            f"Received: x of shape {tuple(x.shape)}"
        )
    if packed.pattern == "16:32" and packed.activations != "int8":
        return dense_matmul(x, packed)
    return _implementation()(x, packed)


def reason_for_dense() -> Any:
    """Says why products with packed kernels would be dense on this backend.

    Returns:
        String: the reason and the way out; empty if they will not be.

    Example:

    ```python
    from keras_weightmods.ops.sparse_matmul import reason_for_dense

    print(reason_for_dense() or "by compiled kernels")
    ```
    """
    return backend.current().products().reason_unavailable()


def gpu_plan(shape: Any, x_dtype: str, activations: str = "float32") -> Any:
    """How to multiply by a kernel on the GPU that the backend uses.

    Args:
        shape: Pair of ints (K, N), the shape of the kernel.
        x_dtype: String, type of the activations.
        activations: String, as of `Packed`. Defaults to `"float32"`.

    Returns:
        `keras_weightmods.native.gpu.trial.Plan`, whose `why(rows)` names the
        product for a number of rows and the times of the trial, which the
        first call for a shape and type runs on the card; None where the
        backend uses no NVIDIA GPU. Not yet run on a GPU.

    Example:

    ```python
    from keras_weightmods.ops.sparse_matmul import gpu_plan

    plan = gpu_plan((4096, 4096), "bfloat16")
    print("no GPU" if plan is None else plan.why(rows=1))
    ```
    """
    module = backend.current().gpu_products()
    if module is None or not module.has_gpu():
        return None
    kind = x_dtype if activations == "float32" else activations
    return module.plan(tuple(shape), kind)


# A dict and not a cached function, which torch.compile would look into.
_implementations: dict[str, Any] = {}


def _implementation() -> Any:
    """What multiplies on this backend, chosen in the first call."""
    name = keras.backend.backend()
    if name not in _implementations:
        _implementations[name] = backend.current().products().sparse_matmul
        if reason := reason_for_dense():
            native.warn_dense(reason)
            _implementations[name] = dense_matmul
    return _implementations[name]
