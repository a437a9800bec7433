"""One-shot N:M sparsity: magnitude, Wanda and SparseGPT."""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_weightmods.core.reparameterization import slots
from keras_weightmods.core.targets import (
    Target,
    Targets,
    resolve_targets,
)
from keras_weightmods.ops.matrix import from_stack, to_stack
from keras_weightmods.ops.nm import Pattern, nm_project, parse_pattern
from keras_weightmods.ops.sparsegpt import (
    inverse_factor,
    reconstruction_error,
    sparsegpt,
    wanda,
)
from keras_weightmods.sparsity.data import batch_count, batches, preprocess
from keras_weightmods.sparsity.walk import Walk
from keras_weightmods.utils import checks
from keras_weightmods.utils.report import Report, Skipped, Table, shape_text

METHODS = ("magnitude", "wanda", "sparsegpt")


@dataclasses.dataclass(frozen=True)
class SparsifiedKernel:
    """One kernel of a `SparsifyReport`.

    Attributes:
        key: String, place and path of the kernel in the model.
        path: String.
        shape: Tuple of ints.
        method: String, the method by which it was pruned.
        error: Float, what that changes of the layer's outputs on the
            calibration data, `|X W' - X W|^2 / |X W|^2`; None without data.
        note: String, why another method than the one asked for was taken.
    """

    key: str
    path: str
    shape: tuple[int, ...]
    method: str
    error: float | None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class SparsifyReport(Report):
    """What `sparsify` did.

    Attributes:
        pattern: String, `"n:m"`.
        method: String.
        kernels: Tuple of `SparsifiedKernel`, in the order they were pruned.
        skipped: Tuple of `Skipped(path, reason)`: kernels left dense.
    """

    pattern: str
    method: str
    kernels: tuple[SparsifiedKernel, ...]
    skipped: tuple[Skipped, ...]

    def tables(self) -> Iterator[Table]:
        errors = [r.error for r in self.kernels if r.error is not None]
        yield Table(
            f"{self.pattern} by {self.method}",
            ("kernel", "shape", "output error", "note"),
            tuple(
                (
                    row.path,
                    shape_text(row.shape),
                    "" if row.error is None else f"{row.error:.1%}",
                    f"{row.method}: {row.note}" if row.note else "",
                )
                for row in self.kernels
            ),
            caption=f"{len(self.kernels)} kernels"
            + (f"; mean error {np.mean(errors):.1%}" if errors else ""),
        )


def sparsify(
    model: keras.layers.Layer,
    pattern: Pattern = "2:4",
    method: str = "magnitude",
    data: Any = None,
    *,
    targets: Any = None,
    batch_size: int = 8,
    damping: float = 0.01,
    block_size: int = 128,
    verbose: int = 1,
) -> SparsifyReport:
    """Make a model N:M sparse in one shot, in place, without training.

    - `"magnitude"` keeps the largest weights of each group.
    - `"wanda"` keeps the largest `|w| * ||x||`, x being the weight's input
      over the calibration data (arXiv 2306.11695).
    - `"sparsegpt"` keeps those whose removal costs most when the others make
      up for it, and changes the others so that they do (arXiv 2301.00774). It
      is the strongest of the three; give it some 100 rows of text or more.

    Kernels are pruned one after the other, in the order of execution, each
    for the inputs that the pruned layers before it give. Only these are kept
    between two layers: a functional model (KerasHub's, ResNets, `Sequential`)
    is gone through once, a layer or a transformer block at a time, and a
    block is run again for each kernel in it that has inputs of its own. A
    subclassed model is run again as a whole.

    For SparseGPT and Wanda a kernel with K inputs takes `4 * K**2` bytes
    while it is worked on. A copy of all targets is held to the end, for the
    case of an error.

    Args:
        model: A built `keras.Model` or layer.
        pattern: String `"n:m"` or pair of ints: n weights kept of every m.
            Defaults to `"2:4"`.
        method: `"magnitude"`, `"wanda"` or `"sparsegpt"`. Defaults to
            `"magnitude"`.
        data: What the model is calibrated on: inputs as for `predict`, as
            arrays, a `tf.data.Dataset`, a `keras.utils.PyDataset` or a
            generator of batches; pairs or triples as for `fit`, whose labels
            are ignored and whose sample weights of 0 leave positions out; or
            raw strings, for a KerasHub task with a preprocessor. With
            `"magnitude"` it serves the errors in the report alone. Defaults
            to `None`.
        targets: The kernels to prune: `Targets`, or what `include=` of
            `find_targets` takes. Defaults to `None`, for all of them.
        batch_size: Int, the rows run at a time where `data` are arrays or
            strings. Defaults to `8`.
        damping: Float > 0, for `"sparsegpt"`: the share of the mean of the
            second moment's diagonal that is added to it. Defaults to `0.01`.
        block_size: Int, for `"sparsegpt"`: see
            `keras_weightmods.ops.sparsegpt.sparsegpt`. Defaults to `128`.
        verbose: 0 or 1. 0 shows no progress bar. Defaults to `1`.

    Returns:
        A `SparsifyReport`. Kernels
        whose layers' inputs cannot be read (`register_target`), or that the
        data do not reach, are pruned by magnitude; the report names them.

    Raises:
        ValueError: If an argument is outside the ranges above, `data` is
            missing, empty or endless, no target fits the pattern, a target is
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
    report = kwm.sparsify(model, "2:4", "sparsegpt", data=x, verbose=0)
    kwm.assert_sparse(model, "2:4")
    print(report)
    ```
    """
    pruner = OneShot(pattern, method, damping, block_size, verbose)
    checks.check_int("batch_size", batch_size, 1)
    if data is None and method != "magnitude":
        raise ValueError(
            f"`method={method!r}` ranks weights by what their inputs are like "
            "and needs calibration data, about 100 rows of text or more. "
            'Pass `data=`, or take `method="magnitude"`. Received: data=None'
        )
    found = resolve_targets(model, targets)
    usable = fitting_targets("sparsify", found, pattern)
    taken = [t.path for t in usable if t.attribute in slots(t.layer)]
    if taken:
        raise ValueError(
            "`sparsify` prunes stored kernels, which are not what these "
            f"layers compute with: {taken[:5]}. Call `kwm.fold(model)` first, "
            "or leave them out of `targets`."
        )
    calibration = None
    if data is not None:
        calibration = list(_calibration_batches(model, data, batch_size))
        if not calibration:
            raise ValueError(
                "`data` must hold one batch at least. Received: "
                f"data of type {type(data).__name__}, which is empty"
            )
    return pruner(model, usable, calibration)


def fitting_targets(
    caller: str, targets: Targets, pattern: Pattern, trainable: bool = False
) -> Targets:
    """Return those of `targets` that fit a pattern; the others are skipped.

    Args:
        caller: String, for the error message.
        targets: `Targets`.
        pattern: String `"n:m"` or pair of ints.
        trainable: Bool, whether frozen kernels are skipped too.

    Raises:
        ValueError: If none does.
    """
    n, m = parse_pattern(pattern)
    fitting = targets.select(
        lambda target: (
            target.reason_not_nm(m)
            or (trainable and not target.variable.trainable and "frozen")
            or None
        )
    )
    if not fitting:
        raise ValueError(
            f"`{caller}` found no kernel that fits pattern {n}:{m}. "
            f"Received: targets {[(t.path, t.shape) for t in targets]}, "
            f"skipped {fitting.skipped}"
        )
    return fitting


@dataclasses.dataclass(frozen=True)
class OneShot:
    """The pruning that `sparsify` does.

    Args:
        pattern, method, damping, block_size, verbose: As in `sparsify`.

    Example:

    ```python
    import keras
    from keras_weightmods import assert_sparse, find_targets
    from keras_weightmods.sparsity.sparsify import OneShot

    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    prune = OneShot("2:4", "magnitude", verbose=0)
    report = prune(model, find_targets(model))
    assert_sparse(model, "2:4")
    ```
    """

    pattern: Pattern
    method: str
    damping: float = 0.01
    block_size: int = 128
    verbose: int = 1

    def __post_init__(self) -> None:
        parse_pattern(self.pattern)
        checks.check_choice("method", self.method, METHODS)
        checks.check_float("damping", self.damping, above=0)
        checks.check_int("block_size", self.block_size, 1)

    def __call__(
        self,
        model: keras.layers.Layer,
        targets: Targets,
        calibration: list[tuple[Any, Any]] | None = None,
    ) -> SparsifyReport:
        """Prune all of `targets` or, on an error, none.

        Args:
            model: A built Keras model or layer.
            targets: `Targets` of it that fit the pattern.
            calibration: List of pairs (inputs, sample weights or None).

        Returns:
            A `SparsifyReport`.
        """
        progress = keras.utils.Progbar(
            len(targets),
            unit_name="kernel",
            verbose=self.verbose,
            stateful_metrics=["output error"],
        )
        kernels: list[SparsifiedKernel] = []

        def visit(group: list[Target], moment: Any, note: str = "") -> None:
            for kernel in self._pruned(group, moment, note):
                kernels.append(kernel)
                error = kernel.error
                shown = [] if error is None else [("output error", error)]
                progress.update(len(kernels), shown)

        ordered = sorted(targets, key=lambda target: target.depth)
        # Copies: on torch an array shares the memory of the variable.
        before = [np.array(ops.convert_to_numpy(t.variable)) for t in ordered]
        try:
            if calibration is None:
                visit(ordered, None)
            else:
                Walk(ordered, calibration, visit)(model)
        except BaseException:
            for target, value in zip(ordered, before):
                target.variable.assign(value)
            raise
        n, m = parse_pattern(self.pattern)
        return SparsifyReport(
            f"{n}:{m}", self.method, tuple(kernels), targets.skipped
        )

    def _pruned(
        self, group: list[Target], moment: Any, note: str
    ) -> Iterator[SparsifiedKernel]:
        """Prune kernels that share their inputs; yield what was done."""
        if moment is not None and not bool(ops.all(ops.isfinite(moment))):
            raise ValueError(
                "The calibration data must give finite activations. Received: "
                f"NaN or infinite ones at the input of {group[0].path}"
            )
        method = self.method if moment is not None else "magnitude"
        factors: list[Any] = []
        if method == "sparsegpt":
            factors = [
                inverse_factor(h, self.damping)
                for h in ops.convert_to_numpy(moment)
            ]
        for target in group:
            stacks = 1 if moment is None else moment.shape[0]
            axes = target.contraction_axes, target.stack_axes
            before = to_stack(target.variable.value, *axes, stacks)
            after = []
            for i in range(stacks):
                if method == "sparsegpt":
                    matrix = sparsegpt(
                        before[i], factors[i], self.pattern, self.block_size
                    )
                elif method == "wanda":
                    norms = ops.sqrt(ops.diagonal(moment[i]))
                    matrix = wanda(before[i], norms, self.pattern)
                else:
                    matrix = nm_project(before[i], self.pattern)
                after.append(matrix)
            after = ops.stack(after)
            error = None
            if moment is not None:
                error = _relative_error(before, after, moment)
            target.variable.assign(from_stack(after, target.shape, *axes))
            yield SparsifiedKernel(
                target.key, target.path, target.shape, method, error, note
            )


def _calibration_batches(
    model: Any, data: Any, batch_size: int
) -> Iterable[tuple[Any, Any]]:
    x, weights = data, None
    if isinstance(data, tuple):
        # Not of a list, which may be one of strings or of several inputs.
        x, _, weights = keras.utils.unpack_x_y_sample_weight(data)
    x, _, weights = preprocess(model, x, None, weights)
    if batch_count(x, batch_size) == math.inf:
        raise ValueError(
            "`data` must end. Received: endless data of type "
            f"{type(x).__name__}; take a part of it, with `.take(batches)` or "
            "`itertools.islice`"
        )
    return batches(x, batch_size, weights)


def _relative_error(before: Any, after: Any, moment: Any) -> float:
    pairs = map(reconstruction_error, before, after, moment)
    change, whole = map(sum, zip(*pairs))
    return change / whole if whole > 0 else 0.0
