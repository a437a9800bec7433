"""The forward pass of each kind of layer, by given products.

Each function does what the `call` of a Keras layer does, except that
`multiply`, a `products.Products`, makes the products with kernels. It may
record their inputs, or multiply by packed kernels.
"""

import collections
import functools
import itertools
import math
import re
from typing import Any

import keras
from keras import ops


def dense(layer: Any, multiply: Any, inputs: Any, training: Any = None) -> Any:
    """Call a Dense."""
    return _finished(layer, multiply("kernel", inputs))


def einsum_dense(
    layer: Any, multiply: Any, inputs: Any, training: Any = None
) -> Any:
    """Call an EinsumDense, as a product of matrices or of stacks of them."""
    before, batch, axes, after = _einsum_plan(layer.equation, len(inputs.shape))
    shape = multiply.shape("kernel")
    contracted, stacks, units = (
        tuple(shape[axis] for axis in each) for each in axes
    )
    x = inputs if before is None else ops.transpose(inputs, before)
    if len(contracted) != 1 or len(stacks) > 1:
        flat = (math.prod(stacks),) if stacks else ()
        x = _reshape_last(x, batch, (*flat, math.prod(contracted)))
    x = multiply("kernel", x, stacked=bool(stacks))
    if len(units) != 1 or len(stacks) > 1:
        x = _reshape_last(x, batch, (*stacks, *units))
    return _finished(layer, x if after is None else ops.transpose(x, after))


@functools.cache
def _einsum_plan(equation: str, rank: int) -> Any:
    """Return how an einsum of an input and a kernel is a product of matrices.

    The transposed input has axes of the batch and the stack, and the contracted
    ones. The product has axes of the batch, the stack and the units.

    Returns:
        The permutation before (None for none), the number of axes of the
        batch, the axes of the kernel that are contracted, of the stack, and of
        the units, and the permutation of the product.
    """
    inputs, kernel, outputs = _einsum_terms(equation)
    open_axes = [("...", i) for i in range(rank - len(inputs) + 1)]

    def expand(term: list[str]) -> list[Any]:
        places = [open_axes if axis == "..." else [axis] for axis in term]
        return list(itertools.chain(*places))

    def permutation(axes: list[Any], wanted: list[Any]) -> list[int] | None:
        order = [axes.index(axis) for axis in wanted]
        return None if order == sorted(order) else order

    left, right = expand(inputs), expand(outputs)
    batch = [axis for axis in left if axis not in kernel]
    contracted, stacks, units = (
        einsum_axes(equation, *role)
        for role in ((True, False), (True, True), (False, True))
    )
    wanted = batch + [kernel[i] for i in stacks + contracted]
    made = batch + [kernel[i] for i in stacks + units]
    return (
        permutation(left, wanted),
        len(batch),
        (contracted, stacks, units),
        permutation(made, right),
    )


def einsum_axes(
    equation: str, in_input: bool, in_output: bool
) -> tuple[int, ...]:
    """Return the axes of the kernel that are in the input, output or both.

    Axes only in the input are contracted. Axes in both are a stack of kernels.
    """
    inputs, kernel, outputs = _einsum_terms(equation)
    return tuple(
        place
        for place, axis in enumerate(kernel)
        if (axis in inputs, axis in outputs) == (in_input, in_output)
    )


def einsum_reason(layer: Any) -> str | None:
    """Return why an EinsumDense is no matrix product; None if it is one."""
    terms = _einsum_terms(layer.equation)
    count = collections.Counter(itertools.chain(*map(set, terms)))
    # Each axis is in two or three terms, once in each.
    if min(count.values()) > 1 and sum(count.values()) == sum(map(len, terms)):
        return None
    return f"its equation {layer.equation!r} is more than matrix products"


def _einsum_terms(equation: str) -> Any:
    """Return the axes of input, kernel and output, each a letter or `...`."""
    return [
        re.findall(r"\.\.\.|\w", term) for term in re.split(",|->", equation)
    ]


def convolution(layer: Any, multiply: Any, inputs: Any) -> Any:
    """Call a Conv1D to Conv3D, as a product of the patches of its input."""
    x = patches(inputs, layer)
    if layer.groups > 1:
        # The channels of one group, for each tap.
        channels = x.shape[-1] // layer.groups
        x = _reshape_last(x, len(x.shape) - 1, (layer.groups, channels))
        x = ops.swapaxes(x, -3, -2)
        x = multiply("kernel", _joined(x), stacked=True)
        return _finished(layer, _joined(x))
    return _finished(layer, multiply("kernel", _joined(x)))


def separable_convolution(layer: Any, multiply: Any, inputs: Any) -> Any:
    """Call a SeparableConv1D or SeparableConv2D."""
    x = ops.depthwise_conv(
        inputs,
        layer.depthwise_kernel,
        strides=layer.strides,
        padding=layer.padding,
        dilation_rate=layer.dilation_rate,
        data_format=layer.data_format,
    )
    x = _channels_last(x, layer)
    return _finished(layer, multiply("pointwise_kernel", x))


def transposed_convolution(layer: Any, multiply: Any, inputs: Any) -> Any:
    """Call a Conv1DTranspose to Conv3DTranspose.

    Each pixel of the input is a row. The products are not used: the convolution
    adds up those of overlapping windows.
    """
    multiply("kernel", _channels_last(inputs, layer))
    return multiply.plain(inputs)


def patches(inputs: Any, layer: Any) -> Any:
    """Return the patches of an input: (batch, pixels..., taps, channels).

    `ops.image.extract_patches` would not do. It is a convolution with an
    identity, which GPUs round to TF32, and allows no stride with dilation.
    """
    x = _channels_last(inputs, layer)
    axes = list(zip(layer.kernel_size, layer.strides, layer.dilation_rate))
    widths = [
        _padding(layer.padding, ops.shape(x)[axis], *each)
        for axis, each in enumerate(axes, start=1)
    ]
    sides = itertools.chain(*widths)
    channels = x.shape[-1]
    if any(ops.is_tensor(side) or side for side in sides):
        x = ops.pad(x, [(0, 0), *widths, (0, 0)])
    parts = []
    for place in itertools.product(*map(range, layer.kernel_size)):
        window = [
            # Each tap has the same number of pixels, from its first one on.
            slice(tap * step, (tap - count + 1) * step or None, stride)
            for tap, (count, stride, step) in zip(place, axes)
        ]
        parts.append(x[(slice(None), *window)])
    if len(parts) == 1:
        x = ops.expand_dims(parts[0], -2)
    else:
        x = ops.stack(parts, axis=-2)
    if x.shape[-1] is None:
        # TensorFlow forgets all sizes when it pads by an unknown one.
        x = ops.reshape(x, (*ops.shape(x)[:-2], len(parts), channels))
    return x


def _padding(padding: str, size: Any, taps: int, stride: int, step: int) -> Any:
    """Return the zeros before and behind an axis of `size` pixels."""
    span = (taps - 1) * step
    if padding == "causal":
        return span, 0
    if padding == "valid":
        return 0, 0
    if stride == 1:
        total = span
    else:
        # One output pixel for each stride that begins in the input.
        total = (-(-size // stride) - 1) * stride + span + 1 - size
        is_known = not ops.is_tensor(total)
        total = max(total, 0) if is_known else ops.maximum(total, 0)
    return total // 2, total - total // 2


def reversible_embedding(
    layer: Any, multiply: Any, inputs: Any, reverse: bool = False
) -> Any:
    """Call a ReversibleEmbedding without a mask."""
    if not reverse:
        return multiply.look_up("embeddings", inputs)
    if layer.reverse_dtype is not None:
        inputs = ops.cast(inputs, layer.reverse_dtype)
    head = "embeddings" if layer.tie_weights else "reverse_embeddings"
    logits = multiply(head, inputs)
    if layer.logit_soft_cap is not None:
        cap = layer.logit_soft_cap
        logits = ops.multiply(ops.tanh(ops.divide(logits, cap)), cap)
    return logits


# KerasHub's banks of experts. A bank computes every expert for every token. The
# block around it multiplies the results by the routing weights.


def mixtral_experts(layer: Any, multiply: Any, hidden_states: Any) -> Any:
    """Call a MixtralMoeExperts."""
    x = ops.expand_dims(hidden_states, 1)
    gate = multiply("_expert_feedforward_gate_dense", x, stacked=True)
    gate = layer.activation(ops.cast(gate, "float32"))
    inner = multiply("_expert_feedforward_intermediate_dense", x, stacked=True)
    x = inner * ops.cast(gate, layer.compute_dtype)
    x = multiply("_expert_feedforward_output_dense", x, stacked=True)
    return ops.transpose(x, (1, 0, 2))


def qwen_experts(layer: Any, multiply: Any, hidden_states: Any) -> Any:
    """Call a QwenMoeExperts or Qwen3MoeExperts."""
    return _gated_experts(layer, multiply, hidden_states, layer.activation)


def qwen3_5_experts(layer: Any, multiply: Any, hidden_states: Any) -> Any:
    """Call a Qwen3_5MoeExperts."""

    def silu(gate: Any) -> Any:
        gate = ops.silu(ops.cast(gate, "float32"))
        return ops.cast(gate, hidden_states.dtype)

    return _gated_experts(layer, multiply, hidden_states, silu)


def _gated_experts(layer: Any, multiply: Any, x: Any, activation: Any) -> Any:
    x = ops.expand_dims(x, 1)
    both = multiply("_expert_feedforward_gate_dense", x, stacked=True)
    gate, up = ops.split(both, 2, axis=-1)
    x = up * activation(gate)
    x = multiply("_expert_feedforward_output_dense", x, stacked=True)
    return ops.transpose(x, (1, 0, 2))


def gpt_oss_experts(layer: Any, multiply: Any, hidden_states: Any) -> Any:
    """Call a GptOssExperts."""
    x = ops.expand_dims(hidden_states, 1)
    both = multiply("gate_up_proj", x, stacked=True) + layer.gate_up_proj_bias
    gate = ops.clip(both[..., ::2], -1e9, layer.limit)
    up = ops.clip(both[..., 1::2], -layer.limit, layer.limit)
    x = (up + 1) * (gate * ops.sigmoid(gate * layer.alpha))
    x = multiply("down_proj", x, stacked=True) + layer.down_proj_bias
    return ops.transpose(x, (1, 0, 2))


def gemma4_experts(
    layer: Any, multiply: Any, x: Any, dispatch_weights: Any
) -> Any:
    """Call a Gemma4MoEBlock."""
    dtype, x = x.dtype, ops.expand_dims(x, 1)
    gate = ops.cast(multiply("gate_proj", x, stacked=True), "float32")
    gate = ops.cast(keras.activations.gelu(gate, approximate=True), dtype)
    x = gate * multiply("up_proj", x, stacked=True)
    x = multiply("down_proj", x, stacked=True)
    scale = ops.cast(layer.per_expert_scale, dtype)
    weights = ops.cast(dispatch_weights, dtype) * scale
    return ops.sum(x * ops.expand_dims(weights, -1), axis=1)


def routed_by(*names: str) -> Any:
    """Return a function that says which experts a token is routed to.

    Args:
        *names: Strings, the way from the block around a bank to the Dense
            whose `top_k` largest outputs choose a token's experts.
    """

    def routed(block: Any, tokens: Any) -> Any:
        router = functools.reduce(getattr, names, block)
        # Does not call the layer, which may be watched too.
        logits = ops.matmul(tokens, router.kernel)
        if router.bias is not None:
            logits = ops.add(logits, router.bias)
        _, chosen = ops.top_k(logits, k=block.top_k)
        return ops.any(ops.one_hot(chosen, logits.shape[-1]) > 0, axis=1)

    return routed


def routed_by_weights(block: Any, tokens: Any, weights: Any) -> Any:
    """Return which experts a token is routed to, by the bank's argument."""
    return ops.greater(weights, 0)


def _finished(layer: Any, x: Any) -> Any:
    """Add the bias, move the channels to their axis, and activate."""
    x = x if layer.bias is None else ops.add(x, layer.bias)
    if getattr(layer, "data_format", None) == "channels_first":
        x = ops.moveaxis(x, -1, 1)
    return x if layer.activation is None else layer.activation(x)


def _channels_last(x: Any, layer: Any) -> Any:
    is_first = layer.data_format == "channels_first"
    return ops.moveaxis(x, 1, -1) if is_first else x


def _joined(x: Any) -> Any:
    """Return a tensor with its last two axes as one."""
    return _reshape_last(x, len(x.shape) - 2, (math.prod(x.shape[-2:]),))


def _reshape_last(x: Any, batch: int, last: tuple[int, ...]) -> Any:
    """Return `x` with its axes from `batch` on in the shape `last`."""
    leading = tuple(x.shape[:batch])
    if None in leading:
        leading = ops.shape(x)[:batch]
    # On torch Keras' op takes as long as a small product.
    reshape = getattr(x, "reshape", None)
    if reshape is None:
        return ops.reshape(x, (*leading, *last))
    return reshape((*leading, *last))
