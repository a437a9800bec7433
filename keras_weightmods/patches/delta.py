"""Deltas: what a fine-tuning changed, as a small file; put on and taken off."""

import os
import warnings
from collections.abc import Collection
from typing import Any

import numpy as np

from keras_weightmods.core.filters import matching_weights
from keras_weightmods.patches import architecture, delta_file
from keras_weightmods.patches.checkpoint import FLOATS, Checkpoint
from keras_weightmods.patches.entry import ChangeEntry
from keras_weightmods.patches.patches import Patches
from keras_weightmods.patches.report import DeltaReport, PatchReport
from keras_weightmods.patches.tensors import Replacing, Sparse, is_finite
from keras_weightmods.saving.atomic_file import check_filepath
from keras_weightmods.utils import checks
from keras_weightmods.utils.dtypes import numpy_dtype
from keras_weightmods.utils.progress import Progress


def save_delta(
    model: Any,
    base: Any,
    filepath: Any,
    dtype: str | None = "bfloat16",
    overwrite: bool = True,
    *,
    whole: Any = None,
    verbose: int = 1,
) -> DeltaReport:
    """Store what is different in a model from the one it was trained from.

    The file holds for each weight the places of the entries that differ, in
    less than 6 bits each at a density of 5 %, and the differences, in about
    10.5 bits each in bfloat16, as an entropy coder leaves them: no more than
    a bfloat16 LoRA of as many numbers takes, after LIFT. Places that
    `PrincipalMaskCallback(criterion="random")` drew once are not in the file
    but drawn again from their seed, if `model` has the optimizer that it was
    trained with; the numbers of all of them are stored then. The file is bound
    to the base by a hash of all its weights. A delta of a model with companders
    is one of what they store, and goes onto models with the same ones alone;
    call `fold` first for one of plain weights. A list does not say which it
    holds.

    Args:
        model: A built Keras model.
        base: What it was before: a model, or the list that
            `model.get_weights()` returned then.
        filepath: String or path, of the file to write.
        dtype: `"bfloat16"`, `"float16"` or `"float32"`, of the differences.
            `None` stores no differences but the new values of these entries,
            in the type of the weight: applied at scale 1, and where no other
            patch changes the entry, they give the model bit for bit.
            Differences, in float32 too, are rounded. Defaults to
            `"bfloat16"`, with an error of at most 2^-9 of the
            difference. What is too small for float16 is stored as 0, and
            counted in a warning.
        overwrite: Bool, whether to replace a file. Defaults to `True`.
        whole: Weights that are stored with all their values, exactly, as they
            are no part of a base that others have: a new head. They may be
            others in the model that gets the delta, which replaces them. A
            regex searched for in the paths; a layer of `model` or a layer
            type, for all weights inside of them; or a list of these. Defaults
            to `None`, for none.
        verbose: 0 or 1. 0 shows no progress bar; 1 shows one once it has
            taken two seconds. Defaults to `1`.

    Returns:
        A `DeltaReport`.

    Raises:
        ValueError: If the two have other weights or companders, differ in
            nothing, in weights that are no floats or by what is not finite;
            all problems are listed. If an element of `whole` matches no
            weight, or `model` is no model then. No file is written.
        FileExistsError: If the file exists and `overwrite` is False.

    Example:

    ```python
    import os
    import tempfile
    import keras
    import numpy as np
    import keras_weightmods as kwm

    model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(8)])
    model.compile(kwm.SparseAdamW(1e-3), "mse")
    base = model.get_weights()
    x = np.random.normal(size=(32, 16))
    model.fit(
        x, x[:, :8], verbose=0, callbacks=[kwm.PrincipalMaskCallback(0.25)]
    )
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "task.safetensors")
        kwm.save_delta(model, base, path)
        model.set_weights(base)
        kwm.apply_delta(model, path)
        kwm.remove_delta(model)
    assert np.array_equal(model.get_weights()[0], base[0])
    ```
    """
    checks.check_choice("dtype", dtype, (*delta_file.DTYPES, None))
    checks.check_verbose(verbose)
    check_filepath(filepath, overwrite)
    new, old = Checkpoint("model", model), Checkpoint("base", base)
    problems = architecture.problems(new.infos, old.infos, "`base`")
    problems += [
        f"`base`, {a.key}: {b.dtype} of shape {b.shape}, and {a.dtype} of "
        f"{a.shape} is expected"
        for a, b in zip(new.infos, old.infos)
        if (a.shape, a.dtype) != (b.shape, b.dtype)
    ]
    checks.raise_all("The models do not have the same weights:", problems)
    layout = old if new.model is None else new
    stored = architecture.reparameterized(layout)
    problems = architecture.reparameterization_problems(stored, old, old.infos)
    checks.raise_all("The models do not have the same weights:", problems)
    replaced = _positions("whole", whole, model)
    # Each is compared, read once more for the hash, and written.
    with Progress(3 * len(new.infos), "weight", verbose) as progress:
        entries, seeds = _differences(
            new, old, dtype, replaced, _drawn_masks(model), progress
        )
        return write_entries(
            *(filepath, entries, old, dtype, overwrite, replaced, progress),
            *(stored, seeds),
        )


def _drawn_masks(model: Any) -> dict[int, tuple[int, np.ndarray]]:
    """Return seeds and places of the masks that a seed draws, by position."""
    optimizer = getattr(model, "optimizer", None)
    # Loss scaling has another in it.
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    # Optimizers are of a floor above this one.
    find = getattr(optimizer, "drawn_masks", list)
    positions = {id(v): p for p, v in enumerate(getattr(model, "weights", ()))}
    return {
        positions[id(variable)]: (seed, places)
        for variable, seed, places in find()
        if id(variable) in positions
    }


def _differences(
    new: Checkpoint,
    old: Checkpoint,
    dtype: str | None,
    replaced: set[int],
    drawn: dict[int, tuple[int, np.ndarray]],
    progress: Progress,
) -> tuple[list[ChangeEntry], dict[int, int]]:
    """Return what `save_delta` stores, all of it checked.

    Returns:
        The entries, and the seeds of those of which the places are drawn, by
        position.
    """
    entries, problems, seeds = [], [], {}
    lost = count = 0
    for info in new.infos:
        progress.add()
        before, after = old.read(info.position), new.read(info.position)
        is_changed = _bits(before) != _bits(after)
        places = np.flatnonzero(is_changed)
        if info.position in replaced:
            places = np.arange(after.size)
        elif info.position in drawn:
            seed, mask = drawn[info.position]
            # Those without a change cost more than places: few, or none where
            # new values replace what other patches make of them.
            most = 0 if dtype is None else mask.size // 32
            unchanged = mask[~is_changed[mask]]
            if (
                mask.size - unchanged.size == places.size
                and unchanged.size <= most
                and is_finite(after.reshape(-1)[unchanged])
            ):
                places, seeds[info.position] = mask.astype("int64"), seed
        if places.size and info.dtype not in FLOATS:
            problems.append(
                f"{info.key}: {info.dtype}, which has changed. A delta holds "
                "floats alone: to leave this out, give it the value that it "
                "has in `base`"
            )
        if not places.size or info.dtype not in FLOATS:
            continue
        if dtype is None or info.position in replaced:
            values = after.reshape(-1)[places]
            if not np.all(np.isfinite(values.astype("float64"))):
                problems.append(f"{info.key}: values that are not finite")
            entries.append(ChangeEntry(info, Replacing(places, values)))
            continue
        wide = "float64" if info.dtype == "float64" else "float32"
        before, after = (
            x.reshape(-1)[places].astype(wide) for x in (before, after)
        )
        with np.errstate(over="ignore", invalid="ignore"):
            change = (after - before).astype(numpy_dtype(dtype))
        # Added to 0.0 and to -0.0 it leaves the sign.
        change[~is_changed[places]] = -0.0
        if not np.all(np.isfinite(change.astype("float32"))):
            problems.append(f"{info.key}: a change that is not finite")
        lost += int(np.count_nonzero((change == 0) & (after != before)))
        count += change.size
        entries.append(ChangeEntry(info, Sparse(places, change)))
    checks.raise_all("The change cannot be stored:", problems)
    if not entries:
        raise ValueError(
            "`model` must differ from `base`. Received: two models with equal "
            "weights. Pass the list that `model.get_weights()` returned "
            "before the training."
        )
    if lost:
        warnings.warn(
            f"{lost} of {count} changes are too small for {dtype} and stored "
            "as 0. Take a `dtype` of more range: bfloat16 has that of float32, "
            "and None is exact.",
            stacklevel=3,
        )
    return entries, seeds


def apply_delta(
    model: Any,
    filepath: Any,
    scale: float = 1.0,
    name: str | None = None,
    force: bool = False,
    verbose: int = 1,
) -> PatchReport:
    """Put a delta on the model that it was made for.

    Several can be on a model at once, and signatures with them: they are all
    in `Patches(model)`. A weight is computed anew from what it is without any
    of them, `base + sum of scale * change`, rounded once, so the order leaves
    no trace; what was at the places is kept in memory, and `remove_delta` puts
    it back bit for bit.

    Args:
        model: A built Keras model.
        filepath: String or path, of a file of `save_delta`.
        scale: Float. Defaults to 1.
        name: String, under which to remove it. Defaults to the name of the
            file without its ending.
        force: Bool, whether to put it on another base model with weights of
            the same shapes. Defaults to `False`.
        verbose: As in `save_delta`.

    Returns:
        A `PatchReport`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is not whole, the model is not the base or has
            other weights or companders, weights were changed since they were
            patched, the name is taken, the delta is on the model already, or
            the result is not finite. The model is unchanged then.

    Example:

    ```python
    import os
    import tempfile
    import keras
    import keras_weightmods as kwm

    model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(8)])
    base = model.get_weights()
    model.set_weights([base[0] + 0.5, base[1]])
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "task.safetensors")
        kwm.save_delta(model, base, path)
        model.set_weights(base)
        report = kwm.apply_delta(model, path, scale=0.5)
    assert report.active == {"task": 0.5}
    ```
    """
    checks.check_verbose(verbose)
    patches = Patches(model)
    with Progress(2, "step", verbose) as progress:
        delta = delta_for(model, filepath, force)
        progress.add()
        if name is None:
            name = os.path.splitext(os.path.basename(os.fspath(filepath)))[0]
        return patches.add(delta, scale, name)


def remove_delta(
    model: Any,
    name: str | None = None,
    force: bool = False,
    verbose: int = 1,
) -> PatchReport:
    """Take a delta off a model, bit for bit.

    Args:
        model: The Keras model.
        name: String, the delta's name. May be left out if there is one.
        force: Bool, whether to put back what was at the delta's places also if
            they were changed since, by training for instance. A delta is
            subtracted where a signature is on the weight too. Defaults to
            `False`.
        verbose: As in `save_delta`.

    Returns:
        A `PatchReport`.

    Raises:
        ValueError: If there is no such delta, or weights were changed since
            and `force` is not set. The model is unchanged then.

    Example:

    ```python
    import os
    import tempfile
    import keras
    import keras_weightmods as kwm

    model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(8)])
    base = model.get_weights()
    model.set_weights([base[0] + 0.5, base[1]])
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "task.safetensors")
        kwm.save_delta(model, base, path)
        model.set_weights(base)
        kwm.apply_delta(model, path, name="half", scale=0.5)
    kwm.remove_delta(model, "half")
    assert (model.get_weights()[0] == base[0]).all()
    ```
    """
    checks.check_verbose(verbose)
    patches = Patches(model)
    deltas = [
        each
        for each in patches
        if isinstance(patches[each].change, delta_file.Delta)
    ]
    if name is None and len(deltas) == 1:
        (name,) = deltas
    if not isinstance(name, str) or name not in deltas:
        expected = f"that of a delta on this model object: there are {deltas}"
        raise checks.error("name", expected, name)
    with Progress(1, "step", verbose):
        return patches.remove(name, force)


def write_entries(
    filepath: Any,
    entries: list[ChangeEntry],
    base: Checkpoint,
    dtype: str | None,
    overwrite: bool,
    whole: Collection[int],
    progress: Progress,
    stored: dict[str, str] | None = None,
    drawn: dict[int, int] | None = None,
) -> DeltaReport:
    """Write the changes of a base to a file; return the report.

    Two steps of progress for each weight of the base. `stored` is what
    `architecture.reparameterized` returns, `None` for that of the base; `drawn`
    as in `Delta`.
    """
    if stored is None:
        stored = architecture.reparameterized(base)
    count = len(base.infos)
    fingerprint = base.fingerprint(without=whole, see=progress.add)
    delta = delta_file.Delta(
        *(tuple(entries), count, fingerprint, tuple(sorted(whole)), stored),
        drawn or {},
    )
    index_bits = delta_file.write_delta(
        filepath, delta, dtype or "bfloat16", overwrite, progress.add
    )
    return DeltaReport(
        filepath=os.fspath(filepath),
        weights=tuple(entry.key for entry in entries),
        entries=sum(entry.tensor.places.size for entry in entries),
        index_bits=index_bits,
        nbytes=os.path.getsize(filepath),
    )


def delta_for(
    model: Any, filepath: Any, force: bool = False
) -> delta_file.Delta:
    """Return the delta in a file, which must be one for this model.

    Args:
        model: A built Keras model, with or without patches.
        filepath: String or path.
        force: Bool, whether other weights of the same shapes will do.

    Raises:
        ValueError: If the file is not whole, or for another model.
    """
    checks.check_bool("force", force)
    delta = delta_file.read_delta(filepath)
    checkpoint = Checkpoint("model", model)
    checks.raise_all(
        "The delta does not fit the model:", delta.problems(checkpoint)
    )
    # The hash, which would tell, is not looked at.
    if (
        force
        and not delta.reparameterized
        and architecture.reparameterized(checkpoint)
    ):
        warnings.warn(
            "`model` has companders, and the delta does not say that it is of "
            "what they store. For one of plain weights, call "
            "`kwm.fold(model)` first.",
            # The caller of `apply_delta`.
            stacklevel=3,
        )
    clean = "" if force else Patches(model).clean_fingerprint(delta.whole)
    if not force and clean != delta.fingerprint:
        raise ValueError(
            "The model must be the one that the delta was made for, and its "
            "weights are others. Load the base model, or pass `force=True` to "
            f"put the changes on this one. Received: model={model.name!r}, "
            f"filepath={os.fspath(filepath)!r}"
        )
    return delta


def _positions(name: str, patterns: Any, model: Any) -> set[int]:
    """Return the positions of the weights that the patterns match."""
    if patterns is None:
        return set()
    checks.check_model(model)
    ids = {id(v) for v in matching_weights(name, patterns, model)}
    return {p for p, v in enumerate(model.weights) if id(v) in ids}


def _bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(f"u{array.itemsize}")
