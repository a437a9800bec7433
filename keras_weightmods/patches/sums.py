"""Weights as sums of clean values and changes: computed, checked, written."""

import dataclasses
from typing import Any

import numpy as np

from keras_weightmods.patches import tensors
from keras_weightmods.patches.checkpoint import Snapshot
from keras_weightmods.utils.checks import raise_all


@dataclasses.dataclass(frozen=True, eq=False)
class Sum:
    """What a weight is to be.

    Attributes:
        key: String, the weight's key.
        clean: `Snapshot` of what to add to.
        terms: List of triples as in `tensors.rebuilt_pieces`; may be empty.
        places: Array of the places of `clean` in the weight flattened; `None`
            where `clean` is all of it.
    """

    key: str
    clean: Snapshot
    terms: list[Any] = dataclasses.field(default_factory=list)
    places: np.ndarray | None = None


def changed_list(weights, patch, scale):
    """Return the arrays of a list with a patch on them.

    Args:
        weights: `Checkpoint` of a list, which is not touched.
        patch: `Patch`.
        scale: Float.
    """
    sums = {}
    for entry in patch:
        clean = Snapshot(weights.arrays[entry.position])
        term = scale, entry.tensor, entry.replaced
        sums[entry.position] = Sum(entry.key, clean, [term])
    values = {p: snapshot.array for p, snapshot in compute(sums).items()}
    return [values.get(p, array) for p, array in enumerate(weights.arrays)]


def compute(sums, memories=None, check=True):
    """Compute sums, in one pass with the check of the results.

    Args:
        sums: Dict from positions to `Sum`.
        memories: Dict from positions to arrays, where to write these sums.
            Defaults to `None`, for new arrays.
        check: Bool, whether to look for what is not finite, and the like.

    Returns:
        Dict from positions to `Snapshot`.

    Raises:
        ValueError: Listing all that `check` has found.
    """
    memories = memories or {}
    values, targets = {}, {}
    for position, each in sums.items():
        clean = each.clean.array
        if position not in memories and not each.terms:
            values[position] = each.clean
            continue
        out = memories.get(position)
        if out is None:
            out = tensors.empty_aligned(clean.shape, clean.dtype)
        values[position] = Snapshot(out)
        targets[position] = out.reshape(-1)

    def compute_part(position, part):
        each, target = sums[position], targets[position]
        source = each.clean.array.reshape(-1)
        if not each.terms:
            target[part] = source[part]
            return None
        pieces = tensors.rebuilt_pieces(source, each.terms, part, target)
        problems = (_problem(each.key, source, piece) for _, piece in pieces)
        return next(filter(None, problems), None)

    found = tensors.over_parts(compute_part, targets).values()
    first = [next(filter(None, parts), None) for parts in found]
    if check:
        raise_all("The change cannot be written:", filter(None, first))
    return values


def write(model, new, before):
    """Bring weights to the sums `new`; all or, on an error, none.

    Args:
        model: `Checkpoint` of a model.
        new, before: Dicts from positions to `Sum`, what to write and what is
            there.
    """
    memories = {p: model.memory(p) for p in new if new[p].places is None}
    memories = {p: m for p, m in memories.items() if m is not None}
    started = list(memories)
    try:
        values = compute(new, memories)
        for p in new:
            if p not in memories:
                started.append(p)
                model.assign(p, values[p], new[p].places)
    except BaseException:
        values = compute({p: before[p] for p in started}, memories, False)
        for p in started:
            if p not in memories:
                model.assign(p, values[p], before[p].places)
        raise


def _problem(key, clean, result):
    """Return what is wrong with a part of the result for a weight, or None."""
    if not tensors.is_finite(result):
        if not tensors.is_finite(clean):
            return f"{key}: values that are not finite"
        return f"{key}: the result is not finite in {clean.dtype}"
    if key.endswith("moving_variance") and (result < 0).any():
        return (
            f"{key}: the result is a negative variance; take a scale nearer "
            'to 0, or a signature made with `statistics="keep"`'
        )
    return None
