"""What the inputs of each target are like, over calibration data."""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_weightmods.core import keras_private

_CONVOLUTIONS = (
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
    keras.layers.DepthwiseConv1D,
    keras.layers.DepthwiseConv2D,
)


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
        `(K,)`, K being the size of the flattened contraction axes, a mean
        over the kernels where the target is a stack of them; `None` for a
        target whose layer's inputs cannot be told apart (a layer of the user's
        own) or that no batch reached.

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

    def recorder(index, reader):
        def record(inputs):
            rows, count = reader.rows(inputs, used)
            squares = ops.mean(ops.sum(ops.square(rows), axis=1), axis=0)
            squares = ops.convert_to_numpy(squares).astype("float64")
            sums[index] = sums[index] + squares
            counts[index] += count

        return record

    with contextlib.ExitStack() as stack:
        stack.enter_context(without_gradients())
        for index, target in enumerate(targets):
            reader = InputReader.of(target)
            if reader is not None:
                record = recorder(index, reader)
                stack.enter_context(inputs_seen(target.layer, record))
        for batch in batches:
            weights = None
            if weighted:
                batch, weights = batch
            used = used_positions(weights)
            batch = keras.tree.map_structure(ops.convert_to_tensor, batch)
            model(batch, training=False)
    return [
        np.sqrt(total / count).astype("float32") if count else None
        for total, count in zip(sums, counts)
    ]


@dataclasses.dataclass(frozen=True)
class InputReader:
    """Reads the inputs of one layer as the rows of its matrix products.

    A target is a stack of S matrices (K, R), S being 1 but for experts, grouped
    and depthwise convolutions. Each has rows of K inputs of its own.

    Attributes:
        arrange: Callable from the layer's inputs to a tensor of shape
            `(..., S, K)` and the number of its leading axes that lead in the
            inputs, too.
        layout: What tells whether two readers read one tensor alike.
        stacks: Int, S.
    """

    arrange: Callable[[Any], tuple[Any, int]]
    layout: tuple
    stacks: int = 1

    @classmethod
    def of(cls, target):
        """The reader of a target, or None if there is none for its layer."""
        layer = target.layer
        if isinstance(layer, keras.layers.EinsumDense):
            return _einsum_reader(layer, target)
        if target.attribute != "kernel":
            return None
        if isinstance(layer, keras.layers.Dense):
            return cls(lambda x: (x[..., None, :], len(x.shape) - 1), (-1,))
        if isinstance(layer, _CONVOLUTIONS):
            return _convolution_reader(layer, target)
        return None

    def rows(self, inputs, used=None):
        """Pair of a float32 tensor (S, rows, K) and the number of rows.

        Rows that `used`, a boolean array over the leading axes or None, leaves
        out are zero and not counted.
        """
        x, leading = self.arrange(ops.convert_to_tensor(inputs))
        x = ops.cast(x, "float32")
        shape = tuple(x.shape)
        count = math.prod(shape[:-2])
        lead = 0 if used is None else used.ndim
        if lead and lead <= leading and shape[:lead] == used.shape:
            mask = used.reshape(used.shape + (1,) * (len(shape) - lead))
            # Not by a product: garbage in padding may be NaN.
            x = ops.where(ops.convert_to_tensor(mask), x, 0.0)
            count = count // used.size * int(used.sum())
        x = ops.reshape(x, (-1, *shape[-2:]))
        return ops.transpose(x, (1, 0, 2)), count


def to_stack(kernel, target, stacks):
    """A target's kernel as its matrices, a tensor of shape (S, K, R)."""
    kernel = ops.transpose(ops.convert_to_tensor(kernel), _stack_order(target))
    kernel = ops.reshape(kernel, (target.contraction_size, stacks, -1))
    return ops.transpose(kernel, (1, 0, 2))


def from_stack(matrices, target):
    """Undoes `to_stack`."""
    order = _stack_order(target)
    kernel = ops.transpose(matrices, (1, 0, 2))
    kernel = ops.reshape(kernel, [target.shape[axis] for axis in order])
    return ops.transpose(kernel, [order.index(i) for i in range(len(order))])


def inputs_seen(layer, record):
    """Calls `record(inputs)` whenever `layer` is called."""
    # Keras passes the inputs by keyword if the caller did.
    return keras_private.calls_seen(
        layer,
        lambda *args, **kwargs: record([*args, *kwargs.values()][0]),
    )


def used_positions(sample_weight):
    """A boolean array, or None where there are no weights or several."""
    if sample_weight is None or keras.tree.is_nested(sample_weight):
        return None
    used = ops.convert_to_numpy(sample_weight) != 0
    return used[..., 0] if used.ndim > 1 and used.shape[-1] == 1 else used


@contextlib.contextmanager
def without_gradients():
    """Keeps torch from holding all activations of a forward pass."""
    if keras.backend.backend() != "torch":
        yield
        return
    import torch

    with torch.no_grad():
        yield


def _einsum_reader(layer, target):
    operands, output = layer.equation.replace(" ", "").split("->")
    inputs, kernel = operands.split(",")
    before, _, after = inputs.partition("...")
    contracted = [kernel[axis] for axis in target.contraction_axes]
    stacked = [kernel[axis] for axis in target.stack_axes]
    # Neither of the kernel nor of the output: summed beforehand.
    summed = [a for a in before + after if a not in kernel and a not in output]
    # The ellipsis stands for any number of axes.
    place = {letter: i for i, letter in enumerate(before)}
    place.update({letter: i - len(after) for i, letter in enumerate(after)})
    layout = tuple(
        tuple(place[letter] for letter in letters)
        for letters in (contracted, stacked, summed)
    )
    stacks = math.prod(target.shape[axis] for axis in target.stack_axes)

    def arrange(x):
        rank = len(x.shape)
        last, middle, gone = ([i % rank for i in axes] for axes in layout)
        rest = [i for i in range(rank) if i not in last + middle + gone]
        leading = next((i for i, at in enumerate(rest) if at != i), len(rest))
        shape = [x.shape[i] for i in rest]
        x = ops.transpose(x, rest + middle + last + gone)
        if gone:
            x = ops.sum(x, axis=list(range(rank - len(gone), rank)))
        return ops.reshape(x, (*shape, stacks, -1)), leading

    return InputReader(arrange, layout, stacks)


def _convolution_reader(layer, target):
    # One matrix for each group, or for each channel of a depthwise kernel.
    stacks = getattr(layer, "groups", None) or target.shape[layer.rank]

    def arrange(x):
        if layer.data_format == "channels_first":
            x = ops.moveaxis(x, 1, -1)
        patches = _patches(x, layer)
        *positions, taps, channels = patches.shape
        patches = ops.reshape(
            patches, (*positions, taps, stacks, channels // stacks)
        )
        patches = ops.moveaxis(patches, -2, -3)
        return ops.reshape(patches, (*positions, stacks, -1)), layer.rank + 1

    layout = (
        layer.data_format,
        layer.kernel_size,
        layer.strides,
        layer.dilation_rate,
        layer.padding,
        stacks,
    )
    return InputReader(arrange, layout, stacks)


def _patches(x, layer):
    """What each output position sees: (batch, positions..., taps, channels)."""
    rank = layer.rank
    geometry = list(
        zip(
            x.shape[1 : rank + 1],
            layer.kernel_size,
            layer.strides,
            layer.dilation_rate,
        )
    )
    padding = [(0, 0)]
    for size, window, stride, dilation in geometry:
        reach = (window - 1) * dilation
        total = 0
        if layer.padding == "same":
            total = max(0, (-(-size // stride) - 1) * stride + reach + 1 - size)
        before = reach if layer.padding == "causal" else total // 2
        padding.append((before, total - total // 2))
    x = ops.pad(x, [*padding, (0, 0)])
    taps = []
    for offsets in itertools.product(*map(range, layer.kernel_size)):
        part = [slice(None)]
        for axis, offset in enumerate(offsets):
            _, window, stride, dilation = geometry[axis]
            end = x.shape[axis + 1] - (window - 1 - offset) * dilation
            part.append(slice(offset * dilation, end, stride))
        taps.append(x[tuple(part)])
    return ops.stack(taps, axis=-2)


def _stack_order(target):
    return [
        *target.contraction_axes,
        *target.stack_axes,
        *target.output_axes,
    ]
