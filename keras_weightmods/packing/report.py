"""What `pack` and `unpack` did."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

from keras_weightmods.utils import report


@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """One weight of a `PackReport`.

    Attributes:
        path: String, the path of the dense weight.
        shape: Tuple of ints, its shape.
        dtype: String, type of the kept values: `"float32"`, `"bfloat16"`,
            `"int8"`, or `"int2"` to `"int6"`.
        dense_bytes: Int.
        packed_bytes: Int, all weights that stand for it: values, places and
            scales, or the dense weight where nothing can multiply by these.
        activations: String, what it is multiplied by: `"float32"` for floats
            of any type, or `"int8"`.
        rounding_error: Float, the norm of what rounding changed over that of
            the weight; None without rounding, or if it came from a file.
        pattern: String, `"2:4"`, `"16:32"`, which others of at most a half
            are stored as, or None where all weights are held.
        integers: String, `"kept"` where Keras had rounded the weight and the
            same integers are packed, with scales rounded to their type here,
            and `"rounded again"` where they are others; empty for floats.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    dense_bytes: int
    packed_bytes: int
    activations: str = "float32"
    rounding_error: float | None = None
    pattern: str | None = None
    integers: str = ""

    @property
    def bits(self) -> float:
        """Bits in memory for each weight of the dense one."""
        size = math.prod(self.shape)
        return 8 * self.packed_bytes / size if size else 0.0


@dataclasses.dataclass(frozen=True)
class PackReport(report.Report):
    """The result of `pack` or `unpack`.

    Attributes:
        weights: Tuple of `PackedWeight`: packed, or unpacked again.
        skipped: Tuple of `Skipped(path, reason)`: weights left as they are.
        model_bytes_before: Int, all weights of the model.
        model_bytes: Int, the same after the call.
        host_bytes: Int, the bytes of the arrays for a file if weights are held
            dense. These arrays are no weights. They lie in the host's memory,
            which on a CPU is also that of the weights.
    """

    weights: tuple[PackedWeight, ...]
    skipped: tuple[report.Skipped, ...]
    model_bytes_before: int
    model_bytes: int
    host_bytes: int = 0

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
        has_own = any(weight.integers for weight in self.weights)
        rows = [
            (
                weight.path,
                weight.shape,
                weight.pattern or "dense",
                f"{weight.dtype} x {weight.activations}",
                weight.bits,
                weight.rounding_error,
                *[weight.integers] * has_own,
                *_sizes(weight.dense_bytes, weight.packed_bytes),
            )
            for weight in self.weights
        ]
        sums = self.totals["dense_bytes"], self.totals["packed_bytes"]
        host = self.host_bytes
        more = f", and {report.size_text(host)} for files besides"
        yield report.Table(
            f"{len(rows)} packed weights",
            rows,
            "weight shape pattern values_x_inputs bits:.2f error:.2% "
            f"{'Keras_integers ' * has_own}dense packed share",
            ("all", *[""] * (5 + has_own), *_sizes(*sums)),
            f"the model in memory: {report.size_text(self.model_bytes_before)} "
            f"before, {report.size_text(self.model_bytes)} now"
            + (more if host else ""),
        )


def _sizes(dense: int, packed: int) -> tuple[str, str, str]:
    share = packed / dense if dense else 1.0
    return report.size_text(dense), report.size_text(packed), f"{share:.3f}"
