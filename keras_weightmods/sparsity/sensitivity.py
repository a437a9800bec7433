"""Which kernels a model can least do without, when they get sparse."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_weightmods.calibration import inputs as calibration
from keras_weightmods.calibration.walk import check_stored
from keras_weightmods.core.data import calibration_batches
from keras_weightmods.core.head import find_head
from keras_weightmods.core.targets import Targets, resolve_targets
from keras_weightmods.ops.matrix import along
from keras_weightmods.ops.nm import Pattern, nm_mask, parse_pattern
from keras_weightmods.sparsity import sparsify
from keras_weightmods.utils import checks
from keras_weightmods.utils.report import Report, Skipped, Table, shape_text


@dataclasses.dataclass(frozen=True)
class KernelSensitivity:
    """One kernel of a `SensitivityReport`.

    Attributes:
        key: String, place and path of the kernel in the model.
        path: String.
        shape: Tuple of ints.
        error: Float, what pruning this kernel alone changes of the model's
            outputs, `|Y' - Y|^2 / |Y|^2`.
    """

    key: str
    path: str
    shape: tuple[int, ...]
    error: float

    @property
    def size(self) -> int:
        """The number of weights."""
        return int(np.prod(self.shape))


@dataclasses.dataclass(frozen=True)
class SensitivityReport(Report):
    """What `sensitivity` measured.

    Attributes:
        pattern: String, `"n:m"`.
        kernels: Tuple of `KernelSensitivity`, those that hurt most for their
            size first.
        skipped: Tuple of `Skipped(path, reason)`: kernels not measured.
    """

    pattern: str
    kernels: tuple[KernelSensitivity, ...]
    skipped: tuple[Skipped, ...]

    def tables(self) -> Iterator[Table]:
        yield Table(
            f"Pruned alone to {self.pattern}",
            ("kernel", "shape", "output error", "for 1e6 weights"),
            tuple(
                (
                    row.path,
                    shape_text(row.shape),
                    f"{row.error:.3%}",
                    f"{row.error / row.size * 1e6:.3%}",
                )
                for row in self.kernels
            ),
            caption=f"{len(self.kernels)} kernels",
        )

    def targets(self, model: keras.layers.Layer, dense_share: float) -> Targets:
        """Return the kernels to make sparse where a share is to stay dense.

        Args:
            model: The model that was measured.
            dense_share: Float in [0, 1), at most which share of the weights
                stays dense: kernels that hurt most for their size.

        Returns:
            `Targets`, for the `targets=` of `sparsify`, `CAST` and others. The
            kernels that stay dense are in its `skipped`.

        Raises:
            ValueError: If `dense_share` is outside its range, or a kernel of
                the report is not in `model`.
        """
        dense_share = checks.check_float(
            "dense_share", dense_share, least=0, below=1
        )
        found = resolve_targets(model, None)
        keys = {target.key for target in found}
        if missing := [k.path for k in self.kernels if k.key not in keys]:
            expected = "the model that the sensitivity was measured on"
            raise checks.error("model", expected, f"one without {missing[:5]}")
        room = dense_share * sum(kernel.size for kernel in self.kernels)
        dense: dict[str, float] = {}
        for kernel in self.kernels:
            if kernel.size <= room:
                room -= kernel.size
                dense[kernel.key] = kernel.error
        measured = {kernel.key for kernel in self.kernels}
        return found.select(
            lambda target: (
                f"stays dense, costs {dense[target.key]:.3%} of the outputs"
                if target.key in dense
                else None
                if target.key in measured
                else "its sensitivity was not measured"
            )
        )


def sensitivity(
    model: keras.layers.Layer,
    data: Any,
    pattern: Pattern = "2:4",
    *,
    targets: Any = None,
    batch_size: int = 1,
    verbose: int = 1,
) -> SensitivityReport:
    """Measure what each kernel costs when it alone is pruned.

    A model with a few kernels left dense is bigger and slower than one that
    is sparse throughout, and better. This tells which ones to leave:
    `sparsify(model, targets=report.targets(model, dense_share=0.2))`.

    Each kernel is pruned by Wanda's scores (arXiv 2306.11695), in its dense
    model, which is run on all of `data` for it: a row or two of text are
    enough. Of a language model with a known head what enters that is
    compared, else the outputs.

    Args:
        model: A built `keras.Model` or layer.
        data: As in `sparsify`.
        pattern: String `"n:m"` or pair of ints: n weights kept of every m.
            Defaults to `"2:4"`.
        targets: The kernels to measure: `Targets`, or what `include=` of
            `find_targets` takes. Defaults to `None`, for all of them.
        batch_size: Int, the rows run at a time where `data` are arrays or
            strings. Defaults to `1`.
        verbose: 0 or 1. 0 shows no progress bar. Defaults to `1`.

    Returns:
        A `SensitivityReport`.

    Raises:
        ValueError: As `sparsify`, and if the outputs are not finite. The
            model is unchanged, also when this returns.

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
    report = kwm.sensitivity(model, x, batch_size=32, verbose=0)
    sparse = report.targets(model, dense_share=0.3)  # the small one stays
    kwm.sparsify(model, "2:4", "sparsegpt", x, targets=sparse, verbose=0)
    print(report, sparse.skipped)
    ```
    """
    n, m = parse_pattern(pattern)
    checks.check_int("batch_size", batch_size, 1)
    checks.check_verbose(verbose)
    if data is None:
        raise checks.error("data", "calibration data, a row or two", data)
    usable = sparsify.fitting_targets(
        "sensitivity", resolve_targets(model, targets), pattern
    )
    check_stored("sensitivity", usable)
    batches = calibration_batches(model, data, batch_size)
    progress = keras.utils.Progbar(
        len(usable), unit_name="kernel", verbose=verbose
    )
    progress.update(0)
    norms = calibration.input_norms(model, usable, batches)
    run = _output_function(model, usable)
    dense = [run(x) for x, _ in batches]
    energy = sum(np.square(y).sum() for y in dense)
    # A ReLU may turn NaN into zero.
    measured = [energy, *(norm.sum() for norm in norms if norm is not None)]
    if not np.isfinite(measured).all():
        expected = "inputs for which activations and outputs are finite"
        raise checks.error("data", expected, "ones with NaN or infinite ones")
    rows = []
    for target, norm in zip(usable, norms):
        # A copy: on torch an array shares the memory of the variable.
        before = np.array(ops.convert_to_numpy(target.variable.value))
        axes = target.contraction_axes
        kernel = ops.convert_to_tensor(target.variable.value)
        scores = ops.cast(kernel, "float32")
        if norm is not None:
            scores = scores * along(norm, target.shape, axes)
        try:
            target.variable.assign(
                ops.where(
                    nm_mask(scores, (n, m), axes),
                    kernel,
                    ops.zeros_like(kernel),
                )
            )
            change = sum(
                np.square(run(x) - y).sum() for (x, _), y in zip(batches, dense)
            )
        finally:
            target.variable.assign(before)
        error = float(change / energy) if energy else 0.0
        rows.append(
            KernelSensitivity(target.key, target.path, target.shape, error)
        )
        progress.add(1)
    rows.sort(key=lambda row: row.error / row.size, reverse=True)
    return SensitivityReport(f"{n}:{m}", tuple(rows), usable.skipped)


def _output_function(model: Any, targets: Targets) -> Any:
    """Return a function from inputs to what is compared, a float64 vector."""
    head = find_head(model)
    if head is not None and not any(t.layer in head.layers for t in targets):
        model = head.body

    def run(x: Any) -> np.ndarray:
        if isinstance(model, keras.Model):
            outputs = model.predict_on_batch(x)
        else:
            with calibration.eager_forward():
                outputs = model(x, training=False)
        flat = map(ops.convert_to_numpy, keras.tree.flatten(outputs))
        return np.concatenate([np.ravel(y).astype("float64") for y in flat])

    return run
