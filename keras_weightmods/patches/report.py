"""The contents of patches, and their changes of a model."""

import dataclasses
import math
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from keras_weightmods.patches.entry import Quantized, Replacing
from keras_weightmods.utils.report import Report, Row, Skipped, Table


@dataclasses.dataclass(frozen=True)
class PatchReport(Report):
    """The result of a call of `Patch` on a model.

    Attributes:
        action: String: `"add"`, `"rescale"`, `"remove"`, `"clear"` or
            `"subtract"`.
        name: String or None, the name of the patch.
        scale: Float, its scale; the last one where it was removed.
        changed: Tuple of the keys of the weights that were written from their
            values without any patch.
        subtracted: Tuple of the keys of weights whose clean values are not
            known. The patch was subtracted from them.
        active: Dict from the names of the patches now on the model to their
            scales.
        clean_nbytes: Int, the memory that the clean values take.
        skipped: Tuple of `Skipped`: statistics that had been changed since
            they were replaced.
    """

    action: str
    name: str | None
    scale: float | None
    changed: tuple[str, ...] = ()
    subtracted: tuple[str, ...] = ()
    active: dict[str, float] = dataclasses.field(default_factory=dict)
    clean_nbytes: int = 0
    skipped: tuple[Skipped, ...] = ()

    def tables(self) -> Iterator[Table]:
        """The `Table`s to print."""
        name = "" if self.name is None else f" {self.name}"
        patch = "" if self.scale is None else f"{name} x {self.scale:g}"
        active = ", ".join(f"{k} x {v:g}" for k, v in self.active.items())
        yield Table(
            title=f"{self.action}{patch}: {len(self.changed)} weights written",
            rows=[(key,) for key in self.subtracted],
            columns="subtracted_from",
            caption=f"On the model: {active or 'nothing'}; clean values take "
            f"{self.clean_nbytes:,} bytes",
        )


@dataclasses.dataclass(frozen=True)
class PatchRow(Row):
    """One weight of a `PatchContentsReport`.

    Attributes:
        key, path, shape: As of `Row`.
        depth: Int, the least `depth` of a signature with it; `None` in a delta.
        entries: Int, how many entries of the weight are changed.
        bits: Int, bits of a number.
        nbytes: Int, the bytes of the numbers.
        norm: Float, the Euclidean norm of the numbers.
        replaced: Float, the share of the weight that is replaced, or `None`.
    """

    depth: int | None
    entries: int
    bits: int
    nbytes: int
    norm: float
    replaced: float | None


@dataclasses.dataclass(frozen=True)
class PatchContentsReport(Report):
    """The contents of a patch.

    Attributes:
        name: String or None.
        method: String, how it was made.
        rows: Tuple of `PatchRow`.
        nbytes: Int, the bytes of the file; without one, of the numbers.
        filepath: String, the file that was written; `None` without one.
        index_bits: Float, the bits that the place of an entry takes in the
            file of a delta, 0 where places are drawn from a seed.
        model_nbytes: Int, the bytes of all weights of the model.
    """

    name: str | None
    method: str
    rows: tuple[PatchRow, ...]
    nbytes: int
    model_nbytes: int
    filepath: str | None = None
    index_bits: float | None = None

    @property
    def entries(self) -> int:
        """Int, the number of entries that are changed."""
        return sum(row.entries for row in self.rows)

    def tables(self) -> Iterator[Table]:
        """The `Table`s to print."""
        times = self.model_nbytes / max(1, self.nbytes)
        caption = (
            f"{self.nbytes:,} bytes, {times:.1f} times smaller than the "
            f"model's {self.model_nbytes:,}"
        )
        name = self.filepath or self.name or "(no name)"
        count = f"{self.entries:,} entries of {len(self.rows)} weights"
        if self.index_bits is not None:
            caption += f"; {self.index_bits:.2f} bits a place"
        yield Table(
            f"{name}, {self.method}: {count}",
            self.rows,
            "weight=path depth shape entries:, bits bytes=nbytes:, norm:.3g "
            "replaces=replaced:.0%",
            caption=caption,
        )


def contents_report(
    patch: Any, filepath: str | None = None, index_bits: float | None = None
) -> PatchContentsReport:
    """Return the `PatchContentsReport` of a patch, and of its file if any."""
    rows = []
    for entry in patch:
        tensor, info, replaced = entry.tensor, entry.info, entry.replaced
        numbers, bits = entry.arrays[-1], 8 * entry.arrays[-1].itemsize
        if isinstance(tensor, Quantized):
            numbers, bits = tensor.dequantized(), tensor.bits
        if isinstance(tensor, Replacing):
            replaced = tensor.size / math.prod(info.shape)
        norm = float(np.linalg.norm(numbers.astype("float64")))
        about = entry.key, info.path, info.shape, entry.depth + 1 or None
        sizes = tensor.size, bits, tensor.nbytes
        rows.append(PatchRow(*about, *sizes, norm, replaced or None))
    nbytes = patch.nbytes if filepath is None else os.path.getsize(filepath)
    return PatchContentsReport(
        name=patch.name,
        method=patch.method,
        rows=tuple(rows),
        nbytes=nbytes,
        filepath=filepath,
        index_bits=index_bits,
        model_nbytes=patch.model_nbytes,
    )


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
    """The result of `Patch.to_lora`.

    Attributes:
        filepath: String, the file or folder.
        rank: Int.
        kernels: Tuple of `LoraKernel`.
        error: Float, the part of the whole change that the adapter lacks, with
            that of the skipped weights: the norm of the difference over that of
            the change.
        skipped: Tuple of `Skipped`: weights whose change the adapter lacks.
    """

    filepath: str
    rank: int
    kernels: tuple[LoraKernel, ...]
    error: float
    skipped: tuple[Skipped, ...] = ()

    def tables(self) -> Iterator[Table]:
        """The `Table`s to print."""
        title = f"{self.filepath}: rank {self.rank}, lacks {self.error:.1%} of "
        columns = "kernel=key shape lacks=error:.1%"
        yield Table(f"{title}the change", self.kernels, columns)
