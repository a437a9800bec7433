"""`sparse_matmul` on torch: operators of `torch.library`.

Eager and under `torch.compile`, with gradients. On a CPU the threads are
torch's own, as many as `torch.get_num_threads()`; one for small products.
"""

import ctypes

import keras
import torch

from keras_weightmods import native
from keras_weightmods.backend.torch import operators
from keras_weightmods.native.packed import dense_matmul


def reason_unavailable():
    """Return why the compiled kernels cannot be used; empty if they can."""
    return "" if torch.cuda.is_available() else native.reason_unavailable()


def sparse_matmul(x, packed):
    """See `keras_weightmods.ops.sparse_matmul`."""
    device, rounded = x.device.type, packed.activations == "int8"
    values, meta, scale = map(
        _tensor, (packed.values, packed.meta, packed.scale)
    )
    if device == "cuda":
        # Gradients of the values are those of unpacking.
        is_dense = rounded or values.requires_grad
    else:
        is_dense = device != "meta" and not (
            device == "cpu" and native.is_available()
        )
    if is_dense:
        # Keras' functions would move everything to its default device.
        with keras.device(str(x.device)):
            return dense_matmul(x, packed)
    weights = values, meta, scale, packed.shape[1], rounded
    multiply = torch.ops.keras_weightmods.sparse_matmul
    is_bfloat16 = x.dtype is torch.bfloat16 and packed.dtype == "bfloat16"
    if device == "cuda" or x.dtype is torch.float32 or is_bfloat16:
        return multiply(x, *weights)
    return multiply(x.to(torch.float32), *weights).to(x.dtype)


def prepared(dtype, k, values, meta, scale, n):
    """Return the product with one kernel, without torch's dispatch.

    Args:
        dtype: The type of the activations, one that the operator takes.
        k: Int, the last axis of the activations.
        values, meta, scale: Tensors, checked here and held, or None.
        n: Int, the last axis of the result.

    Returns:
        Function of a tensor of shape (..., k). No gradients.
    """
    held = values, meta, scale
    function, weights = operators.product(dtype, k, n, *held, rounded=False)
    return lambda x, held=held: operators.multiply(function, x, weights, n)


def prepared_int8(k, kernels):
    """Return the products of one input with several kernels, in one call.

    With int8 activations, the input is rounded once.

    Args:
        k: Int, the last axis of the activations.
        kernels: List of (values, meta, scale, n), as of `prepared`; 2:4 ones
            of one type, and not beside others.

    Returns:
        Function of a float32 tensor of shape (..., k) to a list of tensors.
    """
    function = native.library().kwm_matmul_int8_many
    sizes = [n for *_, n in kernels]
    items = []
    for *arrays, n in kernels:
        _, _, dtype, *pointers = operators.weights_of(k, n, *arrays)
        items.append(native.Product(n, dtype, *pointers))
    template = (native.Product * len(items))(*items)

    def products(x, _held=kernels):
        x = x.contiguous()
        rows = x.numel() // k
        results = [x.new_empty((*x.shape[:-1], n)) for n in sizes]
        # A copy, as other threads may be here too.
        array = type(template).from_buffer_copy(template)
        for item, y in zip(array, results):
            item.y = y.data_ptr()
        function(
            x.data_ptr(), rows, k, ctypes.addressof(array), len(items),
            *operators.threads(),
        )  # fmt: skip
        return results

    return products


def _tensor(array):
    if array is None or isinstance(array, torch.Tensor):
        return array
    # Takes a fraction of the time of `convert_to_tensor`.
    if isinstance(array, keras.Variable):
        return array.value
    return keras.ops.convert_to_tensor(array)
