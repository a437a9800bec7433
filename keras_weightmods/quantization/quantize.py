"""Rounding the weights of a model to few bits, on calibration data."""

import dataclasses
import math
import re
import warnings
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_weightmods.calibration.block_reconstruction import (
    is_float,
    train_block,
    warn_of_undone,
)
from keras_weightmods.calibration.held_out import HeldOut
from keras_weightmods.calibration.self_generated import self_generated
from keras_weightmods.calibration.walk import (
    change_kernels,
    check_finite,
    check_reached,
    check_stored,
)
from keras_weightmods.core import data as data_forms
from keras_weightmods.core import keras_compat, seam
from keras_weightmods.core.head import find_head, output_of, splittable_head
from keras_weightmods.core.restored import RestoredOnError
from keras_weightmods.core.targets import Target, resolve_targets
from keras_weightmods.evaluation.token_scorer import longest_input
from keras_weightmods.native.layout import GROUP
from keras_weightmods.ops.rounding import Grid, round_kept
from keras_weightmods.quantization.budget import (
    WIDTHS,
    bytes_in,
    choose_bits,
)
from keras_weightmods.quantization.end_to_end import train_scales, values_of
from keras_weightmods.quantization.grid_weights import GridScales, GridWeights
from keras_weightmods.quantization.head import (
    Outputs,
    change_units,
    find_table,
    round_table,
)
from keras_weightmods.quantization.record import Record
from keras_weightmods.quantization.report import QuantizedKernel, QuantizeReport
from keras_weightmods.utils import checks
from keras_weightmods.utils.matrix import from_stack, to_stack
from keras_weightmods.utils.report import skipped_text

# Significant bits of floats that hold a product of scale and integer.
_SIGNIFICANT = {"bfloat16": 8, "float16": 11}
_REFINEMENTS = ("blocks", "scales")
# Steps, and the peak rate of Adam, for training scales.
_SCALES = 32, 1e-3
# Positions of texts for fitting kernels and blocks.
_POSITIONS = 2**14
# Positions of texts in a step of training.
_STEP = 256
# Texts that a model writes if no data are given.
_ROWS, _LENGTH = 128, 256


def quantize(
    model: keras.layers.Layer,
    data: Any = None,
    bits: Any = None,
    *,
    size: Any = None,
    refine: Any = ("blocks", "scales"),
    head: bool = True,
    targets: Any = None,
    group_size: int = 64,
    batch_size: int = 8,
    damping: float = 0.01,
    epochs: int | None = None,
    learning_rate: float = 4e-4,
    resume: Any = None,
    verbose: int = 1,
) -> QuantizeReport:
    """Round the weights of a model to 2 to 6 bits on data, in place.

    The kernels stay floats. `pack(model)` then stores them as integers, without
    further loss. Each weight becomes an integer, -8 to 7 in four bits, times a
    bfloat16 scale. Each group of `group_size` weights of an output unit along
    the contraction axis shares a scale. Zeros stay zeros, so a kernel with an
    N:M pattern keeps it.

    Rounding to nearest raises the perplexity of a small language model by a
    quarter. Here the outputs of a kernel on the data change least: GPTQ (arXiv
    2210.17323) rounds it, then each integer and scale is set to its best value.

    The head of a language model is rounded first. The kernels follow in the
    order of execution, each on the inputs that the rounded kernels before it
    give. The kernels and blocks of a language model use the first 16,384
    positions of the data, 64 rows of 256 tokens. The head and the scales use
    all of them. Beside the model, memory holds one layer or block in training,
    the hidden states, and copies of the head. A temporary file holds the
    original weights.

    `refine` then trains away a part of the remaining error:

    - `"blocks"` trains one layer or transformer block after the other. Each
      learns to give the outputs that it has in the original model. The weights,
      as floats behind their rounding, and the scales are trained. This takes
      about as long as `epochs + 3` epochs of training on these data.
    - `"scales"` trains the scales of all kernels and of the head at once, and
      leaves the integers alone. The model learns to give the outputs of the
      original one. The loss is KL(original || rounded) of the logits for a
      language model, and the squared error for others (EfficientQAT, arXiv
      2407.11062, section 3.3). This takes one epoch of training, or as many as
      make about 32 steps, and gains most for its time.

    `size="60MB"` is a budget of bytes, and `bits=3.5` a budget of bits. Each
    kernel gets the share that is worth most. The cost of rounding a kernel to
    2, 3, 4, 5 or 6 bits is estimated to second order. It is half of the change
    of each weight squared, times the curvature of the loss. For a language
    model the curvature is the Fisher information of tokens that the model would
    write itself. This takes one backward pass over some 4,000 tokens.

    Every eighth row of the data is held out, and the report gives the errors on
    these rows. A kernel is rounded to nearest if that is better there. If it is
    better for the model as a whole, all kernels are, and a warning says so.
    Training that makes a block or the scales worse there is undone.

    Call `pack(model, "int8")` alone for int8: it rounds by itself and loses
    almost nothing.

    Args:
        model: A built `keras.Model` or layer, dense or sparse.
        data: The calibration data, in any form that `sparsify` takes: some 100
            rows of text. `None` lets a KerasHub `CausalLM` write the text
            itself first, by `self_generated`. Defaults to `None`.
        bits: Int, 2 to 6, the bits of each weight; or float, 2.0 to 6.0, the
            mean over all weights. Kernels with a 2:4 or 16:32 pattern get 4.
            Defaults to `None`, for `4` where `size` is not given.
        size: Int or string, such as `"60MB"` or `"1.5GiB"`: the most bytes that
            all weights of the model take after `pack(model)`. Defaults to
            `None`.
        refine: `"blocks"`, `"scales"`, both in a tuple, or `None`. They need
            the graph of a functional model. The report says where they are left
            out. Defaults to both.
        head: Bool, whether to round the head of a language model too: the table
            that it shares with the embedding, or its own. `targets=[]` rounds
            the head alone. Defaults to `True`.
        targets: The kernels to round: `Targets`, or what `include=` of
            `find_targets` takes. Defaults to `None`, for all of them.
        group_size: Int, the inputs that share a scale. `pack` uses 64. Defaults
            to `64`.
        batch_size: Int, the rows run at a time where `data` are arrays or
            strings, and the rows of a step of `refine`. With a language model a
            step has about 256 positions. Defaults to `8`.
        damping: Float > 0, the share of the mean of the second moment's
            diagonal that is added to it. A table that also looks tokens up gets
            ten times as much. Defaults to `0.01`.
        epochs: Int, passes of `"blocks"` over its data. Defaults to `None`, for
            `2` with a language model and `6` with others.
        learning_rate: Float > 0. Adam's peak rate for `"blocks"` is this times
            the root mean square of a kernel / 0.2. Defaults to `4e-4`.
        resume: String or path of a folder. Each block is written there once it
            is done. After a kill or an error the same call continues from there
            and gives the same weights, bit for bit on the same machine. The
            folder takes the disk space of the kernels. Remove it once you have
            saved the model. Defaults to `None`, for no folder.
        verbose: 0 or 1. 0 shows no progress bar. Defaults to `1`.

    Returns:
        A `QuantizeReport`. Kernels are rounded to nearest if the inputs of
        their layers cannot be read (see `register_layer_kind`), or if the data
        do not reach them. The report names them, and lists what was skipped
        with reasons.

    Raises:
        ValueError: If an argument is outside the ranges above. If `data` are
            empty, endless, reach no kernel, or are missing for a model that
            writes no text. If there is no kernel, a target is reparameterized,
            or an activation or a weight is not finite. If `resume` belongs to a
            call with other arguments, model or data. The model is unchanged
            then, as after any other error.

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
    x = np.random.normal(size=(512, 16))
    report = kwm.quantize(model, x, verbose=0)
    assert all(k.error <= k.nearest for k in report.kernels)
    print(report)
    ```
    """
    if isinstance(data, str) and re.fullmatch(r"[a-z]*(int|float)\d\w*", data):
        data, bits = None, data
    if isinstance(bits, str) and re.fullmatch("int[2-68]", bits):
        bits = int(bits[-1])
    if isinstance(bits, int) and bits == 8:
        raise ValueError(
            "`quantize` rounds to 2 to 6 bits. For int8 call `kwm.pack(model, "
            '"int8")`, which rounds by itself and loses next to nothing. '
            f"Received: bits={bits!r}"
        )
    if size is not None:
        size = bytes_in(size)
        if bits is not None:
            raise checks.error("bits", "None where `size` is given", bits)
    elif bits is None:
        bits = 4
    elif isinstance(bits, float):
        checks.check_float("bits", bits, WIDTHS[0], WIDTHS[-1])
    else:
        checks.check_int("bits", bits, WIDTHS[0], WIDTHS[-1])
    refinements = checks.check_choices("refine", refine, _REFINEMENTS)
    checks.check_bool("head", head)
    checks.check_int("group_size", group_size, 1)
    checks.check_int("batch_size", batch_size, 1)
    checks.check_verbose(verbose)
    damping = checks.check_float("damping", damping, above=0)
    if epochs is not None:
        checks.check_int("epochs", epochs, 1, 10_000)
    learning_rate = checks.check_float("learning_rate", learning_rate, above=0)
    targets = resolve_targets(model, targets)
    end = find_head(model)
    # With texts, many small steps gain more in the same time than few large
    # ones.
    epochs, step = epochs or (2 if end else 6), _STEP if end else None
    tables, left = find_table(model, end if head else None, targets)
    # The head is rounded or left on its own, whatever happens elsewhere.
    own = {*(t.path for t in tables), *(s.path for s in left)}
    kernels = [target for target in targets if target.path not in own]
    skipped = *(s for s in targets.skipped if s.path not in own), *left
    if not kernels and not tables:
        raise ValueError(
            "`quantize` found no kernel. Received: targets that are all "
            f"skipped, {skipped_text(skipped)}"
        )
    check_stored("quantize", kernels)
    check_finite(target.variable for target in (*kernels, *tables))
    if group_size % GROUP and any(
        target.contraction_size > group_size for target in (*kernels, *tables)
    ):
        warnings.warn(
            f"`pack` has a scale for each {GROUP} inputs, and would round "
            f"weights of `group_size={group_size}` again. Leave it out for a "
            "model that will be packed.",
            stacklevel=2,
        )
    is_mixed = size is not None or isinstance(bits, float)
    if is_mixed and keras_compat.graph_of(model) is None:
        raise ValueError(
            "A budget needs the graph of a functional model. Received: "
            f"{model.name!r} of type {type(model).__name__}, which has none. "
            "Pass `bits` as an int, 2 to 6."
        )
    if is_mixed and end and splittable_head(model) is None:
        raise ValueError(
            "A budget needs gradients through the head, which vanish in "
            "float16. Received: a head that computes in float16, is quantized, "
            "or has an activity regularizer. Pass `bits` as an int, 2 to 6."
        )
    note = ""
    if refinements and keras_compat.graph_of(model) is None:
        note = (
            f"Without {' and '.join(refinements)}, which take the graph of a "
            "functional model"
        )
        refinements = ()
    elif "scales" in refinements:
        if end and splittable_head(model) is None:
            note = (
                "Without scales: the head is quantized or has a regularizer of "
                "activities, or computes in float16, where gradients vanish"
            )
        elif not any(map(is_float, keras.tree.flatten(output_of(model)))):
            note = "Without scales: it gives no vector of floats to compare"
        if note:
            refinements = tuple(r for r in refinements if r != "scales")
    batches: Any = None
    if data is not None:
        batches = data_forms.calibration_batches(model, data, batch_size)
    elif not hasattr(model, "generate"):
        expected = "calibration data, some 100 rows; only a KerasHub "
        expected += "`CausalLM` writes text of its own"
        raise checks.error("data", expected, None)
    changed = [*tables, *kernels]
    fit = {"epochs": epochs, "learning_rate": learning_rate, "positions": step}
    arguments = {
        **fit,
        "batch_size": batch_size,
        "bits": bits,
        "damping": damping,
        "group_size": group_size,
        "refine": sorted(refinements),
        "size": size,
    }
    record = Record(resume, model, batches, changed, arguments, verbose)
    if data is None:
        length = longest_input(model, _LENGTH)
        text = record.once(
            "text",
            lambda: self_generated(
                model, _ROWS, length, verbose=verbose
            ).tolist(),
        )
        data = np.array(text, "int32")
        batches = data_forms.calibration_batches(model, data, batch_size)
    batches, held = data_forms.held_out(batches)
    is_trained = "blocks" in refinements
    trained: Any = None
    both: Any = None
    values = [each.variable for each in changed]
    undo = RestoredOnError(model, values=values, on_disk=True)
    quantizer = _Quantizer(
        *(bits, group_size, damping, fit if is_trained else {}, record),
        undo.value_of,
    )
    with undo:
        outputs: Any = None
        if tables or is_mixed or "scales" in refinements:
            body = end.body if end else model
            outputs = Outputs(body, batches, held, verbose)
        if is_mixed:
            given = model, end, outputs, changed, quantizer.grid_for
            own_bits, size = record.once(
                "bits", lambda: choose_bits(*given, bits, size)
            )
            quantizer.own_bits = dict(zip((t.key for t in changed), own_bits))
        if held:
            measure = HeldOut(model, held)

            def to_nearest() -> float:
                quantizer.to_nearest(changed)
                found = measure()
                undo.give_values_back()
                return found

            plain = record.once("nearest", to_nearest)
        for table in tables:
            if record.recall([table]):
                continue
            grid = quantizer.grid_for(table)
            scales, nearest, error = round_table(
                table, outputs, grid, damping, verbose
            )
            record.scales[table.key] = GridScales(table, scales, grid)
            about = table.key, table.path, table.shape
            record.rows[table.key] = QuantizedKernel(
                *about, nearest, error, grid.bits
            )
            record.keep([table])
        if "scales" not in refinements:
            # Nothing reads the hidden states again.
            outputs = None
        if kernels:
            train = quantizer.train if is_trained else None
            most = _POSITIONS // 8 if end else math.inf
            shown, measured = _first(batches, 7 * most), _first(held, most)
            change_kernels(
                *(model, kernels, shown, quantizer.round, train, verbose),
                # Warnings point to the line that calls this.
                *(measured, record.recall, 3),
            )
        rows = [*record.rows.values()]
        check_reached(rows, "`kwm.pack(model, 'int4')` rounds without data.")
        shared = seam.shared_variables(model)
        items = [
            item
            for item in record.scales.values()
            if id(item.target.variable) not in shared
        ]
        if "scales" in refinements and items:
            taught = values_of(end, undo.value_of)
            trained = train_scales(
                model, end, taught, outputs, items, *_SCALES, step, verbose
            )
        if held:
            after = measure()
            if after > plain or math.isnan(after) > math.isnan(plain):
                undo.give_values_back()
                quantizer.to_nearest(changed)
                why = (
                    "All was rounded to nearest: its loss on held-out rows is "
                    f"{plain:.3g}, and {after:.3g} when fitted to the data"
                )
                warnings.warn(
                    f"{why}. Pass more `data`, or data like those that the "
                    "model was trained on.",
                    stacklevel=2,
                )
                note = f"{note}. {why}".removeprefix(". ")
                rows = [dataclasses.replace(k, error=k.nearest) for k in rows]
                record.blocks.clear()
                trained = None
                after = plain
            both = None if math.isnan(plain) else (plain, after)
    warn_of_undone(record.blocks, 2)
    done = tuple(rows), skipped, tuple(record.blocks), note, both, trained
    if is_mixed:
        weights = [math.prod(row.shape) for row in rows]
        bits = float(np.average([row.bits for row in rows], weights=weights))
    return QuantizeReport(bits, group_size, *done, size)


def _first(batches: list[Any], positions: float) -> list[Any]:
    """Return the first batches of texts with at least so many positions."""
    sizes = [math.prod(keras.tree.flatten(x)[0].shape) for x, _ in batches]
    return batches[: 1 + int(np.sum(np.cumsum(sizes) < positions))]


@dataclasses.dataclass
class _Quantizer:
    """Round kernels, and train their blocks.

    Attributes:
        bits: Int, or float with a budget: those of a weight, on the mean.
        group_size, damping: As of `quantize`.
        fit: Options of `train_block`; empty where blocks are not trained.
        record: `Record` of what has been done.
        value_before: Callable from a variable to its value before rounding.
        own_bits: Dict by key of the bits of a kernel, with a budget.
        items: Dict by key of what has been rounded and not been trained.
    """

    bits: Any
    group_size: int
    damping: float
    fit: dict[str, Any]
    record: Record
    value_before: Any
    own_bits: dict[str, int] = dataclasses.field(default_factory=dict)
    items: dict[str, GridWeights] = dataclasses.field(default_factory=dict)

    def to_nearest(self, targets: list[Target]) -> None:
        """Round each weight to nearest."""
        for target in targets:
            grid = self.grid_for(target)
            change_units(
                target, lambda x, grid=grid: round_kept(x, None, grid).values
            )

    def round(
        self, group: list[Target], moments: Any, note: str
    ) -> Iterator[QuantizedKernel]:
        """Round kernels that share their inputs; yield what was done."""
        fit = [None] if moments is None else moments.fit
        for target in group:
            grid = self.grid_for(target)
            axes = target.contraction_axes, target.stack_axes
            before = to_stack(target.variable.value, *axes, len(fit))
            rounded = [
                round_kept(w, h, grid, self.damping)
                for w, h in zip(before, fit)
            ]
            after, scales = map(ops.stack, zip(*rounded))
            errors: list[Any] = [None, None]
            own = note
            if moments is not None:
                plain = [round_kept(w, None, grid) for w in before]
                nearest, nearest_scales = map(ops.stack, zip(*plain))
                errors = moments.errors(before, (nearest, after))
                if errors[1] > errors[0]:
                    after, scales = nearest, nearest_scales
                    errors[1] = errors[0]
                    own = f"{own}; to nearest, better on rows held out"
            target.variable.assign(from_stack(after, target.shape, *axes))
            item = GridWeights(target, self.value_before, scales, grid)
            self.record.scales[target.key] = GridScales(target, scales, grid)
            if self.fit:
                self.items[target.key] = item
            row = QuantizedKernel(
                target.key,
                target.path,
                target.shape,
                *errors,
                bits=grid.bits,
                note=own.removeprefix("; "),
                rows=None if moments is None else moments.rows,
            )
            self.record.rows[target.key] = row
            yield row
        if not self.fit:
            self.record.keep(group)

    def train(self, operation: Any, group: list[Target], *calls: Any) -> None:
        """Train the kernels of a block through their rounding."""
        items = [self.items.pop(target.key) for target in group]
        seam.attach(operation, items)
        block = train_block(operation, group, *calls, **self.fit)
        seam.fold(operation, GridWeights)
        for item in items:
            self.record.scales[item.target.key].scales = item.scales
        if block is not None:
            self.record.blocks.append(block)
        self.record.keep(group, block)

    def grid_for(self, target: Target, bits: int | None = None) -> Grid:
        """Return a grid whose weights are exact in the kernel's type."""
        bits = bits or self.own_bits.get(target.key, self.bits)
        significant = _SIGNIFICANT.get(target.variable.dtype, 24)
        precision = min(Grid.precision, significant - (bits - 1))
        return Grid(bits, self.group_size, precision)
