"""What signatures and deltas hold, and what they changed on a model."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from keras_weightmods.utils.report import Report, Skipped, Table, shape_text


@dataclasses.dataclass(frozen=True)
class PatchReport(Report):
    """What a call changed on a model.

    Attributes:
        action: String: `"add"`, `"rescale"`, `"remove"` or `"clear"`.
        name: String, the patch; `None` where all were removed.
        scale: Float, its scale; the last one where it was removed.
        changed: Tuple of the keys of the weights that were written, from
            what they are without any patch.
        subtracted: Tuple of the keys of weights that had been changed since
            they were patched, from which the patch was subtracted.
        active: Dict from the names of the patches now on the model to their
            scales.
        clean_nbytes: Int, the memory that the clean values take.
        skipped: Tuple of `Skipped`: statistics that had been changed since
            they were replaced.
    """

    action: str
    name: str | None
    scale: float | None
    changed: tuple[str, ...]
    subtracted: tuple[str, ...]
    active: dict[str, float]
    clean_nbytes: int
    skipped: tuple[Skipped, ...] = ()

    def tables(self) -> Iterator[Table]:
        """The `Table`s to print."""
        patch = "" if self.name is None else f" {self.name} x {self.scale:g}"
        active = ", ".join(f"{k} x {v:g}" for k, v in self.active.items())
        yield Table(
            title=f"{self.action}{patch}: {len(self.changed)} weights written",
            columns=("subtracted from",),
            rows=tuple((key,) for key in self.subtracted),
            caption=f"On the model: {active or 'nothing'}; clean values take "
            f"{self.clean_nbytes:,} bytes",
        )


@dataclasses.dataclass(frozen=True)
class DeltaReport(Report):
    """What `save_delta` stored.

    Attributes:
        filepath: String, the file.
        weights: Tuple of strings, the keys of the weights with changes.
        entries: Int, the number of entries stored of them: those changed, or
            all of a mask whose places are drawn from a seed.
        index_bits: Float, the bits that the place of an entry takes, 0 where
            places are drawn from a seed.
        nbytes: Int, the size of the file.
    """

    filepath: str
    weights: tuple[str, ...]
    entries: int
    index_bits: float
    nbytes: int

    def tables(self) -> Iterator[Table]:
        """The `Table`s to print."""
        yield Table(
            f"{self.filepath}: {self.entries:,} entries of "
            f"{len(self.weights)} weights, {self.index_bits:.2f} bits a place, "
            f"{self.nbytes:,} bytes"
        )


@dataclasses.dataclass(frozen=True)
class Similarity(Report):
    """What `WeightSignature.cosine_similarity` found.

    Attributes:
        whole: Float in [-1, 1].
        layers: Dict from `"{position}:{path of the layer}"` to float.
    """

    whole: float
    layers: dict[str, float]

    def tables(self) -> Iterator[Table]:
        """The `Table`s to print."""
        yield Table(
            "Cosine similarity",
            ("layer", "similarity"),
            tuple((k, f"{v:.3f}") for k, v in self.layers.items()),
            total=("whole", f"{self.whole:.3f}"),
        )


@dataclasses.dataclass(frozen=True)
class SignatureRow:
    """One weight of a `SignatureReport`.

    Attributes:
        key: String, place and path of the weight in the model.
        path: String.
        shape: Tuple of ints.
        depth: Int, place of its layer among the weighted layers.
        bits: Int, bits of a weight: 32, 8, 4 or 2.
        nbytes: Int.
        norm: Float, the Euclidean norm of what is added at scale 1.
        replaced: Float, 0, or the share of a statistic that is replaced.
    """

    key: str
    path: str
    shape: tuple[int, ...]
    depth: int
    bits: int
    nbytes: int
    norm: float
    replaced: float


@dataclasses.dataclass(frozen=True)
class SignatureReport(Report):
    """What `WeightSignature.report` found.

    Attributes:
        name: String or None.
        method: String.
        model_class: String or None.
        depth: Int.
        nbytes: Int, bytes of the signature.
        model_nbytes: Int, bytes of the weights of the model it came from.
        rows: Tuple of `SignatureRow`.
    """

    name: str | None
    method: str
    model_class: str | None
    depth: int
    nbytes: int
    model_nbytes: int
    rows: tuple[SignatureRow, ...]

    def tables(self) -> Iterator[Table]:
        """The `Table`s to print."""
        times = self.model_nbytes / max(1, self.nbytes)
        rows = []
        for row in self.rows:
            norm = f"{row.norm:.3g}"
            if row.replaced:
                norm = f"replaces {row.replaced:.0%}"
            sizes = f"{row.depth + 1}", shape_text(row.shape), f"{row.bits}"
            rows.append((row.path, *sizes, f"{row.nbytes:,}", norm))
        yield Table(
            title=f"Signature {self.name or '(no name)'}, {self.method}, depth "
            f"{self.depth}",
            columns=("weight", "depth", "shape", "bits", "bytes", "norm"),
            rows=tuple(rows),
            caption=f"{self.nbytes:,} bytes, {times:.1f} times smaller than "
            f"the model's {self.model_nbytes:,}",
        )


def signature_report(signature: Any) -> SignatureReport:
    """Return the `SignatureReport` of a `WeightSignature`."""
    about = "name", "method", "model_class", "depth", "nbytes", "model_nbytes"
    return SignatureReport(
        **{name: getattr(signature, name) for name in about},
        rows=tuple(
            SignatureRow(
                key=entry.key,
                path=entry.info.path,
                shape=entry.info.shape,
                depth=entry.depth,
                bits=entry.bits,
                nbytes=entry.nbytes,
                norm=float(np.linalg.norm(entry.dequantized("float64"))),
                replaced=entry.replaced,
            )
            for entry in signature
        ),
    )


@dataclasses.dataclass(frozen=True)
class WeightRow:
    """One weight of a `WeightsReport`.

    Attributes:
        key: String, place and path of the weight in the model.
        depth: Int, place of its layer among the weighted layers.
        shape: Tuple of ints.
        dtype: String.
        role: String, `"weight"`, `"statistic"` or `"other"`.
    """

    key: str
    depth: int
    shape: tuple[int, ...]
    dtype: str
    role: str


@dataclasses.dataclass(frozen=True)
class WeightsReport(Report):
    """The weights of a model, as signatures see them.

    Attributes:
        name: String, class and name of the model.
        nbytes: Int, bytes of all weights.
        rows: Tuple of `WeightRow`.
    """

    name: str
    nbytes: int
    rows: tuple[WeightRow, ...]

    def tables(self) -> Iterator[Table]:
        """The `Table`s to print."""
        yield Table(
            title=self.name,
            columns=("weight", "depth", "shape", "dtype", "role"),
            rows=tuple(
                (r.key, str(r.depth + 1), shape_text(r.shape), r.dtype, r.role)
                for r in self.rows
            ),
            caption=f"{self.nbytes:,} bytes",
        )
