"""Deltas as LoRA adapters, and the way back."""

import dataclasses
import os
import warnings
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_weightmods.core.reparameterization import reparameterizations
from keras_weightmods.core.targets import find_targets
from keras_weightmods.ops.low_rank import choose_method, low_rank_factors
from keras_weightmods.patches import lora_files
from keras_weightmods.patches.checkpoint import Checkpoint
from keras_weightmods.patches.delta import delta_for, write_entries
from keras_weightmods.patches.delta_file import DTYPES
from keras_weightmods.patches.entry import ChangeEntry
from keras_weightmods.patches.lora_files import Factors, position_of
from keras_weightmods.patches.patches import Patches
from keras_weightmods.patches.report import DeltaReport
from keras_weightmods.patches.tensors import Replacing, Sparse
from keras_weightmods.saving.atomic_file import check_filepath
from keras_weightmods.utils import checks
from keras_weightmods.utils.dtypes import numpy_dtype
from keras_weightmods.utils.progress import Progress
from keras_weightmods.utils.report import Report, Skipped, Table, shape_text


@dataclasses.dataclass(frozen=True)
class LoraKernel:
    """One kernel of a `LoraReport`.

    Attributes:
        key: String, the key of its target.
        shape: Tuple of ints.
        error: Float, what the product lacks of the change: the norm of the
            difference over that of the change.
    """

    key: str
    shape: tuple[int, ...]
    error: float


@dataclasses.dataclass(frozen=True)
class LoraReport(Report):
    """What `delta_to_lora` wrote.

    Attributes:
        filepath: String, the file or folder.
        rank: Int.
        kernels: Tuple of `LoraKernel`.
        error: Float, what the adapter lacks of the whole change, that of the
            skipped weights too: the norm of the difference over that of the
            change.
        skipped: Tuple of `Skipped`: weights whose change is not in it.
    """

    filepath: str
    rank: int
    kernels: tuple[LoraKernel, ...]
    error: float
    skipped: tuple[Skipped, ...] = ()

    def tables(self) -> Iterator[Table]:
        """The `Table`s to print."""
        yield Table(
            f"{self.filepath}: rank {self.rank}, lacks {self.error:.1%} of the "
            "change",
            ("kernel", "shape", "lacks"),
            tuple(
                (each.key, shape_text(each.shape), f"{each.error:.1%}")
                for each in self.kernels
            ),
        )


# Kernels are filled up to it with zeros.
_MOST_RANK = 2**14


def delta_to_lora(
    model: keras.Model,
    delta: Any,
    filepath: Any,
    rank: int = 16,
    format: str = "peft",
    *,
    force: bool = False,
    overwrite: bool = True,
    verbose: int = 1,
) -> LoraReport:
    """Write a delta as a LoRA adapter, the nearest one of a rank.

    The change D of each kernel becomes the product of two factors (LoRA, arXiv
    2106.09685, equation 3) by its truncated singular value decomposition, the
    best approximation of that rank. A change by LIFT
    is of high rank: the report says what is lost. What an adapter cannot hold,
    biases and norms for instance, is left out with a warning.

    - `"peft"`: a folder with `adapter_model.safetensors` and
      `adapter_config.json`, for the model that
      `kwm.export(model, path, "transformers")` writes. Kernels that
      transformers holds as a part of a tensor, as GPT-2's query, are left out.
    - `"keras_hub"`: a file that ends in `.lora.h5`. Call
      `backbone.enable_lora(rank, names)` with the names of the layers in the
      report, then `backbone.load_lora_weights(filepath)`.

    Args:
        model: A KerasHub model or backbone, the base of the delta, without
            patches. It is not changed.
        delta: String or path, of a file of `save_delta` for this model.
        filepath: String or path of the file or folder to write.
        rank: Int, at most 16,384. Kernels with a side below it get zeros.
            Defaults to 16.
        format: `"peft"` or `"keras_hub"`. Defaults to `"peft"`.
        force: Bool, whether to take a delta of another base with weights of
            the same shapes. Defaults to `False`.
        overwrite: Bool, whether to replace an adapter that is there: its two
            files, of a folder; what else is in it stays. Defaults to `True`.
        verbose: As in `save_delta`.

    Returns:
        A `LoraReport`.

    Raises:
        FileNotFoundError: If there is no such delta.
        ValueError: If an argument is not as above, the delta is not one for
            this model, none of its changes can be in an adapter, or the folder
            holds other weights of one, as `adapter_model.bin`. Nothing is
            written then.
        FileExistsError: If there is a file and `overwrite` is `False`.

    Example:

    ```python
    import os
    import tempfile
    import keras_weightmods as kwm
    from keras_hub import models

    model = models.Llama3CausalLM(
        models.Llama3Backbone(96, 1, 4, 32, 64, 2), preprocessor=None
    )
    base = model.get_weights()
    kernel = kwm.find_targets(model)[0].variable
    kernel.assign(kernel + 0.1)
    with tempfile.TemporaryDirectory() as folder:
        delta = os.path.join(folder, "task.safetensors")
        kwm.save_delta(model, base, delta)
        model.set_weights(base)
        path = os.path.join(folder, "task.lora.h5")
        report = kwm.delta_to_lora(model, delta, path, 1, "keras_hub")
    assert report.error < 0.01
    ```
    """
    checks.check_int("rank", rank, 1, _MOST_RANK)
    checks.check_choice("format", format, tuple(lora_files.FORMATS))
    checks.check_bool("overwrite", overwrite)
    checks.check_verbose(verbose)
    lora_files.check_path(filepath, format, overwrite)
    _check_plain(model)
    with Progress(1, "weight", verbose) as progress:
        change = delta_for(model, delta, force)
        values = Checkpoint("model", model)
        targets = find_targets(model)
        by_position = {position_of(target): target for target in targets}
        file = lora_files.FORMATS[format](model, targets)
        factors: list[Factors] = []
        kernels: list[LoraKernel] = []
        skipped = []
        whole = lost = 0.0
        # The last step is the file.
        progress.total = 1 + len(change.entries)
        for entry in change:
            progress.add()
            dense = _change_of(entry, values.read(entry.position))
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
            kernels.append(
                LoraKernel(target.key, target.shape, (rest / size) ** 0.5)
            )
            lost += rest
        if not factors:
            reasons = "; ".join(
                f"{each.path}: {each.reason}" for each in skipped
            )
            expected = "one with changes that an adapter can hold"
            raise checks.error(
                "delta", f"{expected}. Left out: {reasons}", delta
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
            f"The adapter has not the changes of {len(left)} of the delta's "
            f"{len(change.entries)} weights, as {left[:3]}: they are no "
            "kernels that it can hold. The report has the reasons, and the "
            f"adapter lacks {report.error:.1%} of the change in all.",
            stacklevel=2,
        )
    return report


def lora_to_delta(
    model: keras.Model,
    lora: Any,
    filepath: Any,
    dtype: str | None = "bfloat16",
    overwrite: bool = True,
    *,
    verbose: int = 1,
) -> DeltaReport:
    """Write a LoRA adapter as a delta of its base.

    The change of a kernel is alpha / rank * B A (arXiv 2106.09685, section
    4.1). The delta holds all entries of the kernels that change, so it
    is as large as they are; it can be stacked, scaled and taken off as any.

    Args:
        model: A KerasHub model or backbone, the base of the adapter, without
            patches. It is not changed.
        lora: String or path, of a folder of peft or of a `.lora.h5` file of
            KerasHub, which has the rank as alpha.
        filepath: String or path, of the file to write.
        dtype: As in `save_delta`.
        overwrite: Bool, whether to replace a file. Defaults to `True`.
        verbose: As in `save_delta`.

    Returns:
        A `DeltaReport`.

    Raises:
        ValueError: If `lora` is no adapter of this model, or one of peft that
            is more than `alpha / rank * B A` over its base, as DoRA, PiSSA or
            OLoRA. Nothing is written then.
        FileExistsError: If the file exists and `overwrite` is False.

    Example:

    ```python
    import os
    import tempfile
    import keras_weightmods as kwm
    from keras_hub import models

    backbone = models.Llama3Backbone(96, 1, 4, 32, 64, 2)
    with tempfile.TemporaryDirectory() as folder:
        lora = os.path.join(folder, "task.lora.h5")
        tuned = models.Llama3Backbone(96, 1, 4, 32, 64, 2)
        tuned.set_weights(backbone.get_weights())
        tuned.enable_lora(2)
        for weight in tuned.trainable_weights:
            weight.assign(weight + 0.1)
        tuned.save_lora_weights(lora)
        path = os.path.join(folder, "task.safetensors")
        report = kwm.lora_to_delta(backbone, lora, path)
        kwm.apply_delta(backbone, path)
    assert len(report.weights) == 2  # query and value
    ```
    """
    checks.check_choice("dtype", dtype, (*DTYPES, None))
    checks.check_verbose(verbose)
    check_filepath(filepath, overwrite)
    _check_plain(model)
    with Progress(1, "weight", verbose) as progress:
        file = lora_files.FORMATS[lora_files.format_of(lora)](
            model, find_targets(model)
        )
        changes = file.read(lora)
        values = Checkpoint("model", model)
        # Each weight is read for the hash, and each of these twice more.
        progress.total = len(values.infos) + 2 * len(changes)
        entries = []
        for each in changes:
            progress.add()
            change = file.from_matrix(each.left @ each.right, each.target)
            entry = _entry_of(change, position_of(each.target), values, dtype)
            numbers = entry.tensor.values
            if not np.all(np.isfinite(numbers.astype("float32"))):
                expected = f"of finite numbers, those of {entry.key} too"
                raise checks.error("lora", expected, os.fspath(lora))
            if numbers.size:
                entries.append(entry)
        if not entries:
            raise checks.error("lora", "an adapter that changes a kernel", lora)
        entries.sort(key=lambda entry: entry.position)
        return write_entries(
            filepath, entries, values, dtype, overwrite, (), progress
        )


def _entry_of(
    change: np.ndarray, position: int, values: Checkpoint, dtype: str | None
) -> ChangeEntry:
    """Return the entry of a delta that adds a change to a weight."""
    places = np.flatnonzero(change)
    numbers: Any = change.reshape(-1)[places]
    info = values.infos[position]
    if dtype is not None:
        numbers = numbers.astype(numpy_dtype(dtype))
        return ChangeEntry(info, Sparse(places, numbers))
    base = values.read(position).reshape(-1)[places]
    numbers = (base.astype("float32") + numbers).astype(base.dtype)
    return ChangeEntry(info, Replacing(places, numbers))


def _check_plain(model: Any) -> None:
    on_model = list(Patches(model))
    if on_model:
        raise ValueError(
            "`model` must be without patches. Call "
            "`kwm.Patches(model).clear()` first. Received: "
            f"model={model.name!r} with {on_model}"
        )
    if reparameterizations(model):
        raise ValueError(
            "The weights of `model` must be plain, as LoRA is added to them. "
            "Call `kwm.fold(model)` first, or `kwm.unpack(model)` where they "
            f"are packed. Received: model={model.name!r}"
        )


def _change_of(entry: ChangeEntry, base: np.ndarray) -> np.ndarray:
    """Return what an entry of a delta adds to a weight, in float32."""
    flat = base.astype("float32").reshape(-1)
    change = np.zeros_like(flat)
    whole = slice(0, flat.size)
    entry.tensor.scaled_part(whole, np.float32(1), flat, change)
    return change.reshape(base.shape)


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
