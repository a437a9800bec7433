"""The forward pass of each kind of layer, by given products.

Each function does what the `call` of a Keras layer does, but for the products
with kernels: `multiply` makes these, a `products.Products`. So the inputs of
a kernel can be recorded, and a packed kernel multiplied by.
"""

import dataclasses
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
    plan = einsum_plan(layer.equation, len(inputs.shape))
    shape = multiply.shape("kernel")
    contracted, stacks, units = (
        tuple(shape[axis] for axis in axes)
        for axes in (plan.contracted, plan.stacks, plan.units)
    )
    x = ops.sum(inputs, axis=plan.summed) if plan.summed else inputs
    if plan.before is not None:
        x = ops.transpose(x, plan.before)
    if len(contracted) != 1 or len(stacks) > 1:
        flat = (math.prod(stacks),) if stacks else ()
        x = _reshape_last(x, plan.batch, (*flat, math.prod(contracted)))
    x = multiply("kernel", x, stacked=bool(stacks))
    if len(units) != 1 or len(stacks) > 1:
        x = _reshape_last(x, plan.batch, (*stacks, *units))
    if plan.after is not None:
        x = ops.transpose(x, plan.after)
    return _finished(layer, x)


@dataclasses.dataclass(frozen=True)
class EinsumPlan:
    """How an einsum with a kernel is a product of matrices.

    The input, summed over the axes `summed` and transposed by `before`, has
    `batch` axes, those of the stack and the contracted ones; the product has
    the batch, the stack and the units, and is transposed by `after`. None
    stands for no transpose; `contracted`, `stacks` and `units` are axes of the
    kernel.
    """

    summed: tuple[int, ...]
    before: list[int] | None
    batch: int
    contracted: tuple[int, ...]
    stacks: tuple[int, ...]
    units: tuple[int, ...]
    after: list[int] | None


@functools.cache
def einsum_plan(equation: str, rank: int) -> EinsumPlan:
    """Return the plan of an equation for an input with `rank` axes."""
    inputs, kernel, outputs = einsum_terms(equation)
    open_axes = [("...", i) for i in range(rank - len(inputs) + 1)]

    def expand(term: list[str]) -> list[Any]:
        return [
            axis
            for each in term
            for axis in (open_axes if each == "..." else [each])
        ]

    left, right = expand(inputs), expand(outputs)
    batch = [a for a in left if a in right and a not in kernel]
    roles: dict[tuple[bool, bool], list[int]] = {}
    for place, axis in enumerate(kernel):
        roles.setdefault((axis in left, axis in right), []).append(place)
    contracted = roles.get((True, False), [])
    stacks, units = roles.get((True, True), []), roles.get((False, True), [])
    summed = [a for a in left if a not in right and a not in kernel]
    kept = [a for a in left if a not in summed]
    wanted = batch + [kernel[i] for i in stacks + contracted]
    made = batch + [kernel[i] for i in stacks + units]
    return EinsumPlan(
        tuple(left.index(a) for a in summed),
        _permutation(kept, wanted),
        len(batch),
        tuple(contracted),
        tuple(stacks),
        tuple(units),
        _permutation(made, right),
    )


def einsum_reason(layer: Any) -> str | None:
    """Return why an EinsumDense is no product of matrices; None if it is."""
    terms = inputs, kernel, outputs = einsum_terms(layer.equation)
    if (
        all(len(set(term)) == len(term) for term in terms)
        and {*kernel} <= {*inputs, *outputs}
        and {*outputs} <= {*inputs, *kernel}
        and ("..." in inputs) == ("..." in outputs)
    ):
        return None
    return f"its equation {layer.equation!r} is more than matrix products"


def einsum_terms(equation: str) -> Any:
    """Return the axes of input, kernel and output, each a letter or `...`."""
    return [
        re.findall(r"\.\.\.|\w", term) for term in re.split(",|->", equation)
    ]


def convolution(layer: Any, multiply: Any, inputs: Any) -> Any:
    """Call a Conv1D to Conv3D, as a product of the patches of its input."""
    x = patches(inputs, layer, layer.padding)
    if layer.groups > 1:
        # Of each tap the channels of one group.
        channels = x.shape[-1] // layer.groups
        x = _reshape_last(x, len(x.shape) - 1, (layer.groups, channels))
        x = ops.swapaxes(x, -3, -2)
        x = multiply("kernel", _joined(x, 2), stacked=True)
        return _finished_pixels(layer, _joined(x, 2))
    return _finished_pixels(layer, multiply("kernel", _joined(x, 2)))


def depthwise_convolution(layer: Any, multiply: Any, inputs: Any) -> Any:
    """Call a DepthwiseConv1D or DepthwiseConv2D."""
    return _finished_pixels(
        layer, _depthwise(layer, multiply, "kernel", inputs)
    )


def separable_convolution(layer: Any, multiply: Any, inputs: Any) -> Any:
    """Call a SeparableConv1D or SeparableConv2D."""
    if "depthwise_kernel" in multiply.attributes:
        x = _depthwise(layer, multiply, "depthwise_kernel", inputs)
    else:
        x = ops.depthwise_conv(
            inputs,
            layer.depthwise_kernel,
            strides=layer.strides,
            padding=layer.padding,
            dilation_rate=layer.dilation_rate,
            data_format=layer.data_format,
        )
        x = _channels_last(x, layer)
    return _finished_pixels(layer, multiply("pointwise_kernel", x))


def transposed_convolution(layer: Any, multiply: Any, inputs: Any) -> Any:
    """Call a Conv1DTranspose to Conv3DTranspose.

    Each pixel of the input is a row. The products, one for each tap, are not
    used: where windows overlap, the convolution adds them up.
    """
    multiply("kernel", _channels_last(inputs, layer))
    return multiply.plain(inputs)


def _depthwise(layer: Any, multiply: Any, name: str, inputs: Any) -> Any:
    """Return the product of each channel's patches, channels last."""
    x = ops.swapaxes(patches(inputs, layer, layer.padding), -2, -1)
    return _joined(multiply(name, x, stacked=True), 2)


def patches(
    inputs: Any,
    layer: Any,
    padding: str,
    strides: Any = None,
    dilation: Any = None,
) -> Any:
    """Return the patches of an input: (batch, pixels..., taps, channels).

    Not by `ops.image.extract_patches`: a convolution with an identity, which
    GPUs round to TF32, and for which no stride goes with dilation.
    """
    x = _channels_last(inputs, layer)
    strides, dilation = (
        strides or layer.strides,
        dilation or layer.dilation_rate,
    )
    axes = list(zip(layer.kernel_size, strides, dilation))
    widths = [
        _padding(padding, ops.shape(x)[axis], *each)
        for axis, each in enumerate(axes, start=1)
    ]
    sides = itertools.chain(*widths)
    channels = x.shape[-1]
    if any(ops.is_tensor(side) or side for side in sides):
        x = ops.pad(x, [(0, 0), *widths, (0, 0)])
    parts = []
    for place in itertools.product(*map(range, layer.kernel_size)):
        window = [
            # Of all taps as many pixels, the first of each being `start`.
            slice(tap * step, (tap - count + 1) * step or None, stride)
            for tap, (count, stride, step) in zip(place, axes)
        ]
        parts.append(x[(slice(None), *window)])
    if len(parts) == 1:
        x = ops.expand_dims(parts[0], -2)
    else:
        x = ops.stack(parts, axis=-2)
    if x.shape[-1] is None:
        # TensorFlow forgets all sizes where it pads by one not known yet.
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
        # As many pixels as strides begin in the input.
        total = (-(-size // stride) - 1) * stride + span + 1 - size
        is_known = not ops.is_tensor(total)
        total = max(total, 0) if is_known else ops.maximum(total, 0)
    return total // 2, total - total // 2


def lstm_cell(
    layer: Any, multiply: Any, inputs: Any, states: Any, training: bool = False
) -> Any:
    """Call an LSTMCell."""
    h, c = states
    masks = _masks(layer, inputs, h, training)
    x = _gates(multiply, "kernel", inputs, masks[0], 4)
    inner = _gates(multiply, "recurrent_kernel", h, masks[1], 4)
    gates = list(map(ops.add, x, inner))
    if layer.use_bias:
        gates = list(map(ops.add, gates, ops.split(layer.bias, 4)))
    return _lstm_states(layer, gates, c)


def gru_cell(
    layer: Any, multiply: Any, inputs: Any, states: Any, training: bool = False
) -> Any:
    """Call a GRUCell."""
    h = states[0] if keras.tree.is_nested(states) else states
    masks = _masks(layer, inputs, h, training)
    x = _gates(multiply, "kernel", inputs, masks[0], 3)
    if layer.use_bias:
        bias = layer.bias[0] if layer.reset_after else layer.bias
        x = list(map(ops.add, x, ops.split(bias, 3)))
    inner = _gates(multiply, "recurrent_kernel", h, masks[1], 3)
    if layer.use_bias and layer.reset_after:
        inner = list(map(ops.add, inner, ops.split(layer.bias[1], 3)))
    update = layer.recurrent_activation(ops.add(x[0], inner[0]))
    reset = layer.recurrent_activation(ops.add(x[1], inner[1]))
    if layer.reset_after:
        last = ops.multiply(reset, inner[2])
    else:
        left = h if masks[1] is None else ops.multiply(h, masks[1][2])
        left = ops.multiply(reset, left)
        last = _gates(multiply, "recurrent_kernel", left, None, 3)[2]
    new = layer.activation(ops.add(x[2], last))
    h = ops.add(ops.multiply(update, h), ops.multiply(1 - update, new))
    return h, [h] if keras.tree.is_nested(states) else h


def simple_rnn_cell(
    layer: Any, multiply: Any, inputs: Any, states: Any, training: bool = False
) -> Any:
    """Call a SimpleRNNCell."""
    h = states[0] if keras.tree.is_nested(states) else states
    masks = _masks(layer, inputs, h, training)
    (x,) = _gates(multiply, "kernel", inputs, masks[0], 1)
    if layer.bias is not None:
        x = ops.add(x, layer.bias)
    (inner,) = _gates(multiply, "recurrent_kernel", h, masks[1], 1)
    h = ops.add(x, inner)
    if layer.activation is not None:
        h = layer.activation(h)
    return h, [h] if keras.tree.is_nested(states) else h


def conv_lstm_cell(
    layer: Any, multiply: Any, inputs: Any, states: Any, training: bool = False
) -> Any:
    """Call the cell of a ConvLSTM1D to ConvLSTM3D."""
    h, c = states
    masks = _masks(layer, inputs, h, training)

    def gates(name: str, x: Any, mask: Any, *form: Any) -> Any:
        def product(attribute: str, x: Any) -> Any:
            return multiply(attribute, _joined(patches(x, layer, *form), 2))

        return _gates(product, name, x, mask, 4)

    x = gates("kernel", inputs, masks[0], layer.padding)
    if layer.use_bias:
        x = list(map(ops.add, x, ops.split(layer.bias, 4)))
    ones = (1,) * layer.rank
    inner = gates("recurrent_kernel", h, masks[1], "same", ones, ones)
    inner = list(map(ops.add, x, inner))
    _, states = _lstm_states(layer, inner, _channels_last(c, layer))
    h, c = (_channels_back(each, layer) for each in states)
    return h, [h, c]


def _lstm_states(layer: Any, gates: Any, c: Any) -> Any:
    i, f, o = (layer.recurrent_activation(gates[n]) for n in (0, 1, 3))
    c = ops.add(ops.multiply(f, c), ops.multiply(i, layer.activation(gates[2])))
    h = ops.multiply(o, layer.activation(c))
    return h, [h, c]


def _gates(multiply: Any, name: str, x: Any, masks: Any, count: int) -> Any:
    """Return `x` times a kernel, split into so many gates.

    With a list of dropout masks each gate has inputs of its own.
    """
    if not isinstance(masks, (list, tuple)):
        x = x if masks is None else ops.multiply(x, masks)
        return ops.split(multiply(name, x), count, axis=-1)
    products = [multiply(name, ops.multiply(x, mask)) for mask in masks]
    return [
        ops.split(product, count, axis=-1)[gate]
        for gate, product in enumerate(products)
    ]


def _masks(layer: Any, x: Any, h: Any, training: bool) -> list[Any]:
    makers = (
        (layer.dropout, layer.get_dropout_mask, x),
        (layer.recurrent_dropout, layer.get_recurrent_dropout_mask, h),
    )
    return [
        make(like) if training and 0 < rate < 1 else None
        for rate, make, like in makers
    ]


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


# KerasHub's banks of experts. A bank computes every expert for every token;
# the block around it multiplies what they give by the weights of the routing.


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
    """Return what tells which experts a token is routed to.

    Args:
        *names: Strings, the way from the block around a bank to the Dense
            whose `top_k` largest outputs choose a token's experts.
    """

    def routed(block: Any, tokens: Any) -> Any:
        router = functools.reduce(getattr, names, block)
        # Not by a call of the layer, which may be watched as well.
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
    if layer.bias is not None:
        x = ops.add(x, layer.bias)
    return x if layer.activation is None else layer.activation(x)


def _finished_pixels(layer: Any, x: Any) -> Any:
    """Add a bias to each channel, behind the others."""
    x = x if layer.bias is None else ops.add(x, layer.bias)
    x = _channels_back(x, layer)
    return x if layer.activation is None else layer.activation(x)


def _channels_last(x: Any, layer: Any) -> Any:
    is_first = layer.data_format == "channels_first"
    return ops.moveaxis(x, 1, -1) if is_first else x


def _channels_back(x: Any, layer: Any) -> Any:
    is_first = layer.data_format == "channels_first"
    return ops.moveaxis(x, -1, 1) if is_first else x


def _joined(x: Any, count: int) -> Any:
    """Return a tensor with its last axes as one."""
    last = x.shape[-count:]
    return _reshape_last(x, len(x.shape) - count, (math.prod(last),))


def _reshape_last(x: Any, batch: int, last: tuple[int, ...]) -> Any:
    """Return `x` with its axes from `batch` on in the shape `last`."""
    leading = tuple(x.shape[:batch])
    if None in leading:
        leading = ops.shape(x)[:batch]
    # On torch the bookkeeping of Keras' op takes as long as a small product.
    reshape = getattr(x, "reshape", None)
    if reshape is None:
        return ops.reshape(x, (*leading, *last))
    return reshape((*leading, *last))


def _permutation(axes: list[Any], wanted: list[Any]) -> list[int] | None:
    order = [axes.index(axis) for axis in wanted]
    return None if order == sorted(order) else order
