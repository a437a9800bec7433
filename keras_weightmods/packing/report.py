"""What `pack` and `unpack` did."""

import dataclasses

from keras_weightmods.core.targets import Skipped
from keras_weightmods.utils.tables import PrintsAsTable


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
class PackReport(PrintsAsTable):
    """What `pack` or `unpack` changed. Prints as a table.

    Attributes:
        weights: Tuple of `PackedWeight`: packed, or unpacked again.
        skipped: Tuple of `Skipped(path, reason)`: weights left as they are.
        model_bytes_before: Int, all weights of the model in memory.
        model_bytes: Int, the same after the call.
    """

    weights: tuple[PackedWeight, ...]
    skipped: tuple[Skipped, ...]
    model_bytes_before: int
    model_bytes: int

    @property
    def totals(self):
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

    def to_dict(self):
        """The whole report as plain Python values, ready for JSON."""
        return {
            "weights": [
                {**dataclasses.asdict(weight), "shape": list(weight.shape)}
                for weight in self.weights
            ],
            "skipped": [
                {"path": s.path, "reason": s.reason} for s in self.skipped
            ],
            "totals": self.totals,
        }

    def __rich_console__(self, console, options):
        from rich.table import Table

        totals = self.totals
        table = Table(
            title="Packed weights",
            caption=(
                f"the model in memory: {_size(self.model_bytes_before)} "
                f"before, {_size(self.model_bytes)} now"
            ),
        )
        table.add_column("weight")
        table.add_column("shape", justify="right")
        table.add_column("values")
        for name in ("dense", "packed", "share"):
            table.add_column(name, justify="right")
        for weight in self.weights:
            table.add_row(
                weight.path,
                "x".join(map(str, weight.shape)),
                weight.dtype,
                _size(weight.dense_bytes),
                _size(weight.packed_bytes),
                f"{weight.packed_bytes / weight.dense_bytes:.3f}",
            )
        table.add_section()
        table.add_row(
            f"{totals['weights']} weights",
            "",
            "",
            _size(totals["dense_bytes"]),
            _size(totals["packed_bytes"]),
            f"{totals['packed_share']:.3f}",
        )
        yield table
        if self.skipped:
            dense = Table(title="Left dense")
            dense.add_column("weight")
            dense.add_column("reason")
            for skip in self.skipped:
                dense.add_row(skip.path, skip.reason)
            yield dense


def _size(count):
    if count < 2**20:
        return f"{count / 2**10:,.1f} KiB"
    return f"{count / 2**20:,.1f} MiB"
