"""What a signature holds, as tables."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Similarity:
    """What `WeightSignature.cosine_similarity` found.

    Attributes:
        whole: Float in [-1, 1].
        layers: Dict from `"{position}:{path of the layer}"` to float.
    """

    whole: float
    layers: dict[str, float]


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
        pull: Float, 0, or the share of a statistic that is replaced.
    """

    key: str
    path: str
    shape: tuple[int, ...]
    depth: int
    bits: int
    nbytes: int
    norm: float
    pull: float


@dataclasses.dataclass(frozen=True)
class SignatureReport:
    """What `WeightSignature.report` found. Prints as a table.

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

    def to_dict(self):
        """The whole report as plain Python values, ready for JSON."""
        plain = dataclasses.asdict(self)
        plain["rows"] = [
            {**row, "shape": list(row["shape"])} for row in plain["rows"]
        ]
        return plain

    def __rich_console__(self, console, options):
        from rich.table import Table

        times = self.model_nbytes / max(1, self.nbytes)
        table = Table(
            title=f"Signature {self.name or '(no name)'}, {self.method}, depth "
            f"{self.depth}",
            caption=(
                f"{self.nbytes:,} bytes, {times:.1f} times smaller than the "
                f"model's {self.model_nbytes:,}"
            ),
        )
        table.add_column("weight", overflow="fold")
        for name in ("depth", "shape", "bits", "bytes", "norm"):
            table.add_column(name, justify="right")
        for row in self.rows:
            table.add_row(
                row.path,
                str(row.depth + 1),
                "x".join(map(str, row.shape)),
                str(row.bits),
                f"{row.nbytes:,}",
                f"replaces {row.pull:.0%}" if row.pull else f"{row.norm:.3g}",
            )
        yield table

    def __str__(self):
        from rich.console import Console

        console = Console(width=100)
        with console.capture() as capture:
            console.print(self)
        return capture.get()
