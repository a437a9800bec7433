"""What `pack` and `unpack` did."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from keras_weightmods.utils import report


@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """One weight of a `PackReport`.

    Attributes:
        path: String, the path of the dense weight.
        shape: Tuple of ints, its shape.
        dtype: String, type of the kept values: `"float32"`, `"bfloat16"` or
            `"int8"`.
        dense_bytes: Int.
        packed_bytes: Int, values, places and scales.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    dense_bytes: int
    packed_bytes: int


@dataclasses.dataclass(frozen=True)
class PackReport(report.Report):
    """What `pack` or `unpack` changed.

    Attributes:
        weights: Tuple of `PackedWeight`: packed, or unpacked again.
        skipped: Tuple of `Skipped(path, reason)`: weights left as they are.
        model_bytes_before: Int, all weights of the model in memory.
        model_bytes: Int, the same after the call.
    """

    weights: tuple[PackedWeight, ...]
    skipped: tuple[report.Skipped, ...]
    model_bytes_before: int
    model_bytes: int

    @property
    def totals(self) -> dict[str, Any]:
        """Sums over the weights, as a dict."""
        dense = sum(weight.dense_bytes for weight in self.weights)
        packed = sum(weight.packed_bytes for weight in self.weights)
        return {
            "weights": len(self.weights),
            "dense_bytes": dense,
            "packed_bytes": packed,
            "packed_share": packed / dense if dense else 1.0,
            "model_bytes_before": self.model_bytes_before,
            "model_bytes": self.model_bytes,
        }

    def tables(self) -> Iterable[report.Table]:
        rows = [
            (
                weight.path,
                report.shape_text(weight.shape),
                weight.dtype,
                *_sizes(weight.dense_bytes, weight.packed_bytes),
            )
            for weight in self.weights
        ]
        sums = self.totals["dense_bytes"], self.totals["packed_bytes"]
        yield report.Table(
            f"{len(rows)} packed weights",
            ("weight", "shape", "values", "dense", "packed", "share"),
            tuple(rows),
            ("all", "", "", *_sizes(*sums)),
            f"the model in memory: {report.size_text(self.model_bytes_before)} "
            f"before, {report.size_text(self.model_bytes)} now",
        )


def _sizes(dense: int, packed: int) -> tuple[str, str, str]:
    share = packed / dense if dense else 1.0
    return report.size_text(dense), report.size_text(packed), f"{share:.3f}"
