"""Rounding the kept weights of a sparse model to four bits."""

import contextlib
import dataclasses
import time
import warnings
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_weightmods.calibration.block_reconstruction import (
    BlockReconstruction,
)
from keras_weightmods.calibration.walk import change_kernels
from keras_weightmods.core import seam
from keras_weightmods.core.targets import Target, Targets, resolve_targets
from keras_weightmods.ops.matrix import to_stack
from keras_weightmods.ops.nm import Pattern, nm_violations, parse_pattern
from keras_weightmods.ops.rounding import Grid, round_kept
from keras_weightmods.sparsity import round_head, sparsify
from keras_weightmods.sparsity.grid_weights import GridWeights
from keras_weightmods.utils import checks
from keras_weightmods.utils.report import Report, Skipped, Table, shape_text

# Significant bits of the floats that hold a product of scale and integer.
_SIGNIFICANT = {"bfloat16": 8, "float16": 11}


@dataclasses.dataclass(frozen=True)
class QuantizedKernel:
    """One kernel of a `QuantizeReport`.

    Attributes:
        key: String, place and path of the kernel in the model.
        path: String.
        shape: Tuple of ints.
        nearest: Float, what rounding each weight to nearest would change of
            the layer's outputs on the calibration data,
            `|X W' - X W|^2 / |X W|^2`; None where data do not reach it.
        error: Float, what was changed instead; None as above.
        note: String, why it was rounded to nearest, if it was.
    """

    key: str
    path: str
    shape: tuple[int, ...]
    nearest: float | None
    error: float | None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class QuantizeReport(Report):
    """What `quantize_sparse` did.

    Attributes:
        pattern: String, `"n:m"`.
        bits: Int, those of a kept weight.
        group_size: Int, the inputs that share a scale.
        kernels: Tuple of `QuantizedKernel`, in the order they were rounded.
            Their errors are those before blocks were reconstructed.
        skipped: Tuple of `Skipped(path, reason)`: kernels left as they are.
        blocks: Tuple of `ReconstructedBlock`, with `refine="blocks"`.
        dense: Bool, whether kernels without the pattern were rounded too.
    """

    pattern: str
    bits: int
    group_size: int
    kernels: tuple[QuantizedKernel, ...]
    skipped: tuple[Skipped, ...]
    blocks: tuple[sparsify.ReconstructedBlock, ...] = ()
    dense: bool = False

    def tables(self) -> Iterator[Table]:
        def percent(error: float | None) -> str:
            return "" if error is None else f"{error:.2%}"

        measured = [k for k in self.kernels if k.error is not None]
        means = [
            percent(float(np.mean([getattr(k, name) for k in measured])))
            for name in ("nearest", "error")
            if measured
        ]
        yield Table(
            f"{self.pattern}{' or dense' * self.dense}, {self.bits} bits, "
            f"a scale for each {self.group_size} inputs",
            ("kernel", "shape", "error to nearest", "error", "note"),
            tuple(
                (
                    row.path,
                    shape_text(row.shape),
                    percent(row.nearest),
                    percent(row.error),
                    row.note,
                )
                for row in self.kernels
            ),
            caption=f"{len(self.kernels)} kernels"
            + (
                "; mean error {1}, to nearest {0}".format(*means)
                if means
                else ""
            ),
        )
        if self.blocks:
            yield sparsify.blocks_table(self.blocks)


def quantize_sparse(
    model: keras.layers.Layer,
    data: Any,
    bits: int = 4,
    *,
    group_size: int = 64,
    pattern: Pattern = "2:4",
    dense: bool = False,
    refine: str | None = None,
    head: bool = False,
    targets: Any = None,
    batch_size: int = 8,
    damping: float = 0.01,
    epochs: int = 6,
    learning_rate: float = 4e-4,
    verbose: int = 1,
) -> QuantizeReport:
    """Round the kept weights of an N:M-sparse model to four bits, in place.

    The kernels stay floats, and their zeros zeros. Along the contraction each
    `group_size` weights of an output unit share a bfloat16 scale, and each
    weight is an integer, -8 to 7, times its scale: what
    `pack(model)` stores without further loss.

    Rounding to nearest costs a small language model a quarter of its
    perplexity. Here a kernel is rounded so that its outputs on the data change
    least: GPTQ (arXiv 2210.17323), with the zeros left out; then one integer,
    and one scale, after the other is set to its best value. Kernels go in the
    order of execution, each for the inputs that the rounded ones before it
    give, as in `sparsify`, which says what memory that takes.

    `refine="blocks"` then trains one layer or transformer block after the
    other, to give the outputs that it has in the model as given: float
    weights, through their rounding, and scales. This takes most of the time,
    and gains most.

    Args:
        model: A built `keras.Model` or layer, N:M sparse, such as `sparsify`
            or CAST make it.
        data: What the model is calibrated on, as in `sparsify`: some 100 rows
            of text.
        bits: Int, 2 to 4. Defaults to `4`.
        group_size: Int, the inputs, kept or not, that share a scale. Packing
            has 64. Defaults to `64`.
        pattern: String `"n:m"` or pair of ints, the pattern that the kernels
            have. Defaults to `"2:4"`.
        dense: Bool, whether kernels that do not have the pattern are rounded
            too, of which all weights are kept. The model may then be dense
            throughout. Defaults to `False`.
        refine: `"blocks"` or `None`. It needs a functional model, such as
            KerasHub's. Defaults to `None`.
        head: Bool, whether the table that a language model has as embedding
            and head is rounded as well: first of all, so that the logits
            change least.
            `targets=[]` rounds it alone. Defaults to `False`.
        targets: The kernels to round: `Targets`, or what `include=` of
            `find_targets` takes. Defaults to `None`, for all of them.
        batch_size: Int, the rows run at a time where `data` are arrays or
            strings, and the rows of a step of `"blocks"`. Defaults to `8`.
        damping: Float > 0, the share of the mean of the second moment's
            diagonal that is added to it. Defaults to `0.01`.
        epochs: Int, passes of `"blocks"` over the data. Defaults to `6`.
        learning_rate: Float > 0, the peak rate of Adam for `"blocks"`.
            Defaults to `4e-4`.
        verbose: 0 or 1. 0 shows no progress bar. Defaults to `1`.

    Returns:
        A `QuantizeReport`. Kernels whose layers' inputs cannot be read
        (`register_target`), or that the data do not reach, are rounded to
        nearest; the report names them. Without `dense`, those that do not have
        the pattern are left as they are, and among its `skipped`.

    Raises:
        ValueError: If an argument is outside the ranges above, `data` is
            missing, empty or endless, no target has the pattern, a target is
            reparameterized, or an activation is not finite. The model is
            unchanged then, as it is after any other error.

    Example:

    ```python
    import keras
    import numpy as np
    import keras_weightmods as kwm

    model = keras.Sequential(
        [
            keras.Input((16,)),
            keras.layers.Dense(32, activation="relu"),
            keras.layers.Dense(4),
        ]
    )
    x = np.random.normal(size=(64, 16))
    kwm.sparsify(model, "2:4", "sparsegpt", data=x, verbose=0)
    report = kwm.quantize_sparse(model, x, verbose=0)
    assert all(k.error <= k.nearest for k in report.kernels)
    kwm.assert_sparse(model, "2:4")
    print(report)
    ```
    """
    n, m = parse_pattern(pattern)
    quantizer = Quantizer(bits, group_size, damping, epochs, learning_rate)
    checks.check_bool("dense", dense)
    checks.check_bool("head", head)
    check_arguments(bits, refine, batch_size)
    checks.check_verbose(verbose)
    if data is None:
        raise checks.error("data", "calibration data, some 100 rows", data)
    found = resolve_targets(model, targets)
    table = round_head.tied_head(model) if head else None
    is_alone = head and not found and not found.skipped
    chosen = found if dense or is_alone else _with_pattern(found, (n, m))
    if not chosen and not head:
        raise ValueError(
            "`quantize_sparse` found no kernel. Received: targets that are all "
            f"skipped, {found.skipped}"
        )
    sparsify.check_stored("quantize_sparse", chosen)
    batches = sparsify.calibration_batches(model, data, batch_size)
    kernels: list[QuantizedKernel] = []
    with _head_rounded(table, batches, quantizer, kernels, verbose):
        if chosen:
            kernels += change_kernels(
                model,
                chosen,
                batches,
                quantizer.round,
                None if refine is None else quantizer.train,
                verbose,
            )
    return QuantizeReport(
        f"{n}:{m}",
        bits,
        group_size,
        tuple(kernels),
        chosen.skipped,
        tuple(quantizer.blocks),
        dense,
    )


@contextlib.contextmanager
def _head_rounded(
    table: Any, batches: Any, quantizer: "Quantizer", rows: Any, verbose: Any
) -> Iterator[None]:
    """Round the head, if there is one; on an error it is as before."""
    if table is None:
        yield
        return
    began = time.perf_counter()
    head, target = table
    moment = round_head.second_moment(head, batches, verbose)
    before = ops.convert_to_numpy(target.variable).copy()
    try:
        grid = _grid_for(target, quantizer.grid)
        errors = round_head.round_table(
            target, moment, grid, quantizer.damping, verbose, began
        )
        about = target.key, target.path, target.shape
        rows.append(QuantizedKernel(*about, *errors))
        yield
    except BaseException:
        target.variable.assign(before)
        raise


def check_arguments(bits: Any, refine: Any, batch_size: Any) -> None:
    """Raise ValueError for what `Quantizer` does not check."""
    checks.check_int("bits", bits, 2, 4)
    checks.check_int("batch_size", batch_size, 1)
    if refine is not None:
        checks.check_choice("refine", refine, ("blocks",))


class Quantizer:
    """Rounds kernels, and trains the blocks that they are in.

    Args:
        bits, group_size, damping, epochs, learning_rate: As in
            `quantize_sparse`.
    """

    def __init__(
        self,
        bits: int,
        group_size: int,
        damping: float,
        epochs: int,
        learning_rate: float,
    ) -> None:
        self.grid = Grid(bits, group_size)
        self.damping = checks.check_float("damping", damping, above=0)
        checks.check_int("epochs", epochs, 1)
        learning_rate = checks.check_float(
            "learning_rate", learning_rate, above=0
        )
        self.fit = BlockReconstruction(epochs, learning_rate)
        # By key, what has been rounded and not been trained.
        self.items: dict[str, GridWeights] = {}
        self.blocks: list[sparsify.ReconstructedBlock] = []

    def round(
        self, group: list[Target], moment: Any, note: str
    ) -> Iterator[QuantizedKernel]:
        """Round kernels that share their inputs; yield what was done."""
        moments = [None] if moment is None else moment
        for target in group:
            grid = _grid_for(target, self.grid)
            axes = target.contraction_axes, target.stack_axes
            # A copy: on torch it would share the memory of the variable.
            before = ops.copy(
                to_stack(target.variable.value, *axes, len(moments))
            )
            rounded = [
                round_kept(w, h, grid, self.damping)
                for w, h in zip(before, moments)
            ]
            after, scales, nearest = map(ops.stack, zip(*rounded))
            item = GridWeights(target, before, after, scales, grid)
            target.variable.assign(item.rounded())
            self.items[target.key] = item
            errors = {}
            if moment is not None:
                errors = {
                    each: sparsify.relative_error(before, values, moment)
                    for each, values in (("nearest", nearest), ("error", after))
                }
            yield QuantizedKernel(
                target.key,
                target.path,
                target.shape,
                errors.get("nearest"),
                errors.get("error"),
                note,
            )

    def train(self, operation: Any, group: list[Target], *calls: Any) -> None:
        """Train the kernels of a block through their rounding."""
        items = [self.items.pop(target.key) for target in group]
        seam.attach(operation, items)
        try:
            errors = self.fit(operation, group, *calls)
            if errors is None:
                warnings.warn(
                    f"The block {operation.name!r} gives no float, so that its "
                    f"{len(group)} kernels are rounded and not trained.",
                    stacklevel=2,
                )
            elif errors[1] > errors[0]:
                # Nothing was gained: as it was rounded.
                for item in items:
                    item.reset()
                errors = errors[0], errors[0]
        finally:
            seam.fold(operation, GridWeights)
        if errors:
            self.blocks.append(
                sparsify.ReconstructedBlock(operation.name, len(group), *errors)
            )


def _grid_for(target: Target, grid: Grid) -> Grid:
    """A grid whose weights the kernel's type holds without rounding."""
    significant = _SIGNIFICANT.get(target.variable.dtype, 24)
    precision = min(grid.precision, significant - (grid.bits - 1))
    return dataclasses.replace(grid, precision=precision)


def _with_pattern(found: Targets, pattern: tuple[int, int]) -> Targets:
    """Those that are N:M sparse; the others are skipped."""
    n, m = pattern
    usable = sparsify.fitting_targets("quantize_sparse", found, pattern)
    sparse = usable.select(
        lambda target: (
            f"not {n}:{m} sparse" if _violations(target, pattern) else None
        )
    )
    if not sparse:
        raise ValueError(
            f"`quantize_sparse` rounds kernels that are {n}:{m} sparse. "
            f"Received: a model with none of {len(usable)} that is. Call "
            f"`kwm.sparsify(model, '{n}:{m}', ...)` first, pass the `pattern` "
            "that it has, or `dense=True` to round all kernels."
        )
    return sparse


def _violations(target: Target, pattern: tuple[int, int]) -> int:
    kernel = target.variable.value
    return int(nm_violations(kernel, pattern, target.contraction_axes))
