"""What the inputs of each target are like, over calibration data."""

import contextlib
import dataclasses
import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_weightmods.core import expert_banks, keras_compat
from keras_weightmods.core.head import find_head
from keras_weightmods.ops.matrix import contraction_size
from keras_weightmods.saving import shared
from keras_weightmods.utils.progress import Progress

_CONVOLUTIONS = (
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
    keras.layers.DepthwiseConv1D,
    keras.layers.DepthwiseConv2D,
)
_SEPARABLE = keras.layers.SeparableConv1D, keras.layers.SeparableConv2D
_TRANSPOSES = (
    keras.layers.Conv1DTranspose,
    keras.layers.Conv2DTranspose,
    keras.layers.Conv3DTranspose,
)


def input_norms(model, targets, batches):
    """Measure the norm of every input that a target contracts.

    The input factor of Wanda's score `|W_ij| * ||x_j||_2`
    (arXiv 2306.11695), as the root of the mean square over all positions.
    The model is run as it is, without training, and is not changed.

    Args:
        model: A built `keras.Model`.
        targets: `Targets` of it, or a list of `Target`.
        batches: Iterable of pairs of inputs for `model` and sample weights,
            or `None`. Positions of weight 0 (padding) are left out where a
            target's input has the axes of the weights; the others count
            alike.

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
    from keras_weightmods.calibration.inputs import input_norms

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    x = np.array([[3.0, 0.0, 1.0, 0.0], [4.0, 0.0, 1.0, 0.0]])
    (norms,) = input_norms(model, find_targets(model), [(x, None)])
    assert np.allclose(norms, [np.sqrt(12.5), 0.0, 1.0, 0.0])
    ```
    """
    sums: list[Any] = [0.0] * len(targets)
    counts = [0] * len(targets)
    used = enough = None
    seen = 0

    def see(index, reader, inputs):
        nonlocal seen
        squares, count = reader.squares(inputs, used)
        sums[index] += shared.whole(squares).astype("float64")
        counts[index] += count
        seen += 1
        if seen == enough:
            raise Enough

    body = _until_head(model, targets)
    routers = expert_banks.routers_of(model)
    with contextlib.ExitStack() as stack:
        stack.enter_context(eager_forward())
        for index, target in enumerate(targets):
            if reader := input_reader(target, routers):
                record = functools.partial(see, index, reader)
                stack.enter_context(reader.inputs_seen(target, record))
        for batch, weights in batches:
            used = used_positions(weights)
            batch = keras.tree.map_structure(ops.convert_to_tensor, batch)
            seen = 0
            with contextlib.suppress(Enough):
                body(batch, training=False)
            # The first batch is run to its end to find out.
            enough = seen
    return [
        np.sqrt(total / count).astype("float32") if count else None
        for total, count in zip(sums, counts)
    ]


def _until_head(model, targets):
    """Return the model up to its head, if that can be told and has no target.

    The head takes as long as many layers, and makes logits for nothing.
    """
    head = find_head(model) if keras_compat.graph_of(model) else None
    if head is None or any(t.layer in head.layers for t in targets):
        return model
    return head.body


def measure_importance(optimizer, model, targets, batches, verbose, since=None):
    """Give an `AdamS(criterion="wanda")` the norms of the inputs.

    Args:
        optimizer: A built `AdamS`.
        model, targets, batches: As in `input_norms`. Kernels of the optimizer
            that are not among `targets`, or whose inputs could not be read,
            of which a warning tells, are ranked by magnitude alone.
        verbose, since: As in `Progress`.

    Raises:
        ValueError: If inputs are not finite; it names the kernel.
    """
    with Progress(len(batches), "batch", verbose, since) as progress:
        counted = progress.each(batches)
        norms = list(zip(targets, input_norms(model, targets, counted)))
    bad = [
        target.path
        for target, norm in norms
        if norm is not None and not np.isfinite(norm).all()
    ]
    if bad:
        raise ValueError(
            "CAST ranks weights by the inputs of their layers, which must be "
            f"finite. Received: NaN or infinity in those of {len(bad)} "
            f"kernels, the first being {bad[0]!r}. Look for what comes in "
            "the data or what the layers before it compute, or pass "
            "`AdamS(criterion='magnitude')`."
        )
    by_id = {id(target.variable): norm for target, norm in norms}
    unknown = [target.path for target, norm in norms if norm is None]
    if unknown:
        warnings.warn(
            "CAST ranks the weights of these kernels by magnitude alone, "
            f"since their layers' inputs could not be read: {unknown[:5]}",
            stacklevel=4,
        )
    importance = []
    for variable, axes, _ in optimizer.sparsified_state:
        norm = by_id.get(id(variable))
        size = contraction_size(variable.shape, axes)
        importance.append(np.ones(size) if norm is None else norm)
    optimizer.set_importance(importance)


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

    arrange: Callable
    layout: tuple
    stacks: int = 1

    def inputs_seen(self, target, record):
        """Call `record(inputs)` before each use of the target in a scope."""
        return inputs_seen(target.layer, record)

    def moment(self, inputs, used=None):
        """Return `X^T X` of the rows, (S, K, K), and their number."""
        rows, count = self.rows(inputs, used)
        return ops.matmul(ops.transpose(rows, (0, 2, 1)), rows), count

    def squares(self, inputs, used=None):
        """Return the sums of squares, (K,), of a mean stack, and the number."""
        rows, count = self.rows(inputs, used)
        return ops.mean(ops.sum(ops.square(rows), axis=1), axis=0), count

    def rows(self, inputs, used=None):
        """Return a float32 tensor (S, rows, K) and the number of rows.

        Rows that `used`, a boolean array over the leading axes or None, leaves
        out are zero and not counted.
        """
        x, leading = self.arrange(ops.convert_to_tensor(inputs))
        x = ops.cast(x, "float32")
        shape = tuple(x.shape)
        count = math.prod(shape[:-2])
        prefixes = [shape[:lead] for lead in range(1, leading + 1)]
        if used is not None and used.shape in prefixes:
            mask = used.reshape(used.shape + (1,) * (len(shape) - used.ndim))
            # Not by a product: garbage in padding may be NaN.
            x = ops.where(ops.convert_to_tensor(mask), x, 0.0)
            count = count // used.size * int(used.sum())
        x = ops.reshape(x, (-1, *shape[-2:]))
        return ops.transpose(x, (1, 0, 2)), count


class ExpertReader:
    """Reads the inputs of a stack of experts: of each, its own tokens'.

    Its methods are those of `InputReader`.

    Args:
        route: Callable from the arguments of the bank's call to a boolean
            tensor (tokens, experts), or None if nothing tells: then each
            expert has all tokens.
        stacks: Int, the number of experts.
    """

    layout = ("experts",)

    def __init__(self, route, stacks):
        self.route = route
        self.stacks = stacks
        # What the bank was called with last.
        self.args = ()

    def inputs_seen(self, target, record):
        def see(x, *args):
            self.args = args
            record(x)

        return expert_banks.inputs_seen(target.layer, target.attribute, see)

    def moment(self, inputs, used=None):
        rows, count = self._rows(inputs, used)
        moments = [ops.matmul(ops.transpose(own), own) for own in rows]
        return ops.stack(moments), count

    def squares(self, inputs, used=None):
        rows, count = self._rows(inputs, used)
        sums = [ops.sum(ops.square(own), axis=0) for own in rows]
        return ops.mean(ops.stack(sums), axis=0), count

    def _rows(self, x, used):
        """Return the rows of each expert, one by one, and the tokens.

        Of `x` of shape (tokens, K), or (experts, tokens, K).
        """
        mask = np.ones((x.shape[-2], self.stacks), bool)
        # The tokens of all sequences, one after the other.
        if used is not None and used.size == len(mask):
            mask &= used.reshape(-1, 1)
        count = int(mask[:, 0].sum())
        if self.route is not None:
            mask &= ops.convert_to_numpy(self.route(*self.args))

        def rows_of(index):
            (places,) = np.nonzero(mask[:, index])
            own = x if len(x.shape) == 2 else x[index]
            own = ops.take(own, places.astype("int32"), axis=0)
            return ops.cast(own, "float32")

        return map(rows_of, range(self.stacks)), count


def input_reader(target, routers=None):
    """Return the reader of a target; None if its layer has none.

    Args:
        target: `Target`.
        routers: `expert_banks.routers_of(model)`. Defaults to `None`.
    """
    layer = target.layer
    if isinstance(layer, keras.layers.EinsumDense):
        return _einsum_reader(layer, target)
    if target.attribute in expert_banks.stacks_of(layer):
        return ExpertReader((routers or {}).get(id(layer)), target.shape[0])
    if isinstance(layer, _SEPARABLE):
        if target.attribute == "depthwise_kernel":
            return _convolution_reader(layer, target)
        return _pointwise_reader(layer)
    if target.attribute != "kernel":
        return None
    if isinstance(layer, _TRANSPOSES):
        return _pixel_reader(layer)
    if isinstance(layer, keras.layers.Dense):
        return InputReader(lambda x: (x[..., None, :], len(x.shape) - 1), (-1,))
    if isinstance(layer, _CONVOLUTIONS):
        return _convolution_reader(layer, target)
    return None


def inputs_seen(layer, record):
    """Call `record(inputs)` before each call of `layer` in a scope."""
    # Keras passes the inputs by keyword if the caller did.
    return keras_compat.calls_seen(
        layer, lambda *args, **kwargs: record([*args, *kwargs.values()][0])
    )


class Enough(BaseException):
    """Ends a forward pass where all that is to be seen has been.

    The rest of a block, up to half of the time, would be computed for
    nothing, and there is no other way out of the code of a layer. Not an
    `Exception`, which Keras would rewrite at each level and a layer may catch.
    """


def used_positions(sample_weight):
    """Return where weights are not 0; None if there are none or several."""
    if sample_weight is None or keras.tree.is_nested(sample_weight):
        return None
    used = ops.convert_to_numpy(sample_weight) != 0
    return used[..., 0] if used.ndim > 1 and used.shape[-1] == 1 else used


def eager_forward():
    """Run the forward passes in a scope for what is seen in them.

    Torch holds no activations. JAX would trace both branches of
    `keras.ops.cond`, and what is seen there is no number; so nothing but
    `backend.jax.compiled_call` is compiled.
    """
    if keras.backend.backend() == "jax":
        import jax

        return jax.disable_jit()
    if keras.backend.backend() != "torch":
        return contextlib.nullcontext()
    import torch

    return torch.no_grad()


def gradients():
    """Let torch take gradients in a scope inside `eager_forward`."""
    if keras.backend.backend() != "torch":
        return contextlib.nullcontext()
    import torch

    return torch.enable_grad()


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


def _pixel_reader(layer):
    """Each pixel of the input is a row, of its channels."""

    def arrange(x):
        if layer.data_format == "channels_first":
            x = ops.moveaxis(x, 1, -1)
        return x[..., None, :], layer.rank + 1

    return InputReader(arrange, (layer.data_format,))


def _pointwise_reader(layer):
    """The rows are what the depthwise part of the layer gives."""
    pixels = _pixel_reader(layer)

    def arrange(x):
        x = ops.depthwise_conv(
            x,
            ops.cast(layer.depthwise_kernel, x.dtype),
            strides=layer.strides,
            padding=layer.padding,
            dilation_rate=layer.dilation_rate,
            data_format=layer.data_format,
        )
        return pixels.arrange(x)

    # No other layer reads the same.
    return InputReader(arrange, (id(layer),))


def _convolution_reader(layer, target):
    # One matrix for each group, or for each channel of a depthwise kernel.
    stacks = getattr(layer, "groups", None) or target.shape[layer.rank]
    window, strides = layer.kernel_size, layer.strides
    dilation, padding = layer.dilation_rate, layer.padding
    layout = window, strides, dilation, padding, layer.data_format, stacks
    reach = [(size - 1) * step for size, step in zip(window, dilation)]

    def arrange(x):
        """Return (batch, positions, stacks, taps * channels of a stack)."""
        # Not by `ops.image.extract_patches`: a convolution with an identity,
        # which GPUs round to TF32, and for which no stride goes with dilation.
        if layer.data_format == "channels_first":
            x = ops.moveaxis(x, 1, -1)
        pads = [(0, 0)]
        for size, far, stride in zip(x.shape[1:], reach, strides):
            total = max(0, far - (size - 1) % stride)
            same = total // 2, total - total // 2
            kinds = {"same": same, "causal": (far, 0), "valid": (0, 0)}
            pads.append(kinds[padding])
        x = ops.pad(x, [*pads, (0, 0)])
        x = ops.reshape(x, (*x.shape[:-1], stacks, -1))
        taps = []
        for offsets in np.ndindex(window):
            starts = [i * step for i, step in zip(offsets, dilation)]
            ends = [
                start + size - far
                for start, size, far in zip(starts, x.shape[1:], reach)
            ]
            part = map(slice, starts, ends, strides)
            taps.append(x[(slice(None), *part)])
        x = ops.stack(taps, axis=-2)
        return ops.reshape(x, (*x.shape[:-2], -1)), layer.rank + 1

    return InputReader(arrange, layout, stacks)
