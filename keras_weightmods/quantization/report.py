"""What `quantize` did."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from keras_weightmods.calibration.block_reconstruction import (
    ReconstructedBlock,
    blocks_table,
)
from keras_weightmods.utils.report import Report, Row, Skipped, Table


@dataclasses.dataclass(frozen=True)
class QuantizedKernel(Row):
    """One kernel of a `QuantizeReport`.

    Attributes:
        key, path, shape: As of `Row`.
        nearest: Float, what rounding each weight to nearest would change of
            the layer's outputs, `|X W' - X W|^2 / |X W|^2`, on rows held out
            of the calibration data; None where data do not reach it.
        error: Float, what was changed instead; None as above.
        bits: Int, those of its weights.
        note: String, why it was rounded to nearest, if it was.
        rows: Int, the rows of inputs that it was fitted to; None for a head,
            and as above.
    """

    nearest: float | None
    error: float | None
    bits: int = 4
    note: str = ""
    rows: int | None = None


@dataclasses.dataclass(frozen=True)
class QuantizeReport(Report):
    """The result of `quantize`.

    Attributes:
        bits: Int or float, the mean bits of a weight.
        group_size: Int, the inputs that share a scale.
        kernels: Tuple of `QuantizedKernel`, in the order they were rounded.
            Their errors are those before blocks were reconstructed.
        skipped: Tuple of `Skipped(path, reason)`: kernels left as they are.
        blocks: Tuple of `ReconstructedBlock`, with `refine="blocks"`.
        note: String, what `quantize` could not do as asked, and why.
        held_out: Pair of floats, how far rounding changes the model's outputs
            on the held-out rows: with each weight rounded to nearest, and as
            done. For a language model this is the mean of KL(original ||
            rounded) over positions, in nats, and for others
            `|Y' - Y|^2 / |Y|^2`. None if no row was held out, or no output can
            be compared.
        scales: Pair of floats, with `refine="scales"`: the mean loss of a
            held-out position before and after the training of scales. For a
            language model it is the loss above. They are equal if the training
            made it worse, and was undone.
        size: Int, with `size=`: the bytes of all weights after `pack(model)`.
    """

    bits: float
    group_size: int
    kernels: tuple[QuantizedKernel, ...]
    skipped: tuple[Skipped, ...]
    blocks: tuple[ReconstructedBlock, ...] = ()
    note: str = ""
    held_out: tuple[float, float] | None = None
    scales: tuple[float, float] | None = None
    size: int | None = None

    def tables(self) -> Iterator[Table]:
        caption = f"{len(self.kernels)} kernels"
        known: list[Any] = [
            (k.error, k.nearest) for k in self.kernels if k.error is not None
        ]
        if known:
            means = np.mean(known, axis=0)
            caption += "; mean error {:.2%}, to nearest {:.2%}".format(*means)
        if self.held_out:
            nearest, after = self.held_out
            caption += f"; loss of the model on rows held out {after:.4f}, "
            caption += f"to nearest {nearest:.4f}"
        if self.scales:
            caption += "; scales end to end: loss {:.4f} to {:.4f}".format(
                *self.scales
            )
            if self.scales[0] == self.scales[1]:
                caption += " (training made it worse, and was undone)"
        if self.size:
            caption += f"; {self.size / 1e6:.1f} MB once packed"
        yield Table(
            f"{self.bits:.4g} bits, a scale for each {self.group_size} inputs",
            self.kernels,
            "kernel=path shape bits error_to_nearest=nearest:.2% error:.2% "
            "note",
            caption=f"{caption}. {self.note}".rstrip(" ."),
        )
        if self.blocks:
            yield blocks_table(self.blocks)
