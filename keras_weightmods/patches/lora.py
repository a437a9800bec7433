"""Patches as LoRA adapters, and the way back."""

import os
import warnings
from typing import Any

import numpy as np
from keras import ops

from keras_weightmods.core.reparameterization import reparameterizations
from keras_weightmods.core.targets import find_targets
from keras_weightmods.ops.low_rank import choose_method, low_rank_factors
from keras_weightmods.patches import lora_files, tensors
from keras_weightmods.patches.checkpoint import Checkpoint
from keras_weightmods.patches.delta_file import DTYPES
from keras_weightmods.patches.entry import PatchEntry
from keras_weightmods.patches.lora_files import Factors, position_of
from keras_weightmods.patches.report import LoraKernel, LoraReport
from keras_weightmods.patches.tensors import Replacing, Sparse
from keras_weightmods.utils import checks
from keras_weightmods.utils.dtypes import numpy_dtype
from keras_weightmods.utils.progress import Progress
from keras_weightmods.utils.report import Skipped

# Kernels are filled up to it with zeros.
_MOST_RANK = 2**14


def check_arguments(
    filepath: Any, rank: int, format: str, overwrite: bool
) -> None:
    """Raise an error where an adapter cannot be written."""
    checks.check_int("rank", rank, 1, _MOST_RANK)
    checks.check_choice("format", format, tuple(lora_files.FORMATS))
    checks.check_bool("overwrite", overwrite)
    lora_files.check_path(filepath, format, overwrite)


def check_plain(model: Any) -> None:
    """Raise ValueError where weights are reparameterized."""
    if reparameterizations(model):
        raise ValueError(
            "The weights of `model` must be plain, as LoRA is added to them. "
            "Call `kwm.fold(model)` first, or `kwm.unpack(model)` where they "
            f"are packed. Received: model={model.name!r}"
        )


def write(
    patch: Any,
    model: Any,
    filepath: Any,
    rank: int,
    format: str,
    progress: Progress,
) -> LoraReport:
    """Write a patch as an adapter; see `Patch.to_lora`."""
    values = Checkpoint("model", model)
    targets = find_targets(model)
    by_position = {position_of(target): target for target in targets}
    file = lora_files.FORMATS[format](model, targets)
    factors: list[Factors] = []
    kernels: list[LoraKernel] = []
    skipped = []
    whole = lost = 0.0
    # The last step is the file.
    progress.total = 1 + len(patch)
    for entry in patch:
        progress.add()
        start = values.read(entry.position).astype("float32")
        if not isinstance(entry.tensor, Replacing):
            # Exact, where a sum and a difference would round.
            start = np.zeros_like(start)
        changed = np.empty_like(start)
        term = 1.0, entry.tensor, entry.replaced
        for _ in tensors.rebuilt_pieces(start, [term], out=changed):
            pass
        dense = changed - start
        size = float(np.sum(np.square(dense, dtype="float64")))
        whole += size
        target = by_position.get(entry.position)
        reason = "no kernel of a layer"
        if target is not None:
            reason = file.reason_to_skip(target)
        if reason is not None or not size:
            skipped.append(Skipped(entry.key, reason or "unchanged"))
            lost += size
            continue
        made, rest = _factors(file.to_matrix(dense, target), target, rank)
        factors.append(made)
        error = (rest / size) ** 0.5
        kernels.append(LoraKernel(target.key, target.shape, error))
        lost += rest
    if not factors:
        reasons = "; ".join(f"{each.path}: {each.reason}" for each in skipped)
        raise ValueError(
            "The patch must have changes that an adapter can hold. Left out: "
            f"{reasons}. Received: {patch!r}"
        )
    file.write(filepath, factors, rank)
    report = LoraReport(
        os.fspath(filepath),
        rank,
        tuple(kernels),
        (lost / whole) ** 0.5,
        tuple(skipped),
    )
    if skipped:
        left = [each.path for each in skipped]
        warnings.warn(
            f"The adapter has not the changes of {len(left)} of the patch's "
            f"{len(patch)} weights, as {left[:3]}: they are no kernels that it "
            f"can hold. The report has the reasons, and the adapter lacks "
            f"{report.error:.1%} of the change in all.",
            stacklevel=3,
        )
    return report


def changes(
    model: Any, lora: Any, dtype: str | None, verbose: int
) -> dict[str, Any]:
    """Return the fields of the patch of an adapter; see `Patch.from_lora`."""
    checks.check_choice("dtype", dtype, (*DTYPES, None))
    checks.check_verbose(verbose)
    with Progress(1, "weight", verbose) as progress:
        format = lora_files.format_of(lora)
        file = lora_files.FORMATS[format](model, find_targets(model))
        found = file.read(lora)
        values = Checkpoint("model", model)
        # Each weight is read for the hash, and each of these once more.
        progress.total = len(values.infos) + len(found)
        entries = []
        for each in found:
            progress.add()
            change = file.from_matrix(each.left @ each.right, each.target)
            entry = _entry_of(change, position_of(each.target), values, dtype)
            if not np.all(np.isfinite(entry.numbers.astype("float32"))):
                expected = f"of finite numbers, those of {entry.key} too"
                raise checks.error("lora", expected, os.fspath(lora))
            if entry.size:
                entries.append(entry)
        if not entries:
            raise checks.error("lora", "an adapter that changes a kernel", lora)
        entries.sort(key=lambda entry: entry.position)
        return {
            "entries": tuple(entries),
            "count": len(values.infos),
            "base": values.fingerprint(see=progress.add),
        }


def _entry_of(
    change: np.ndarray, position: int, values: Checkpoint, dtype: str | None
) -> PatchEntry:
    """Return the entry of a delta that adds a change to a weight."""
    places = np.flatnonzero(change)
    numbers: Any = change.reshape(-1)[places]
    info = values.infos[position]
    if dtype is not None:
        numbers = numbers.astype(numpy_dtype(dtype))
        return PatchEntry(info, Sparse(places, numbers))
    base = values.read(position).reshape(-1)[places]
    numbers = (base.astype("float32") + numbers).astype(base.dtype)
    return PatchEntry(info, Replacing(places, numbers))


def _factors(matrix: Any, target: Any, rank: int) -> tuple[Factors, float]:
    """Return the factors nearest to a matrix, and the square of the rest."""
    rows, columns = matrix.shape
    inner = min(rank, rows, columns)
    method = choose_method("auto", rows, columns, inner)
    tensor = ops.convert_to_tensor(np.ascontiguousarray(matrix))
    left, right = map(
        ops.convert_to_numpy, low_rank_factors(tensor, inner, method)
    )
    # One has orthonormal vectors, and the other the singular values.
    sizes = np.linalg.norm(left, axis=0) * np.linalg.norm(right, axis=1)
    root = np.sqrt(sizes)
    left = left * _ratio(root, np.linalg.norm(left, axis=0))
    right = right * _ratio(root, np.linalg.norm(right, axis=1))[:, None]
    rest = np.sum(np.square(matrix - left @ right, dtype="float64"))
    left = np.pad(left, ((0, 0), (0, rank - inner))).astype("float32")
    right = np.pad(right, ((0, rank - inner), (0, 0))).astype("float32")
    return Factors(target, left, right), float(rest)


def _ratio(a: Any, b: Any) -> Any:
    return np.divide(a, b, out=np.zeros_like(a), where=b > 0)
