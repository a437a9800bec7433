"""What `PrincipalMaskCallback` trains, and how its masks change."""

import dataclasses
import math
from collections.abc import Iterator

from keras_weightmods.utils.report import Report, Skipped, Table


@dataclasses.dataclass(frozen=True)
class MaskedKernel:
    """A weight, and how many of its entries are trained.

    Attributes:
        key: String, the key of its target.
        shape: Tuple of ints.
        trained: Int, the entries that are trained.
    """

    key: str
    shape: tuple[int, ...]
    trained: int


@dataclasses.dataclass(frozen=True)
class PrincipalMaskReport(Report):
    """The trained weights and the others. Prints as a table.

    Attributes:
        kernels: Tuple of `MaskedKernel`.
        skipped: Tuple of `Skipped`, path and reason.
        whole: Tuple of `MaskedKernel`, the weights of `also_train`.
    """

    kernels: tuple[MaskedKernel, ...]
    skipped: tuple[Skipped, ...] = ()
    whole: tuple[MaskedKernel, ...] = ()

    @property
    def totals(self) -> dict[str, int]:
        """Dict of the entries of the kernels: `"trained"` ones, all
        `"entries"`; and of `"whole"`, the entries of weights trained whole.
        """
        return {
            "trained": sum(kernel.trained for kernel in self.kernels),
            "entries": sum(math.prod(kernel.shape) for kernel in self.kernels),
            "whole": sum(weight.trained for weight in self.whole),
        }

    def tables(self) -> Iterator[Table]:
        trained, entries, whole = self.totals.values()
        count = len(self.kernels)
        title = f"{trained:,} of {entries:,} entries of {count} kernels trained"
        yield Table(title, self.kernels, "kernel=key shape trained:,")
        if self.whole:
            count = len(self.whole)
            title = f"{whole:,} entries of {count} weights trained whole"
            yield Table(title, self.whole, "weight=key shape trained:,")


@dataclasses.dataclass(frozen=True)
class Refresh:
    """A new choice of the entries that are trained.

    Attributes:
        step: Int, the updates made before it.
        changed: Float, the share of the entries that were not trained before.
        seconds: Float, the time that it took.
    """

    step: int
    changed: float
    seconds: float
