"""One-shot N:M sparsity: magnitude, Wanda and SparseGPT."""

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_weightmods.calibration.block_reconstruction import (
    ReconstructedBlock,
    blocks_table,
    train_block,
    warn_of_undone,
)
from keras_weightmods.calibration.walk import (
    change_kernels,
    check_finite,
    check_reached,
    check_stored,
)
from keras_weightmods.core.data import calibration_batches, held_out
from keras_weightmods.core.restored import RestoredOnError
from keras_weightmods.core.targets import Target, Targets, resolve_targets
from keras_weightmods.ops.nm import Pattern, nm_project, parse_pattern
from keras_weightmods.ops.refine import refined
from keras_weightmods.sparsity.criteria import CRITERIA, Inputs
from keras_weightmods.utils import checks
from keras_weightmods.utils.matrix import from_stack, to_stack
from keras_weightmods.utils.report import (
    Report,
    Row,
    Skipped,
    Table,
    skipped_text,
)

REFINEMENTS = ("swaps", "blocks")


@dataclasses.dataclass(frozen=True)
class SparsifiedKernel(Row):
    """One kernel of a `SparsifyReport`.

    Attributes:
        key, path, shape: As of `Row`.
        criterion: String, the one by which it was pruned.
        error: Float, what that changes of the layer's outputs,
            `|X W' - X W|^2 / |X W|^2`, on rows held out of the calibration
            data; None without data.
        note: String, why something else was done than was asked for, or that
            magnitude would have changed less.
    """

    criterion: str
    error: float | None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class SparsifyReport(Report):
    """The result of `sparsify`.

    Attributes:
        pattern: String, `"n:m"`.
        criterion: String.
        kernels: Tuple of `SparsifiedKernel`, in the order they were pruned.
            Their errors are those before blocks were reconstructed.
        skipped: Tuple of `Skipped(path, reason)`: kernels left dense.
        blocks: Tuple of `ReconstructedBlock`, with `refine="blocks"`.
    """

    pattern: str
    criterion: str
    kernels: tuple[SparsifiedKernel, ...]
    skipped: tuple[Skipped, ...]
    blocks: tuple[ReconstructedBlock, ...] = ()

    def tables(self) -> Iterator[Table]:
        errors = [r.error for r in self.kernels if r.error is not None]
        mean = f"; mean error {np.mean(errors):.1%}" if errors else ""
        yield Table(
            f"{self.pattern} by {self.criterion}",
            self.kernels,
            "kernel=path shape output_error=error:.1% criterion note",
            caption=(
                f"{len(self.kernels)} kernels{mean}. A plain `fit` loses the "
                "pattern; `SemiStructuredSparse.attach(model, "
                f"{self.pattern!r}, frozen=True)` keeps it"
            ),
        )
        if self.blocks:
            yield blocks_table(self.blocks)


def sparsify(
    model: keras.layers.Layer,
    pattern: Pattern = "2:4",
    data: Any = None,
    *,
    criterion: str = "magnitude",
    refine: Any = None,
    targets: Any = None,
    batch_size: int = 8,
    damping: float = 0.01,
    epochs: int = 4,
    learning_rate: float = 1e-3,
    verbose: int = 1,
) -> SparsifyReport:
    """Make a model N:M sparse in one shot, in place, without training.

    A plain `fit` afterwards loses the pattern. Call
    `SemiStructuredSparse.attach(model, pattern, frozen=True)` before it.

    - `"magnitude"` keeps the largest weights of each group.
    - `"wanda"` keeps the largest `|w| * ||x||`, where x is the weight's input
      over the calibration data (arXiv 2306.11695).
    - `"sparsegpt"` keeps the weights whose removal costs most when the others
      make up for it, and changes these others accordingly (arXiv 2301.00774).
      It is the strongest of the three. Give it some 100 rows of text or more.

    `keras_weightmods.sparsity.criteria` says how to add another criterion.
    `refine` improves the result of a criterion:

    - `"swaps"` swaps kept weights for removed ones of the same group. It fits
      the kept weights to the outputs of the dense kernel (arXiv 2512.10922,
      arXiv 2406.07831).
    - `"blocks"` trains the kept weights of one layer or transformer block after
      the other, to give the outputs of the dense model there (arXiv
      2510.14444). No gradient goes through more than a block. This takes most
      of the time, and gains most.

    Kernels are pruned one after the other, in the order of execution. Each sees
    the inputs that the pruned layers before it give, and only these inputs are
    kept between two layers. A functional model (KerasHub's, ResNets,
    `Sequential`) runs once, a layer or a transformer block at a time. A block
    runs again for each of its kernels with inputs of its own. A subclassed
    model runs again as a whole.

    While a kernel with K inputs is pruned, it takes about `20 * K**2` bytes for
    SparseGPT and `8 * K**2` for Wanda. A temporary file holds the original
    weights, in case of an error. With `"blocks"` the inputs and outputs of a
    block, dense and pruned, are held for all data.

    Every eighth row of the data is held out, and the report gives the errors on
    these rows. A refinement that makes a kernel or a block worse there is left
    out for it.

    Args:
        model: A built `keras.Model` or layer.
        pattern: String `"n:m"` or pair of ints: n weights kept of every m.
            Defaults to `"2:4"`.
        data: The calibration data: strings, for a KerasHub task with a
            preprocessor; rows of token ids, as lists or an array; inputs as for
            `predict`; or pairs or triples as for `fit`. Labels are ignored, and
            sample weights of 0 leave positions out. A `keras.utils.PyDataset`,
            a `tf.data.Dataset`, a torch `DataLoader` or a generator can give
            batches in these forms. With `"magnitude"` the data serve only the
            errors in the report. Defaults to `None`.
        criterion: `"magnitude"`, `"wanda"` or `"sparsegpt"`: how to choose the
            weights that are kept. Defaults to `"magnitude"`.
        refine: `"swaps"`, `"blocks"`, both in a tuple, or `None`. They need
            `data`, and `"blocks"` a functional model, such as KerasHub's.
            Defaults to `None`.
        targets: The kernels to prune: `Targets`, or what `include=` of
            `find_targets` takes. Defaults to `None`, for all of them.
        batch_size: Int, the rows run at a time where `data` are arrays or
            strings, and the rows of a step of `"blocks"`. Defaults to `8`.
        damping: Float > 0, for `"sparsegpt"` and `"swaps"`: the share of the
            mean of the second moment's diagonal that is added to it. Defaults
            to `0.01`.
        epochs: Int, passes of `"blocks"` over the data. Defaults to `4`.
        learning_rate: Float > 0. Adam's peak rate for `"blocks"` is this times
            the root mean square of a kernel / 0.2. Defaults to `1e-3`.
        verbose: 0 or 1. 0 shows no progress bar. Defaults to `1`.

    Returns:
        A `SparsifyReport`. Kernels are pruned by magnitude if the inputs of
        their layers cannot be read (see `register_layer_kind`), or if the data
        do not reach them. The report names them.

    Raises:
        ValueError: If an argument is outside the ranges above. If `data` is
            missing, empty or endless, or reaches no target. If no target fits
            the pattern, a target is reparameterized, or an activation is not
            finite. The model is unchanged then, as after any other error.

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
    report = kwm.sparsify(model, "2:4", x, criterion="sparsegpt", verbose=0)
    kwm.assert_sparse(model, "2:4")
    print(report)
    ```
    """
    checks.check_choice("criterion", criterion, CRITERIA)
    refinements = checks.check_choices("refine", refine, REFINEMENTS)
    damping = checks.check_float("damping", damping, above=0)
    checks.check_int("epochs", epochs, 1, 10_000)
    learning_rate = checks.check_float("learning_rate", learning_rate, above=0)
    checks.check_verbose(verbose)
    checks.check_int("batch_size", batch_size, 1)
    if isinstance(data, str) and data in CRITERIA:
        expected = f"calibration data. Pass `criterion={data!r}` by its name"
        raise checks.error("data", expected, data)
    if data is None and (CRITERIA[criterion].needs_data or refinements):
        asked = f"criterion={criterion!r} and refine={refine!r}"
        expected = f"calibration data for {asked}, some 100 rows"
        raise checks.error("data", expected, data)
    found = resolve_targets(model, targets)
    usable = fitting_targets("sparsify", found, pattern)
    check_stored("sparsify", usable)
    if data is not None:
        data = calibration_batches(model, data, batch_size)
    what = pattern, criterion, refinements, damping, epochs, learning_rate
    return prune(model, usable, data, *what, verbose)


def prune(
    model: keras.layers.Layer,
    targets: Targets,
    batches: list[tuple[Any, Any]] | None,
    pattern: Pattern,
    criterion: str,
    refinements: tuple[str, ...] = (),
    damping: float = 0.01,
    epochs: int = 4,
    learning_rate: float = 1e-3,
    verbose: int = 1,
) -> SparsifyReport:
    """Prune all of `targets` in one shot or, on an error, none.

    Args:
        model: A built Keras model or layer.
        targets: `Targets` of it that fit the pattern.
        batches: List of pairs (inputs, sample weights or None), or None.
        refinements: Tuple of strings, as `check_choices` returns it.
        pattern, criterion, damping, epochs, learning_rate, verbose: As in
            `sparsify`.

    Returns:
        A `SparsifyReport`.
    """
    check_finite([t.variable for t in targets])
    blocks: list[ReconstructedBlock] = []
    # The error of each kernel, and that by magnitude.
    errors: list[Any] = []
    held = None
    if batches and (CRITERIA[criterion].needs_data or refinements):
        batches, held = held_out(batches)

    def change(group: list[Target], moments: Any, note: str) -> Any:
        """Prune kernels that share their inputs; yield what was done."""
        is_known = moments is not None or not CRITERIA[criterion].needs_data
        used = criterion if is_known else "magnitude"
        rule = CRITERIA[used].prune
        inputs = [
            m if m is None else Inputs(m, damping)
            for m in ([None] if moments is None else moments.fit)
        ]
        for target in group:
            axes = target.contraction_axes, target.stack_axes
            before = to_stack(target.variable.value, *axes, len(inputs))
            pairs = zip(before, inputs)
            after = ops.stack([rule(*each, pattern) for each in pairs])
            error, own = None, note
            if moments is not None:
                found = [after]
                if "swaps" in refinements:
                    parts = zip(before, after, moments.fit)
                    swaps = [refined(*each, pattern, damping) for each in parts]
                    found.append(ops.stack(swaps))
                if held is not None:
                    plain = [nm_project(w, pattern) for w in before]
                    found.append(ops.stack(plain))
                error, *others = moments.errors(before, found)
                if "swaps" in refinements and others[0] <= error:
                    after, error = found[1], others[0]
                elif "swaps" in refinements:
                    own = f"{own}; no swaps, worse on rows held out"
                if held is not None:
                    errors.append((error, others[-1]))
                    if error > others[-1]:
                        own = f"{own}; {others[-1]:.1%} by magnitude"
            target.variable.assign(from_stack(after, target.shape, *axes))
            own = own.removeprefix("; ")
            yield SparsifiedKernel(
                target.key, target.path, target.shape, used, error, own
            )

    def rebuild(*block: Any) -> None:
        done = train_block(*block, epochs=epochs, learning_rate=learning_rate)
        if done:
            blocks.append(done)

    train = rebuild if "blocks" in refinements else None
    changed = [target.variable for target in targets]
    with RestoredOnError(model, values=changed, on_disk=True):
        kernels = change_kernels(
            model, targets, batches, change, train, verbose, held
        )
        if held is not None:
            check_reached(kernels, "`criterion='magnitude'` takes no data.")
    error, plain = np.mean(errors, axis=0) if errors else (0.0, 0.0)
    # By more than the difference between choices of rows.
    if error > 1.1 * plain:
        warnings.warn(
            "The outputs of the kernels have a mean error of "
            f"{error:.1%} on held-out rows. criterion='magnitude' has "
            f"{plain:.1%} there. Pass more `data`, or use that.",
            stacklevel=3,
        )
    warn_of_undone(blocks, 3)
    name = "{}:{}".format(*parse_pattern(pattern))
    found = tuple(kernels), targets.skipped, tuple(blocks)
    return SparsifyReport(name, criterion, *found)


def fitting_targets(
    caller: str,
    targets: Targets,
    pattern: Pattern,
    reason: Callable[[Target], str | None] = lambda target: None,
) -> Targets:
    """Return the `targets` that fit a pattern; the others are skipped.

    Args:
        caller: String, for the error message.
        targets: `Targets`.
        pattern: String `"n:m"` or pair of ints.
        reason: Callable from a `Target` to another reason to skip it, or None.

    Raises:
        ValueError: If none does.
    """
    n, m = parse_pattern(pattern)
    fitting = targets.select(lambda each: each.reason_not_nm(m) or reason(each))
    if not fitting:
        raise ValueError(
            f"`{caller}` found no kernel that fits pattern {n}:{m}. "
            f"Received: {len(targets)} targets, skipped: "
            f"{skipped_text(fitting.skipped)}"
        )
    return fitting
