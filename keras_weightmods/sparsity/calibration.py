"""Sizes of the activations that enter each target."""

import contextlib
import math

import keras
import numpy as np
from keras import ops


def input_norms(model, targets, batches, weighted=False):
    """Measures the norm of every input that a target contracts.

    The input factor of Wanda's score `|W_ij| * ||x_j||_2`
    (arXiv 2306.11695), as the root of the mean square over all positions.
    The model is run as it is, without training, and is not changed.

    Args:
        model: A built `keras.Model`.
        targets: A list from `find_targets(model)`.
        batches: Iterable of inputs for `model`.
        weighted: Whether `batches` yields pairs instead, of inputs and sample
            weights (or `None`). Positions of weight 0 (padding) are left out
            where a target's input has the axes of the weights; the others
            count alike. Defaults to `False`.

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
    used = None

    def recorder(index):
        reduce = _reducer(targets[index])

        def record(inputs):
            square, count = reduce(inputs, used)
            sums[index] = sums[index] + square.astype("float64")
            counts[index] += count

        return record if reduce else None

    with contextlib.ExitStack() as stack:
        for index, target in enumerate(targets):
            record = recorder(index)
            if record:
                stack.enter_context(_inputs_seen(target.layer, record))
        for batch in batches:
            weights = None
            if weighted:
                batch, weights = batch
            used = _used_positions(weights)
            batch = keras.tree.map_structure(ops.convert_to_tensor, batch)
            model(batch, training=False)
    return [
        _laid_out(target, np.sqrt(total / count)) if count else None
        for target, total, count in zip(targets, sums, counts)
    ]


@contextlib.contextmanager
def _inputs_seen(layer, record):
    """Calls `record(inputs)` whenever `layer` is called."""
    before = vars(layer).get("call")
    call = layer.call

    def recording_call(*args, **kwargs):
        # Keras passes the inputs by keyword if the caller did.
        record(args[0] if args else next(iter(kwargs.values())))
        return call(*args, **kwargs)

    # Past Keras' attribute tracking, which is locked on a built layer.
    object.__setattr__(layer, "call", recording_call)
    try:
        yield
    finally:
        if before is None:
            object.__delattr__(layer, "call")
        else:
            object.__setattr__(layer, "call", before)


def _used_positions(sample_weight):
    """A boolean array, or None where there are no weights or several."""
    if sample_weight is None or keras.tree.is_nested(sample_weight):
        return None
    used = ops.convert_to_numpy(sample_weight) != 0
    return used[..., 0] if used.ndim > 1 and used.shape[-1] == 1 else used


def _reducer(target):
    """A function from (inputs, used) to (sum of squares, their number)."""
    layer = target.layer
    if isinstance(layer, keras.layers.EinsumDense):
        return _einsum_reducer(layer, target)
    if isinstance(layer, keras.layers.Dense):
        return lambda x, used: _sum_of_squares(x, used, (-1,))
    data_format = getattr(layer, "data_format", None)
    # A grouped convolution's units do not all see the same channels.
    is_plain = target.attribute == "kernel" and getattr(layer, "groups", 1) == 1
    if data_format and is_plain:
        channel = 1 if data_format == "channels_first" else -1
        return lambda x, used: _sum_of_squares(x, used, (channel,))
    return None


def _sum_of_squares(x, used, kept):
    """Sums over all axes but `kept`, whose order the result has."""
    x = ops.cast(ops.convert_to_tensor(x), "float32")
    rank = len(x.shape)
    kept = [axis % rank for axis in kept]
    others = [axis for axis in range(rank) if axis not in kept]
    count = math.prod(x.shape[axis] for axis in others)
    square = ops.square(x)
    # Compared with the leading axes that are summed over, batch and time.
    lead = 0 if used is None else used.ndim
    if (
        lead
        and tuple(x.shape[:lead]) == used.shape
        and others[:lead] == list(range(lead))
    ):
        mask = used.reshape(used.shape + (1,) * (rank - lead))
        # Not by a product: garbage in padding may be NaN.
        square = ops.where(ops.convert_to_tensor(mask), square, 0.0)
        count = count // used.size * int(used.sum())
    if others:
        square = ops.sum(square, axis=others)
    ordered = sorted(kept)
    square = ops.transpose(square, [ordered.index(axis) for axis in kept])
    return ops.convert_to_numpy(square), count


def _einsum_reducer(layer, target):
    inputs, rest = layer.equation.replace(" ", "").split(",")
    kernel = rest.split("->")[0]
    before, _, after = inputs.partition("...")
    places = []
    for axis in target.contraction_axes:
        letter = kernel[axis]
        # The ellipsis stands for any number of axes.
        is_before = letter in before
        places.append(
            before.index(letter)
            if is_before
            else after.index(letter) - len(after)
        )
    return lambda x, used: _sum_of_squares(x, used, places)


def _laid_out(target, norms):
    """Flattens over the contraction axes; a conv's taps share a channel."""
    sizes = [target.shape[i] for i in target.contraction_axes]
    if norms.ndim == 1 and len(sizes) > 1:
        norms = np.broadcast_to(norms, sizes)
    return np.ascontiguousarray(norms, "float32").reshape(-1)
