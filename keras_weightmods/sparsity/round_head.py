"""Rounding the table that is both embedding and head of a language model."""

from typing import Any

import numpy as np
from keras import ops

from keras_weightmods.calibration import inputs as calibration
from keras_weightmods.core import keras_compat, seam
from keras_weightmods.core.head import Head, find_head, reversible_embeddings
from keras_weightmods.core.targets import Target
from keras_weightmods.ops.rounding import Grid, round_kept
from keras_weightmods.ops.sparsegpt import reconstruction_error
from keras_weightmods.utils.progress import Progress

# Rows of the table that are rounded at a time.
_ROWS = 4096


def tied_head(model: Any) -> tuple[Head, Target]:
    """Return the head of a language model, and the table that it shares.

    Raises:
        ValueError: If it has none that can be rounded.
    """
    head = find_head(model) if keras_compat.graph_of(model) else None
    found = [
        target
        for target in reversible_embeddings(model)
        if head is not None
        and target.layer in head.layers
        and target.layer.tie_weights
    ]
    reason: str | None = "no table that serves as embedding and head"
    if found:
        reason = seam.reason_to_skip(found[0])
        if found[0].layer.lora_enabled:
            reason = "LoRA on its embedding"
    if head is None or reason:
        raise ValueError(
            "`head=True` rounds the tied embedding and head of a language "
            "model, as `pack(model, head='int4')` does. Received: "
            f"{model.name!r} with {reason}. Leave `head` out."
        )
    if not ops.all(ops.isfinite(found[0].variable.value)):
        raise ValueError(
            "Rounding needs finite weights. Received: NaN or infinity in "
            f"{found[0].path!r}"
        )
    return head, found[0]


def second_moment(head: Head, batches: Any, verbose: Any) -> Any:
    """Return H, the mean of h h^T over the hidden states that enter the head.

    Args:
        head: `Head`.
        batches: List of pairs of inputs and sample weights, or None.
        verbose: As in `Progress`.

    Returns:
        float32 NumPy array of shape `(K, K)`.
    """
    total: Any = 0.0
    count = 0
    with (
        Progress(len(batches), "batch", verbose) as progress,
        calibration.eager_forward(),
    ):
        for x, weight in progress.each(batches):
            hidden = ops.convert_to_numpy(head.body(x, training=False))
            used = calibration.used_positions(weight)
            if used is not None and used.shape == hidden.shape[:-1]:
                hidden = hidden[used]
            hidden = hidden.reshape(-1, hidden.shape[-1]).astype("float64")
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


def round_table(
    target: Target,
    moment: Any,
    grid: Grid,
    damping: float,
    verbose: Any,
    since: float,
) -> tuple[float, float]:
    """Round a table so that the logits change least; return two errors.

    GPTQ and a descent over integers and scales (`ops.rounding`), each row being
    a unit of the head.

    Returns:
        `|X W' - X W|^2 / |X W|^2` to nearest, and as it was rounded.
    """
    table = ops.cast(target.variable.value, "float32")
    moment = ops.convert_to_tensor(moment)
    parts, sums = [], np.zeros(3)
    starts = range(0, table.shape[0], _ROWS)
    with (
        Progress(len(starts), "part of the head", verbose, since) as progress,
        calibration.eager_forward(),
    ):
        for start in progress.each(starts):
            rows = ops.transpose(table[start : start + _ROWS])
            after, _, nearest = round_kept(rows, moment, grid, damping)
            for i, values in enumerate((nearest, after)):
                change, whole = reconstruction_error(rows, values, moment)
                sums[i] += change
            sums[2] += whole
            parts.append(ops.convert_to_numpy(ops.transpose(after)))
    target.variable.assign(np.concatenate(parts))
    return sums[0] / (sums[2] or 1), sums[1] / (sums[2] or 1)
