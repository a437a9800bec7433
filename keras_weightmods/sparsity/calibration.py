"""Sizes of the activations that enter each target."""

import contextlib

import keras
import numpy as np
from keras import ops


def input_norms(model, targets, batches):
    """Measures the norm of every input that a target contracts.

    The input factor of Wanda's score `|W_ij| * ||x_j||_2`
    (arXiv 2306.11695), as the root of the mean square over all positions.
    The model is run as it is, without training, and is not changed.

    Args:
        model: A built `keras.Model`.
        targets: A list from `find_targets(model)`.
        batches: Iterable of inputs for `model`.

    Returns:
        A list with one float32 NumPy vector for each target, of shape
        `(K,)`, K being the size of the flattened contraction axes; `None`
        for a target whose layer's inputs cannot be told apart (a layer of the
        user's own) or that no batch reached.

    Example:

    ```python
    import keras
    import numpy as np
    from keras_weightmods import find_targets
    from keras_weightmods.sparsity.calibration import input_norms

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    x = np.array([[3.0, 0.0, 1.0, 0.0], [4.0, 0.0, 1.0, 0.0]])
    (norms,) = input_norms(model, find_targets(model), [x])
    assert np.allclose(norms, [np.sqrt(12.5), 0.0, 1.0, 0.0])
    ```
    """
    sums = [0.0] * len(targets)
    counts = [0] * len(targets)

    def recorder(index):
        reduce = _reducer(targets[index])

        def record(inputs):
            square, count = reduce(inputs)
            square = ops.convert_to_numpy(square)
            sums[index] = sums[index] + square.astype("float64")
            counts[index] += count

        return record if reduce else None

    with contextlib.ExitStack() as stack:
        for index, target in enumerate(targets):
            record = recorder(index)
            if record:
                stack.enter_context(_inputs_seen(target.layer, record))
        for batch in batches:
            model(batch, training=False)
    return [
        _laid_out(target, np.sqrt(total / count)) if count else None
        for target, total, count in zip(targets, sums, counts)
    ]


@contextlib.contextmanager
def _inputs_seen(layer, record):
    """Calls `record(inputs)` whenever `layer` is called."""
    call = layer.call

    def recording_call(inputs, *args, **kwargs):
        record(inputs)
        return call(inputs, *args, **kwargs)

    # Past Keras' attribute tracking, which is locked on a built layer.
    object.__setattr__(layer, "call", recording_call)
    try:
        yield
    finally:
        object.__delattr__(layer, "call")


def _reducer(target):
    """A function from inputs to (sum of squares, number of positions)."""
    layer = target.layer
    if isinstance(layer, keras.layers.EinsumDense):
        return _einsum_reducer(layer, target)
    if isinstance(layer, keras.layers.Dense):
        return lambda x: _sum_of_squares(x, -1)
    data_format = getattr(layer, "data_format", None)
    if data_format and target.attribute == "kernel":
        channel = 1 if data_format == "channels_first" else -1
        return lambda x: _sum_of_squares(x, channel)
    return None


def _sum_of_squares(x, kept):
    """Sums over all axes but `kept`, an int or a tuple in output order."""
    x = ops.cast(ops.convert_to_tensor(x), "float32")
    rank = len(x.shape)
    kept = [k % rank for k in ((kept,) if isinstance(kept, int) else kept)]
    others = [i for i in range(rank) if i not in kept]
    square = ops.sum(ops.square(x), axis=others) if others else ops.square(x)
    ordered = sorted(kept)
    square = ops.transpose(square, [ordered.index(k) for k in kept])
    count = int(np.prod([x.shape[i] for i in others], dtype="int64"))
    return square, count


def _einsum_reducer(layer, target):
    inputs, rest = layer.equation.replace(" ", "").split(",")
    kernel = rest.split("->")[0]
    letters = [kernel[i] for i in target.contraction_axes]

    def reduce(x):
        # An ellipsis stands for leading axes: count places from the end.
        places = [inputs.replace("...", "").index(c) for c in letters]
        named = len(inputs.replace("...", ""))
        return _sum_of_squares(x, tuple(p - named for p in places))

    return reduce


def _laid_out(target, norms):
    """Flattens over the contraction axes; a conv's taps share a channel."""
    sizes = [target.shape[i] for i in target.contraction_axes]
    if norms.ndim == 1 and len(sizes) > 1:
        norms = np.broadcast_to(norms, sizes)
    return np.ascontiguousarray(norms, "float32").reshape(-1)
