"""Signatures from checkpoints: which weights are taken, and what of them."""

import dataclasses
import time

import numpy as np

from keras_weightmods.core import filters, keras_compat
from keras_weightmods.patches import architecture, tensors
from keras_weightmods.patches.checkpoint import FLOATS, Checkpoint
from keras_weightmods.patches.entry import PatchEntry, float32
from keras_weightmods.utils import checks
from keras_weightmods.utils.progress import Progress

_REPLACED = {"keep": 0.0, "average": 0.5, "replace": 1.0}
_MISMATCH = "The checkpoints do not match:"


def extract(
    init, clean, robust, depth, targets, statistics, name, like, verbose
):
    """Return the fields of a signature; see `WeightSignature.extract`."""
    began = time.perf_counter()
    checks.check_choice("statistics", statistics, _REPLACED)
    checks.check_verbose(verbose)
    # As it is in files.
    checks.check_string("name", name, optional=True)
    if depth is not None and targets is not None:
        expected = f"None where `depth` is given, which is {depth!r}, not both"
        raise checks.error("targets", expected, targets)
    sources = {"init": init, "clean": clean, "robust": robust}
    if init is None:
        del sources["init"]
    checkpoints = {name: Checkpoint(name, x) for name, x in sources.items()}
    with_lora = [
        f"{argument}, {layer.path}: call `kwm.merge_lora(model)` first"
        for argument, each in checkpoints.items()
        if each.model is not None
        for layer in keras_compat.layers_of(each.model)
        if getattr(layer, "lora_enabled", False)
    ]
    checks.raise_all("Signatures are of models without LoRA:", with_lora)
    layout = _layout(checkpoints, like)
    # Shapes and dtypes are the checkpoint's: `like` may have others.
    infos = tuple(
        dataclasses.replace(info, path=named.path)
        for info, named in zip(checkpoints["clean"].infos, layout.infos)
    )
    problems = architecture.problems(
        layout.infos, checkpoints["clean"].infos, "clean"
    )
    checks.raise_all(_MISMATCH, problems)
    for argument, each in checkpoints.items():
        problems += architecture.problems(infos, each.infos, argument)
    checks.raise_all(_MISMATCH, problems)
    stored = architecture.reparameterized(layout)
    for each in checkpoints.values():
        problems += architecture.reparameterization_problems(
            stored, each, infos
        )
    checks.raise_all(_MISMATCH, problems)
    roles = architecture.roles(layout, frozen=True)
    depths = architecture.depths(layout, roles)
    usable_roles = ["weight"] + ["statistic"] * (statistics != "keep")
    usable = [i for i, role in enumerate(roles) if role in usable_roles]
    if targets is None:
        taken = _taken_by_depth(usable, depths, depth)
    else:
        found = filters.matching_weights("targets", targets, layout.model)
        ids = {id(variable) for variable in found}
        taken = [i for i in usable if id(layout.variables[i]) in ids]
        if not taken:
            raise checks.error("targets", "of at least one weight", targets)
    problems = _weight_problems(checkpoints, infos, taken)
    checks.raise_all(_MISMATCH, problems)
    # Each that is taken, and all of them for the hash of each checkpoint.
    steps = len(taken) + len(checkpoints) * len(infos)
    with Progress(steps, "weight", verbose, began) as progress:
        entries = []
        for i in taken:
            values = {
                k: c.read(i).astype("float64") for k, c in checkpoints.items()
            }
            is_replaced = roles[i] == "statistic"
            replaced = _REPLACED[statistics] if is_replaced else 0.0
            if is_replaced:
                tensor = replaced * values["robust"]
            elif init is None:
                tensor = values["robust"] - values["clean"]
            else:
                start = values["init"]
                tensor = residual(
                    values["robust"] - start, values["clean"] - start
                )
            fields = infos[i], float32(tensor), replaced, depths[i]
            entries.append(PatchEntry(*fields))
            progress.add()
        fingerprints = {
            k: c.fingerprint(see=progress.add) for k, c in checkpoints.items()
        }
    return {
        "entries": entries,
        "architecture": infos,
        "method": "difference" if init is None else "rws",
        "name": name,
        "model_class": type(layout.model).__name__,
        "fingerprints": fingerprints,
        "reparameterized": stored,
    }


def residual(change, reference):
    """Return `change` less its projection on `reference`, both flattened.

    RWS (arXiv 2302.12480): what a robust checkpoint learned beyond what clean
    training learned. Where `reference` is zero, that is all of `change`.

    Args:
        change, reference: Arrays of one shape.

    Returns:
        A float64 array of that shape.
    """
    change = np.asarray(change, "float64")
    reference = np.asarray(reference, "float64")
    # Against the overflow of squares, and their underflow.
    largest = np.max(np.abs(reference), initial=0.0)
    if largest == 0.0:
        return change
    unit = reference / largest
    share = np.vdot(change, unit) / np.vdot(unit, unit)
    return change - share * unit


def _layout(checkpoints, like):
    """Return the `Checkpoint` of a model, whose layers and paths count."""
    for argument in ("clean", "robust", "init"):
        found = checkpoints.get(argument)
        if found is not None and found.model is not None:
            return found
    if like is None:
        expected = "a model of the architecture: lists of weights have no names"
        raise checks.error("like", expected, like)
    found = Checkpoint("like", like)
    if found.model is None:
        raise checks.error("like", "a built Keras model", like)
    return found


def _taken_by_depth(usable, depths, depth):
    layers = 1 + max(depths)
    if depth is None:
        depth = min(7, layers)
    if checks.check_int("depth", depth, least=1) > layers:
        expected = f"at most the number of layers with a kernel, {layers}"
        raise checks.error("depth", expected, depth)
    return [i for i in usable if depths[i] < depth]


def _weight_problems(checkpoints, infos, taken):
    """Return what is wrong with the weights taken, as a list of strings."""
    changed = [infos[i] for i in taken]
    problems = []
    for argument, each in checkpoints.items():
        problems += architecture.problems(infos, each.infos, argument, changed)
        problems += [
            f"{argument}, {infos[i].key}: values that are not finite"
            for i in taken
            if each.infos[i].dtype in FLOATS
            and not tensors.is_finite(each.read(i))
        ]
    for i in taken:
        dtypes = {k: c.infos[i].dtype for k, c in checkpoints.items()}
        if len(set(dtypes.values())) > 1:
            listed = ", ".join(f"{k} {v}" for k, v in dtypes.items())
            key = infos[i].key
            problems.append(f"{key}: one dtype is expected, not {listed}")
    return problems
