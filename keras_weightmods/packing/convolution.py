"""A convolution as a product with a packed matrix."""

import itertools
from typing import Any

import keras
from keras import ops

from keras_weightmods.core.reparameterization import slots

_LAYERS = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D)


def is_convolution(layer: Any) -> bool:
    """Return whether a layer computes as Keras' own convolutions do."""
    cls = type(layer)
    return any(
        issubclass(cls, own)
        and cls.call is own.call
        and cls.convolution_op is own.convolution_op
        for own in _LAYERS
    )


def reason_to_skip(target: Any) -> str | None:
    """Return why the kernel of a convolution is no one matrix, or None."""
    groups = target.layer.groups
    if groups == 1:
        return None
    return f"a convolution in {groups} groups, each with a kernel of its own"


class ConvProduct:
    """A convolution, as a product of the patches of its input.

    A patch, the inputs of one pixel of the output, is a row as long as the
    contraction: the kernel's taps in order, and of each the channels. Where
    the kernel has one tap, rows are pixels of the input itself.

    Args:
        target: `Target` of a layer that `is_convolution`.
    """

    def __init__(self, target):
        layer, self.size = target.layer, target.contraction_size
        self.rank = layer.rank
        self.taps = tuple(layer.kernel_size)
        self.strides = tuple(layer.strides)
        self.dilation = tuple(layer.dilation_rate)
        self.padding = layer.padding
        self.is_channels_first = layer.data_format == "channels_first"

    def __call__(self, x, multiply):
        """Return the convolution; `multiply` takes (..., K) to (..., N)."""
        axes = range(1, self.rank + 1)
        if self.is_channels_first:
            x = ops.transpose(x, (0, *(axis + 1 for axis in axes), 1))
        y = multiply(self.patches(x))
        if self.is_channels_first:
            y = ops.transpose(y, (0, self.rank + 1, *axes))
        return y

    def patches(self, x):
        """Return the patches of a tensor (batch, ..., channels)."""
        sizes = zip(self.taps, self.strides, self.dilation)
        widths = [
            self._widths(ops.shape(x)[axis], *each)
            for axis, each in enumerate(sizes, start=1)
        ]
        sides = itertools.chain(*widths)
        if any(ops.is_tensor(side) or side for side in sides):
            x = ops.pad(x, [(0, 0), *widths, (0, 0)])
        parts = []
        for place in itertools.product(*map(range, self.taps)):
            window = [
                # Of all taps as many pixels, the first of each being `start`.
                slice(start, start - last or None, stride)
                for start, last, stride in (
                    (tap * step, (count - 1) * step, stride)
                    for tap, count, stride, step in zip(
                        place, self.taps, self.strides, self.dilation
                    )
                )
            ]
            parts.append(x[(slice(None), *window)])
        x = parts[0] if len(parts) == 1 else ops.concatenate(parts, axis=-1)
        if x.shape[-1] is None:
            # TensorFlow forgets all sizes where it pads by one not known yet.
            x = ops.reshape(x, (*ops.shape(x)[:-1], self.size))
        return x

    def _widths(self, size, taps, stride, dilation):
        """Return the zeros before and behind an axis of `size` pixels."""
        span = (taps - 1) * dilation
        if self.padding == "causal":
            return span, 0
        if self.padding == "valid":
            return 0, 0
        if stride == 1:
            total = span
        else:
            # As many pixels as strides begin in the input.
            total = (-(-size // stride) - 1) * stride + span + 1 - size
            is_known = not ops.is_tensor(total)
            total = max(total, 0) if is_known else ops.maximum(total, 0)
        return total // 2, total - total // 2


class PackedConvCall:
    """The `call` of a convolution with a packed kernel."""

    def call(self: Any, inputs):
        item = slots(self)["kernel"]
        x = item.product(inputs, item.multiply)
        if self.lora_enabled:
            x = ops.add(x, item.product(inputs, self._low_rank))
        if self.bias is not None:
            shape = [1] * (self.rank + 2)
            is_first = self.data_format == "channels_first"
            shape[1 if is_first else -1] = self.filters
            x = ops.add(x, ops.reshape(self.bias, shape))
        if self.activation is not None:
            x = self.activation(x)
        return x

    def _low_rank(self: Any, patches):
        a, b = (
            ops.cast(factor, self.compute_dtype)
            for factor in (self.lora_kernel_a, self.lora_kernel_b)
        )
        a = ops.reshape(a, (-1, self.lora_rank))
        x = ops.matmul(ops.matmul(patches, a), b)
        return ops.multiply(x, self.lora_alpha / self.lora_rank)
