"""Rounding the head of a language model for the least change of logits."""

import math
import time
from typing import Any

import numpy as np
from keras import ops

from keras_weightmods import backend
from keras_weightmods.calibration import inputs
from keras_weightmods.core import keras_compat
from keras_weightmods.core.head import Head, reversible_embeddings
from keras_weightmods.core.reparameterization import slots
from keras_weightmods.core.targets import Target, Targets
from keras_weightmods.ops.rounding import Grid, round_kept
from keras_weightmods.ops.sparsegpt import output_energy
from keras_weightmods.utils.dtypes import numpy_dtype
from keras_weightmods.utils.matrix import from_stack, to_stack
from keras_weightmods.utils.progress import Progress
from keras_weightmods.utils.report import Skipped

# Units of a weight that are changed at a time.
_UNITS = 4096
# More damping if the table is also used for lookups: a row must then stay close
# to itself for any input of the head.
_LOOKED_UP = 10


def find_table(
    model: Any, head: Head | None, targets: Targets
) -> tuple[list[Target], list[Skipped]]:
    """Return the table of a head, or why it is left out; nothing for no head.

    Args:
        model: A built Keras model or layer.
        head: `Head` of it, or None.
        targets: `Targets` of it; a `Dense` head that is not among them is left
            as it is.
    """
    known = [*reversible_embeddings(model), *targets]
    found = [t for t in known if head and t.layer in head.layers]
    if not found:
        return [], []
    (target,) = found
    layer, item = target.layer, slots(target.layer).get(target.attribute)
    if item is not None:
        reason = f"reparameterized; call `{item.finish}`"
    elif layer.quantization_mode is not None:
        reason = f"quantized to {layer.quantization_mode}"
    elif layer.lora_enabled:
        reason = "LoRA is enabled"
    else:
        return [target], []
    return [], [Skipped(target.path, reason)]


def round_table(
    target: Target,
    hidden: Any,
    grid: Grid,
    damping: float,
    verbose: Any,
) -> tuple[Any, float, float]:
    """Round a head so that the logits change least.

    This is GPTQ and a descent over integers and scales (`ops.rounding`), for
    the inputs of the head. A part that is worse on the rows held out is rounded
    to nearest.

    Args:
        target: `Target` of the head, the table or the kernel.
        hidden: `Outputs`.
        grid: `Grid`.
        damping, verbose: As of `quantize`.

    Returns:
        The scales, `(1, groups, classes)`, and `|X W' - X W|^2 / |X W|^2` to
        nearest, and as it was rounded, on the rows held out.
    """
    began = time.perf_counter()
    if target.attribute == "embeddings":
        damping *= _LOOKED_UP
    fit, measured = map(hidden.moment, (hidden.fit, hidden.held))
    scales, sums = [], np.zeros(3)
    count = -(-math.prod(target.shape) // target.contraction_size // _UNITS)
    with Progress(count, "part of the head", verbose, began) as progress:

        def rounded(units: Any) -> Any:
            nonlocal sums
            units = ops.cast(units, "float32")
            after = round_kept(units, fit, grid, damping)
            nearest = round_kept(units, None, grid)
            changes = [each.values - units for each in (nearest, after)]
            whole, *errors = (
                output_energy(each, measured) for each in (units, *changes)
            )
            if errors[1] > errors[0]:
                after, errors[1] = nearest, errors[0]
            sums += (*errors, whole)
            scales.append(after.scales)
            progress.add()
            return after.values

        change_units(target, rounded)
    nearest, error = sums[:2] / (sums[2] or 1)
    stack = ops.concatenate(scales, axis=1)[None]
    return stack, float(nearest), float(error)


def change_units(target: Target, change: Any) -> None:
    """Change a weight by parts: no step takes as much memory as a table.

    Args:
        target: `Target`.
        change: Callable from some units, a tensor (K, `_UNITS` at most), to
            others, exact in the type of the weight.
    """
    axes = target.contraction_axes, target.stack_axes
    dtype = target.variable.dtype
    value = target.variable.value
    (matrix,) = to_stack(value, *axes, 1)
    own, new = map(backend.current().view_of, (value, matrix))
    # On torch the weight itself, where it has a matrix without a copy.
    if (
        new is None
        or not new.flags.writeable
        or not np.may_share_memory(own, new)
    ):
        new = np.empty(matrix.shape, numpy_dtype(dtype))
    # On torch it keeps no gradients.
    with inputs.eager_forward(), inputs.compiled():
        for start in range(0, matrix.shape[1], _UNITS):
            part = slice(start, start + _UNITS)
            units = ops.cast(change(matrix[:, part]), dtype)
            new[:, part] = backend.current().array_of(units)
    stack = backend.current().tensor_of(new[None])
    target.variable.assign(from_stack(stack, target.shape, *axes))


class Outputs:
    """The present outputs of a model, or inputs of a language model's head.

    Args:
        body: Keras model.
        batches, held: Lists of pairs (inputs, sample weights or None).
        verbose: 0 or 1, whether to show progress.

    Attributes:
        batches: List of all of them.
        fit, held: Slices of it.
        states: List of outputs, for each batch.
        used: List of boolean arrays, or None: the positions that count.
    """

    def __init__(
        self, body: Any, batches: Any, held: Any, verbose: Any
    ) -> None:
        self.batches = batches = [*batches, *held]
        place = len(batches) - len(held)
        self.fit = slice(place)
        self.held = slice(place if held else 0, None)
        self.used = [inputs.used_positions(weight) for _, weight in batches]
        with (
            Progress(len(batches), "batch of data", verbose) as progress,
            inputs.eager_forward(),
        ):
            call = keras_compat.graph_call(body)
            self.states = [call(x) for x, _ in progress.each(batches)]

    def moment(self, part: slice) -> Any:
        """Return the mean of h h^T over positions of some batches."""
        total: Any = 0.0
        count = 0
        for state, used in zip(self.states[part], self.used[part]):
            hidden = ops.convert_to_numpy(ops.cast(state, "float32"))
            hidden = hidden[inputs.mask_of(used, hidden.shape[:-1])]
            hidden = hidden.astype("float64")
            total = total + hidden.T @ hidden
            count += len(hidden)
        if not count:
            raise ValueError(
                "`data` must have a position whose weight is not 0. Received: "
                f"{len(self.batches)} batches with none"
            )
        if not np.isfinite(total).all():
            raise ValueError(
                "The hidden states before the head must be finite. Received: "
                "NaN or infinity. Look for bad values in the data."
            )
        return ops.convert_to_tensor((total / count).astype("float32"))
