"""The product of an activation and a packed 2:4 kernel."""

import importlib
from typing import Any

import keras
from keras import ops

from keras_weightmods.ops import native
from keras_weightmods.ops.packed import unpack_tensor


def sparse_matmul(x, packed):
    """Multiplies by a packed 2:4 kernel: `x @ unpack_kernel(packed)`.

    On a CPU by compiled kernels, which read the packed weights alone, with
    the threads of the backend. Where they are missing, one warning says why,
    and the kernel is unpacked in each call, which is slow: then unpack it
    once and for all. The computation is in float32, whatever the type of `x`.

    Gradients flow to `x`, and to the values if these are float32 (at the kept
    places: the pattern never changes).

    Args:
        x: Float tensor of shape (..., K).
        packed: `Packed` of a kernel of shape (K, N), see `pack_kernel`.

    Returns:
        Tensor of shape (..., N), in the type of `x`.

    Raises:
        ValueError: If the last axis of `x` is not K.

    Example:

    ```python
    import numpy as np
    from keras_weightmods.ops import pack_kernel, sparse_matmul

    packed = pack_kernel(np.array([[3.0], [0.0], [0.0], [-2.0]]))
    y = sparse_matmul(np.array([[1.0, 2.0, 3.0, 4.0]], "float32"), packed)
    assert float(y[0, 0]) == -5.0
    ```
    """
    x = ops.convert_to_tensor(x)
    if len(x.shape) < 1 or x.shape[-1] != packed.shape[0]:
        raise ValueError(
            f"`x` must have {packed.shape[0]} entries in its last axis, the "
            f"contraction of the packed kernel of shape {packed.shape}. "
            f"Received: x of shape {tuple(x.shape)}"
        )
    return _implementation()(x, packed)


def dense_matmul(x, packed):
    """`sparse_matmul` by a kernel that is unpacked in this call."""
    y = ops.matmul(ops.cast(x, "float32"), unpack_tensor(packed))
    return ops.cast(y, x.dtype)


# A dict and not a cached function, which torch.compile would look into.
_implementations: dict[str, Any] = {}


def _implementation():
    """What multiplies on this backend, chosen in the first call."""
    backend = keras.backend.backend()
    if backend not in _implementations:
        _implementations[backend] = _choose(backend)
    return _implementations[backend]


def _choose(backend):
    if not native.is_available():
        native.warn_dense(native.why_not())
        return dense_matmul
    module = importlib.import_module(
        f"keras_weightmods.backend.{backend}.sparse_matmul"
    )
    reason = module.why_not()
    if reason:
        native.warn_dense(reason)
        return dense_matmul
    return module.sparse_matmul
