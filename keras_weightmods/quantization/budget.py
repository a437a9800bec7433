"""Choosing the bits of each kernel within a budget of bytes."""

import math
import re
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_weightmods.calibration import inputs as calibration
from keras_weightmods.calibration.block_reconstruction import (
    Batches,
    Part,
    only_trained,
)
from keras_weightmods.core import seam
from keras_weightmods.core.head import Head, input_of, output_of
from keras_weightmods.core.layer_kinds import reason_dense
from keras_weightmods.core.restored import RestoredOnError
from keras_weightmods.core.targets import Target
from keras_weightmods.native import layout
from keras_weightmods.ops import nm
from keras_weightmods.ops.distillation import chunk_positions, chunked_losses
from keras_weightmods.ops.rounding import Grid, round_kept
from keras_weightmods.quantization.head import Outputs
from keras_weightmods.utils import checks
from keras_weightmods.utils.dtypes import bytes_of, numpy_dtype
from keras_weightmods.utils.matrix import stack_shape, to_stack

WIDTHS = 2, 3, 4, 5, 6
# About how many positions the curvature is measured at.
_POSITIONS = 4096
# Units of a kernel that are rounded, to estimate the loss of all.
_UNITS = 512
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([kMG]i?)?B")


def bytes_in(size: Any) -> int:
    """Return a size such as `"60MB"`, `"1.5 GiB"` or an int in bytes."""
    expected = 'a number of bytes, or a string such as "60MB" or "1.5GiB"'
    if isinstance(size, str):
        found = _SIZE.fullmatch(size.strip())
        if not found:
            raise checks.error("size", expected, size)
        number, unit = found.groups(default="")
        base = 1024 if unit.endswith("i") else 1000
        size = int(float(number) * base ** " kMG".index(unit[:1] or " "))
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise checks.error("size", expected, size)
    return size


def choose_bits(
    model: Any,
    head: Head | None,
    outputs: Outputs,
    targets: Sequence[Target],
    grid_for: Any,
    bits: Any,
    size: int | None,
) -> tuple[list[int], int | None]:
    """Choose the bits of each kernel, for the least loss of all.

    Args:
        model, head, outputs, targets: As of `expected_losses`.
        grid_for: Function from a `Target` and bits to a `Grid`.
        bits: Float, those of a weight on the mean, or None with `size`.
        size: Int, the bytes of all weights of the model once packed, or None.

    Returns:
        List of the bits of the targets; the bytes, or None.
    """
    widths, sizes = [], []
    shared = seam.shared_variables(model)
    for target in targets:
        pattern = None
        if not isinstance(target.layer, keras.layers.Embedding):
            pattern = nm.packed_pattern(
                target.variable.value, target.contraction_axes
            )
        if size is not None and (
            id(target.variable) in shared
            or reason_dense(target.layer, target.attribute)
            or seam.reason_to_skip(target)
        ):
            # Packing skips it, so fewer bits would save nothing.
            widths.append([WIDTHS[-1]])
            sizes.append([bytes_of([target.variable])])
            continue
        widths.append([4] if pattern else [*WIDTHS])
        sizes.append(
            [b * math.prod(target.shape) for b in widths[-1]]
            if size is None
            else [_packed_bytes(target, b, pattern) for b in widths[-1]]
        )
    weights = sum(math.prod(target.shape) for target in targets)
    stored = [target.variable for target in targets]
    rest = bytes_of(model.weights) - bytes_of(stored)
    budget = size - rest if size is not None else bits * weights
    least = sum(own[0] for own in sizes)
    if budget < least:
        if size is None:
            expected = f"at least {least / weights:.3g} for these kernels"
            raise checks.error("bits", expected, bits)
        expected = f"at least {rest + least:,} bytes, what the kernels take in "
        expected += f"their least bits, with {rest:,} bytes of weights that "
        expected += "are left as they are"
        raise checks.error("size", expected, size)
    losses = expected_losses(
        model,
        head,
        outputs,
        targets,
        [[grid_for(t, b) for b in own] for t, own in zip(targets, widths)],
    )
    if not np.isfinite(sum(map(sum, losses))) or not any(map(any, losses)):
        raise ValueError(
            "A budget is shared out by the gradients of the weights. Received: "
            "gradients that are all 0, or not finite, on the first positions "
            "of `data`. Pass `bits` as an int, 2 to 6."
        )
    places = choose(sizes, losses, budget)
    chosen = [own[i] for own, i in zip(widths, places)]
    if size is not None:
        size = rest + sum(own[i] for own, i in zip(sizes, places))
    return chosen, size


def _packed_bytes(target: Target, bits: int, pattern: Any) -> int:
    axes = target.contraction_axes, target.stack_axes
    stacks, rows, units = stack_shape(target.shape, *axes)
    units = -(-units // layout.COLUMNS) * layout.COLUMNS
    arrays = layout.packed_arrays((rows, stacks * units), f"int{bits}", pattern)
    return sum(
        math.prod(shape) * int(numpy_dtype(dtype).itemsize)
        for shape, dtype in arrays.values()
    )


def expected_losses(
    model: Any,
    head: Head | None,
    outputs: Outputs,
    targets: Sequence[Target],
    grids: Sequence[Sequence[Grid]],
) -> list[list[float]]:
    """Return the loss from rounding a kernel, by kernel and grid.

    To second order it is `1/2 sum F (w' - w)^2` for each position. w' are the
    weights rounded to nearest, and F is the diagonal of the curvature of the
    loss of `train_scales`. For a language model this loss is KL(given ||
    rounded) in nats. F is then the Fisher information: the mean square of the
    gradients of log p(y), for tokens y drawn by the model. For other models the
    loss is the squared error over the energy of the outputs. Errors of
    different weights are assumed independent.

    Args:
        model: A functional Keras model, not rounded.
        head: `Head` of a language model, or None.
        outputs: `Outputs`, of the head's body or the model.
        targets: Sequence of `Target`.
        grids: A list of `Grid` for each of them.
    """
    whole = keras.Model(input_of(model), output_of(model))
    calls: Any = [((x,), {}) for x, _ in outputs.batches[outputs.fit]]
    calls = keras.tree.map_structure(ops.convert_to_tensor, calls)
    states, used = outputs.states[outputs.fit], outputs.used[outputs.fit]
    count = math.prod(keras.tree.flatten(states[0])[0].shape[:-1])
    most = max(1, _POSITIONS // count)
    drawn = [_drawn(head, each, i) for i, each in enumerate(states[:most])]
    data = Batches(calls[:most], drawn, used[:most])
    positions = sum(
        float(x[f"weights_{i}"].sum()) for x in data.inputs for i in data.places
    )
    variables = [target.variable for target in targets]
    undo = RestoredOnError(whole)
    loss = _score(head) if head else _projection
    run = head.body if head else whole
    part = Part(whole, run, loss, data, recompute=True)
    with undo, calibration.gradients():
        only_trained(whole, variables)
        # Sums the squares of gradients, and changes nothing.
        adagrad = keras.optimizers.Adagrad(0.0, initial_accumulator_value=0.0)
        part.compile(adagrad)
        part.fit(data, verbose=0, shuffle=False)
        trained = part.trainable_variables
        squares = adagrad.variables[-len(trained) :]
        undo.structure.restore()
    by_id = {id(v): square for v, square in zip(trained, squares)}
    # On torch this keeps no gradients.
    with calibration.eager_forward(), calibration.compiled():
        return [
            _losses(target, by_id[id(target.variable)].value, own, positions)
            for target, own in zip(targets, grids)
        ]


def choose(
    sizes: Sequence[Sequence[int]],
    losses: Sequence[Sequence[float]],
    budget: float,
) -> list[int]:
    """Return the choice for each item that loses least within a budget.

    This is a knapsack of many items. Each begins with its smallest choice and
    follows the lower convex hull of its losses over sizes. The step that gains
    most for its size comes first, while it fits. The result is within one step
    of the best.

    Args:
        sizes: A list for each item, rising.
        losses: A list for each item, one for each size.
        budget: Float, at least the sum of the smallest sizes.
    """
    steps = []
    for item, (own, lost) in enumerate(zip(sizes, losses)):
        place = 0
        while place + 1 < len(own):
            gains = [
                (lost[place] - lost[i]) / (own[i] - own[place])
                for i in range(place + 1, len(own))
            ]
            best = int(np.argmax(gains))
            if gains[best] <= 0:
                break
            place += 1 + best
            steps.append((-gains[best], item, place))
    chosen = [0] * len(sizes)
    left = budget - sum(own[0] for own in sizes)
    closed = set()
    for _, item, place in sorted(steps):
        more = sizes[item][place] - sizes[item][chosen[item]]
        if item in closed or more > left:
            # Later ones of this item are even larger.
            closed.add(item)
            continue
        chosen[item] = place
        left -= more
    return chosen


def _losses(
    target: Target, squares: Any, grids: Sequence[Grid], positions: float
) -> list[float]:
    """Return the second-order loss of each grid, estimated from some units."""
    axes = target.contraction_axes, target.stack_axes
    matrix, squares = (
        ops.cast(to_stack(x, *axes, 1)[0], "float32")
        for x in (target.variable.value, squares)
    )
    every = slice(None, None, -(-matrix.shape[1] // _UNITS))
    some = matrix[:, every], squares[:, every]
    # Assume the same error for the curvature in the other units.
    share = ops.sum(squares) / ops.maximum(ops.sum(some[1]), 1e-30)
    return [
        float(
            share
            * ops.sum(some[1] * ops.square(rounded - some[0]))
            / (2 * max(positions, 1.0))
        )
        for rounded in (round_kept(some[0], None, g).values for g in grids)
    ]


def _drawn(head: Head | None, states: Any, seed: int) -> Any:
    """Return tokens drawn from the logits, or noise shaped like the outputs.

    The noise has the mean square 1 at each position for outputs of norm 1.
    """
    if head is None:
        rng = np.random.default_rng(seed)
        return keras.tree.map_structure(
            lambda y: rng.normal(size=tuple(y.shape)).astype("float32"), states
        )
    flat = ops.reshape(states, (-1, states.shape[-1]))
    size = chunk_positions(head.classes)
    with calibration.eager_forward():
        tokens = [
            keras.random.categorical(
                ops.cast(head(flat[None, i : i + size])[0], "float32"),
                1,
                seed=seed + i,
            )
            for i in range(0, flat.shape[0], size)
        ]
    tokens = ops.convert_to_numpy(ops.concatenate(tokens)).astype("float32")
    return tokens.reshape((*states.shape[:-1], 1))


def _score(head: Head) -> Any:
    """Return the sum of -log p of tokens, from hidden states."""

    def loss(hidden: Any, drawn: Any, weights: Any) -> Any:
        trained = [v for v in head.variables if v.trainable]
        weights = ops.reshape(weights, (-1,))
        return chunked_losses(
            head.function(trained),
            [v.value for v in trained],
            None,
            ops.reshape(hidden, (-1, hidden.shape[-1])),
            None,
            ops.cast(ops.reshape(drawn, (-1,)), "int32"),
            weights,
            0.0,
            chunk_size=chunk_positions(head.classes),
        )[0]

    return loss


def _projection(outputs: Any, drawn: Any, weights: Any) -> Any:
    """Return the sum over positions of outputs, over their norm, times noise.

    The mean square of its gradient is half of the curvature of the error.
    """
    outputs = ops.cast(outputs, "float32")
    energy = ops.stop_gradient(ops.sum(ops.square(outputs), axis=-1))
    norm = ops.sqrt(2.0 / (energy + keras.config.epsilon()))
    return ops.sum(ops.sum(outputs * drawn, axis=-1) * norm * weights)
