"""Deltas: the changes that a fine-tuning made to a model."""

from typing import Any

import numpy as np

from keras_weightmods.core.filters import matching_weights
from keras_weightmods.patches.checkpoint import Checkpoint, mismatches
from keras_weightmods.patches.entry import (
    FLOATS,
    PatchEntry,
    Replacing,
    Sparse,
)
from keras_weightmods.patches.files import DIFFERENCES
from keras_weightmods.patches.tensors import is_finite
from keras_weightmods.utils import checks
from keras_weightmods.utils.dtypes import numpy_dtype
from keras_weightmods.utils.progress import Progress


def differences(
    model: Any, base: Any, dtype: str | None, whole: Any, verbose: int
) -> dict[str, Any]:
    """Return the fields of a patch; see `Patch.from_models`."""
    checks.check_choice("dtype", dtype, (*DIFFERENCES, None))
    checks.check_verbose(verbose)
    checks.check_model(model)
    new, old = Checkpoint("model", model), Checkpoint("base", base)
    everything = range(len(new.infos))
    problems = mismatches(new.infos, old.infos, "`base`", everything, True)
    checks.raise_all("The models do not have the same weights:", problems)
    replaced: set[int] = set()
    if whole is not None:
        ids = {id(v) for v in matching_weights("whole", whole, model)}
        replaced = {p for p, v in enumerate(model.weights) if id(v) in ids}
    drawn = _drawn_masks(model)
    entries: list[PatchEntry] = []
    problems = []
    # Each weight is compared, and read again for the hash.
    with Progress(2 * len(new.infos), "weight", verbose) as progress:
        hash_of_base = old.fingerprint(without=replaced, see=progress.add)
        for info in progress.each(new.infos):
            before, after = (
                np.ascontiguousarray(each.read(info.position)).reshape(-1)
                for each in (old, new)
            )
            bits = f"u{before.itemsize}"
            is_changed = before.view(bits) != after.view(bits)
            places, seed = np.flatnonzero(is_changed), None
            if info.position in replaced:
                places = np.arange(after.size)
            elif info.position in drawn:
                drawn_from, mask = drawn[info.position]
                # Entries without a change cost more than places. So only a few
                # are allowed, and none if new values replace those of other
                # patches.
                most = 0 if dtype is None else mask.size // 32
                unchanged = mask[~is_changed[mask]]
                if (
                    mask.size - unchanged.size == places.size
                    and unchanged.size <= most
                    and is_finite(after[unchanged])
                ):
                    places, seed = mask.astype("int64"), drawn_from
            if not places.size:
                continue
            if info.dtype not in FLOATS:
                problems.append(
                    f"{info.key}: {info.dtype}, which has changed. A delta "
                    "holds floats alone: to leave this out, give it the value "
                    "that it has in `base`"
                )
                continue
            if dtype is None or info.position in replaced:
                tensor: Sparse = Replacing(places, after[places])
            else:
                wide = "float64" if info.dtype == "float64" else "float32"
                a, b = (x[places].astype(wide) for x in (after, before))
                with np.errstate(over="ignore", invalid="ignore"):
                    change = (a - b).astype(numpy_dtype(dtype))
                # Adding it to 0.0 or -0.0 keeps the sign.
                change[~is_changed[places]] = -0.0
                tensor = Sparse(places, change)
            entries.append(PatchEntry(info, tensor, seed=seed))
    checks.raise_all("The change cannot be stored:", problems)
    if not entries:
        raise ValueError(
            "`model` must differ from `base`. Received: two models with equal "
            "weights. Pass the list that `model.get_weights()` returned "
            "before the training."
        )
    return {
        "entries": tuple(entries),
        "architecture": new.infos,
        "base": hash_of_base,
        "whole": tuple(sorted(replaced)),
    }


def _drawn_masks(model: Any) -> dict[int, tuple[int, np.ndarray]]:
    """Return the seeds and places of masks drawn from a seed, by position."""
    optimizer = getattr(model, "optimizer", None)
    # Loss scaling wraps another optimizer.
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    # Optimizers are on a floor above this one.
    find = getattr(optimizer, "drawn_masks", list)
    positions = {id(v): p for p, v in enumerate(getattr(model, "weights", ()))}
    return {
        positions[id(variable)]: (seed, places)
        for variable, seed, places in find()
        if id(variable) in positions
    }
