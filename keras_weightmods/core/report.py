"""What the functions report that reparameterize a model."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from keras_weightmods.utils.report import Report, Skipped, Table, shape_text


@dataclasses.dataclass(frozen=True, eq=False)
class ReparameterizationReport(Report):
    """What a call that reparameterizes a model, or folds it, changed.

    Attributes:
        kernels: Tuple with one summary for each kernel changed, with a `path`,
            a `shape` and a string `detail`.
        skipped: Tuple of `Skipped`, path and reason.
    """

    kernels: tuple[Any, ...]
    skipped: tuple[Skipped, ...] = ()

    def tables(self) -> Iterable[Table]:
        columns = "kernel", "shape", "detail"
        rows = tuple(
            (kernel.path, shape_text(kernel.shape), kernel.detail)
            for kernel in self.kernels
        )
        yield Table(f"{len(rows)} kernels", columns, rows)
