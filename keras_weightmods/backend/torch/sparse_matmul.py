"""`sparse_matmul` on torch: operators of `torch.library`.

Eager and under `torch.compile`, with gradients. On a CPU the threads are
torch's own, as many as `torch.get_num_threads()`; one for small products.
"""

import ctypes

import keras
import torch

from keras_weightmods import native
from keras_weightmods.backend.torch import operators
from keras_weightmods.backend.torch.threads import threads
from keras_weightmods.native.packed import dense_matmul


def reason_unavailable():
    """Return why the compiled kernels cannot be used; empty if they can."""
    return "" if torch.cuda.is_available() else native.reason_unavailable()


def sparse_matmul(x, packed):
    """See `keras_weightmods.ops.sparse_matmul`."""
    device = x.device.type
    if device not in ("cpu", "cuda", "meta") or (
        device == "cpu" and not native.is_available()
    ):
        return _dense(x, packed)
    rounded = packed.activations == "int8"
    is_int4 = packed.dtype == "int4"
    if device == "cuda" and rounded and (packed.is_dense or is_int4):
        return _dense(x, packed)
    weights = (
        _tensor(packed.values),
        None if packed.meta is None else _tensor(packed.meta),
        None if packed.scale is None else _tensor(packed.scale),
        packed.shape[1],
    )
    ops = torch.ops.keras_weightmods
    multiply = ops.sparse_matmul_int8 if rounded else ops.sparse_matmul
    if (
        x.dtype is torch.float32
        or device == "cuda"
        or (x.dtype is torch.bfloat16 and packed.dtype == "bfloat16")
    ):
        return multiply(x, *weights)
    return multiply(x.to(torch.float32), *weights).to(x.dtype)


def _dense(x, packed):
    # Keras' functions would move all to its default device.
    with keras.device(str(x.device)):
        return dense_matmul(x, packed)


def prepared(operator, dtype, k, n, values, meta, scale):
    """The product with one kernel, without what torch does for an operator.

    Args:
        operator: `sparse_matmul` or `sparse_matmul_int8` of torch.ops.
        dtype: The type of the activations, one that the operator takes.
        k: Int, the last axis of the activations.
        n: Int, the last axis of the result.
        values, meta, scale: Tensors, checked here and held, or None.

    Returns:
        Function of a tensor of shape (..., k). No gradients.
    """
    if not values.is_cpu or not native.is_available():
        return lambda x: operator(x, values, meta, scale, n)
    tensors = values, meta, scale
    library = native.library()
    if operator is not torch.ops.keras_weightmods.sparse_matmul.default:
        function = library.kwm_matmul_int8
        weights = operators.weights_of(k, n, *tensors, dense=meta is None)
    elif dtype is torch.bfloat16:
        function = library.kwm_matmul_bfloat16
        weights = operators.bfloat16_weights_of(k, n, values, meta)
    else:
        function = library.kwm_matmul
        weights = operators.weights_of(k, n, *tensors)

    def product(x, _held=tensors):
        x = x.contiguous()
        rows = x.numel() // k
        y = x.new_empty((*x.shape[:-1], n))
        function(
            x.data_ptr(), rows, *weights, y.data_ptr(), *threads(rows * k * n)
        )
        return y

    return product


def prepared_many(k, kernels):
    """The products of one input with several kernels, in one call.

    With int8 activations, on a CPU: the input is rounded once.

    Args:
        k: Int, the last axis of the activations.
        kernels: List of (values, meta, scale, n), as of `prepared`; all of
            one type.

    Returns:
        Function of a float32 tensor of shape (..., k) to a list of tensors.
    """
    function = native.library().kwm_matmul_int8_many
    sizes = [n for *_, n in kernels]
    items = []
    for values, meta, scale, n in kernels:
        *_, dtype, values, meta, scale = operators.weights_of(
            k, n, values, meta, scale, dense=meta is None
        )
        items.append(native.Product(n, values, meta, scale))
    template = (native.Product * len(items))(*items)
    cost = k * sum(sizes)

    def products(x, _held=kernels):
        x = x.contiguous()
        rows = x.numel() // k
        results = [x.new_empty((*x.shape[:-1], n)) for n in sizes]
        # A copy, as other threads may be here too.
        array = type(template).from_buffer_copy(template)
        for item, y in zip(array, results):
            item.y = y.data_ptr()
        function(
            x.data_ptr(), rows, k, dtype, ctypes.addressof(array), len(items),
            *threads(rows * cost),
        )  # fmt: skip
        return results

    return products


def _tensor(array):
    if isinstance(array, torch.Tensor):
        return array
    # A fraction of the time that `convert_to_tensor` takes.
    if isinstance(array, keras.Variable):
        return array.value
    return keras.ops.convert_to_tensor(array)
