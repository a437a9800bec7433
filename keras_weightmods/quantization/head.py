"""Rounding the head of a language model, by the logits that it gives."""

import time
from typing import Any

import numpy as np
from keras import ops

from keras_weightmods.calibration import inputs
from keras_weightmods.core.head import Head, find_head, reversible_embeddings
from keras_weightmods.core.reparameterization import slots
from keras_weightmods.core.targets import Target, Targets
from keras_weightmods.ops.rounding import Grid, round_kept
from keras_weightmods.ops.sparsegpt import reconstruction_error
from keras_weightmods.utils.matrix import from_matrix, to_matrix
from keras_weightmods.utils.progress import Progress
from keras_weightmods.utils.report import Skipped

# Units of the head that are rounded at a time.
UNITS = 4096


def find_table(
    model: Any, targets: Targets
) -> tuple[Head | None, list[Target], list[Skipped]]:
    """Return the head of a language model, with its table or why it is left.

    Other models have none of the three.

    Args:
        model: A built Keras model or layer.
        targets: `Targets` of it; a `Dense` head that is not among them is left
            as it is.
    """
    head = find_head(model)
    known = [*reversible_embeddings(model), *targets]
    found = [t for t in known if head and t.layer in head.layers]
    if not found:
        return None, [], []
    (target,) = found
    layer, item = target.layer, slots(target.layer).get(target.attribute)
    if item is not None:
        reason = f"reparameterized; call `{item.finish}`"
    elif layer.quantization_mode is not None:
        reason = f"quantized to {layer.quantization_mode}"
    elif layer.lora_enabled:
        reason = "LoRA is enabled"
    else:
        return head, [target], []
    return head, [], [Skipped(target.path, reason)]


def round_table(
    head: Head,
    target: Target,
    batches: Any,
    held: Any,
    grid: Grid,
    damping: float,
    verbose: Any,
) -> tuple[float, float]:
    """Round a head so that the logits change least; return two errors.

    GPTQ and a descent over integers and scales (`ops.rounding`), for the
    hidden states that enter the head; a part that is worse on the rows held
    out is rounded to nearest.

    Returns:
        `|X W' - X W|^2 / |X W|^2` to nearest, and as it was rounded, on the
        rows held out.
    """
    began = time.perf_counter()
    fit, measured = (
        ops.convert_to_tensor(_second_moment(head, each, verbose))
        for each in (batches, held or batches)
    )
    axes = target.contraction_axes
    table = ops.cast(to_matrix(target.variable.value, axes), "float32")
    parts, sums = [], np.zeros(3)
    starts = range(0, table.shape[1], UNITS)
    with (
        Progress(len(starts), "part of the head", verbose, began) as progress,
        inputs.eager_forward(),
        inputs.compiled(),
    ):
        for start in progress.each(starts):
            units = table[:, start : start + UNITS]
            after, *_ = round_kept(units, fit, grid, damping)
            nearest, *_ = round_kept(units, None, grid)
            errors = []
            for values in (nearest, after):
                change, whole = reconstruction_error(units, values, measured)
                errors.append(change)
            if errors[1] > errors[0]:
                after, errors[1] = nearest, errors[0]
            sums += (*errors, whole)
            parts.append(ops.convert_to_numpy(after))
    rounded = np.concatenate(parts, axis=1)
    target.variable.assign(from_matrix(rounded, target.shape, axes))
    nearest, error = sums[:2] / (sums[2] or 1)
    return float(nearest), float(error)


def _second_moment(head: Head, batches: Any, verbose: Any) -> Any:
    """Return the mean of h h^T over the hidden states that enter the head.

    Positions of weight 0 are left out.
    """
    total: Any = 0.0
    count = 0
    with (
        Progress(len(batches), "batch", verbose) as progress,
        inputs.eager_forward(),
    ):
        for x, weight in progress.each(batches):
            hidden = ops.convert_to_numpy(head.body(x, training=False))
            used = inputs.used_positions(weight)
            hidden = hidden[inputs.mask_of(used, hidden.shape[:-1])]
            hidden = hidden.astype("float64")
            total = total + hidden.T @ hidden
            count += len(hidden)
    if not count:
        raise ValueError(
            "`data` must have a position whose weight is not 0. Received: "
            f"{len(batches)} batches with none"
        )
    if not np.isfinite(total).all():
        raise ValueError(
            "The hidden states before the head must be finite. Received: NaN "
            "or infinity. Look for what comes in the data."
        )
    return (total / count).astype("float32")
