"""How sparse a model is, kernel by kernel."""

import dataclasses
import math

import numpy as np
from keras import ops

from keras_weightmods.core import seam
from keras_weightmods.core.targets import quantized_kernels, resolve_targets
from keras_weightmods.ops.nm import nm_violations, parse_pattern
from keras_weightmods.utils.tables import PrintsAsTable


@dataclasses.dataclass(frozen=True)
class SparsityRow:
    """One kernel of a `SparsityReport`.

    Attributes:
        key: String, place and path of the kernel in the model.
        path: String.
        shape: Tuple of ints.
        pattern: String, the pattern that was checked, `"n:m"`.
        groups: Int, groups of m weights; 0 where the contraction size is no
            multiple of m.
        violations: Int, groups that hold more than n nonzeros.
        zero_share: Float in [0, 1], zeros among the weights.
        size: Int, number of weights.
    """

    key: str
    path: str
    shape: tuple[int, ...]
    pattern: str
    groups: int
    violations: int
    zero_share: float
    size: int

    @property
    def is_exact(self):
        """Whether every group holds at most n nonzeros."""
        return self.groups > 0 and self.violations == 0


@dataclasses.dataclass(frozen=True)
class SparsityReport(PrintsAsTable):
    """What `sparsity_report` found. Prints as a table.

    Attributes:
        pattern: String, `"n:m"`.
        rows: Tuple of `SparsityRow`, in the order of execution.
        skipped: Tuple of `Skipped(path, reason)`: kernels left dense.
        model_size: Int, all weights of the model, packed and quantized ones
            as if dense.
    """

    pattern: str
    rows: tuple[SparsityRow, ...]
    skipped: tuple
    model_size: int

    @property
    def totals(self):
        """Sums over the rows, as a dict."""
        size = sum(row.size for row in self.rows)
        zeros = sum(row.zero_share * row.size for row in self.rows)
        return {
            "kernels": len(self.rows),
            "exact": sum(row.is_exact for row in self.rows),
            "violations": sum(row.violations for row in self.rows),
            "zero_share": zeros / size if size else 0.0,
            "size": size,
            "model_size": self.model_size,
        }

    def to_dict(self):
        """The whole report as plain Python values, ready for JSON."""
        return {
            "pattern": self.pattern,
            "targets": [
                {**dataclasses.asdict(row), "shape": list(row.shape)}
                for row in self.rows
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
            title=f"Sparsity, pattern {self.pattern}",
            caption=(
                f"{totals['exact']} of {totals['kernels']} kernels are "
                f"exactly {self.pattern}; they hold "
                f"{totals['size'] / max(1, self.model_size):.1%} of the "
                "model's weights"
            ),
        )
        table.add_column("kernel")
        for name in ("shape", "weights", "zeros", "bad groups"):
            table.add_column(name, justify="right")
        for row in self.rows:
            bad = f"{row.violations:,} of {row.groups:,}"
            table.add_row(
                row.path,
                "x".join(map(str, row.shape)),
                f"{row.size:,}",
                f"{row.zero_share:.1%}",
                bad if row.groups else "does not fit",
            )
        table.add_section()
        table.add_row(
            "total",
            "",
            f"{totals['size']:,}",
            f"{totals['zero_share']:.1%}",
            f"{totals['violations']:,}",
        )
        yield table
        if self.skipped:
            dense = Table(title="Left dense")
            dense.add_column("weight")
            dense.add_column("reason")
            for skip in self.skipped:
                dense.add_row(skip.path, skip.reason)
            yield dense


def sparsity_report(model, pattern="2:4", targets=None):
    """Reports, for each kernel, how far it is in an N:M pattern.

    Args:
        model: A built `keras.Model`. It is not changed.
        pattern: String `"n:m"` or pair of ints. Defaults to `"2:4"`.
        targets: A list from `find_targets(model)`, or `None` for all, which
            counts the kernels in that are packed, or that Keras has quantized
            to int8 or int4, after the others.

    Returns:
        A `SparsityReport`: print it for a table, or take `to_dict()`.

    Raises:
        ValueError: If `pattern` is malformed, or `targets` are not the
            model's.

    Example:

    ```python
    import keras
    import keras_weightmods as kwm

    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    report = kwm.sparsity_report(model, "2:4")
    assert report.totals["violations"] == 8
    print(report)
    ```
    """
    n, m = parse_pattern(pattern)
    packed, quantized = [], []
    if targets is None:
        items = seam.reparameterizations(model)
        packed = [item for item in items if item.pattern is not None]
        quantized = quantized_kernels(model)
    targets = resolve_targets(model, targets)
    rows = [_row(target, target.variable.value, n, m) for target in targets]
    rows += [_row(item.target, item.folded(), n, m) for item in packed]
    rows += [_row(target, steps, n, m) for target, steps in quantized]
    paths = {item.target.path for item in packed}
    paths |= {target.path for target, _ in quantized}
    return SparsityReport(
        pattern=f"{n}:{m}",
        rows=tuple(rows),
        skipped=tuple(s for s in targets.skipped if s.path not in paths),
        model_size=_model_size(model, packed, quantized),
    )


def assert_sparse(model, pattern="2:4", targets=None):
    """Raises unless every kernel is exactly N:M.

    Args:
        model, pattern, targets: As in `sparsity_report`. With
            `targets=None`, kernels whose contraction size is no multiple of
            m are passed over; name them to have them count.

    Raises:
        AssertionError: Naming the kernels with the most bad groups.
        ValueError: As in `sparsity_report`; or if there is no kernel to
            check.

    Example:

    ```python
    import keras
    import keras_weightmods as kwm

    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    kwm.SemiStructuredSparse.attach(model)
    kwm.assert_sparse(model, "2:4")
    ```
    """
    report = sparsity_report(model, pattern, targets)
    rows = [r for r in report.rows if r.groups or targets is not None]
    if not rows:
        raise ValueError(
            f"`assert_sparse` found no kernel that fits pattern "
            f"{report.pattern}. Skipped: {report.skipped}"
        )
    bad = [row for row in rows if not row.is_exact]
    if bad:
        bad.sort(key=lambda row: row.violations, reverse=True)
        listed = "\n".join(
            f"  {row.path} {row.shape}: "
            + (
                f"{row.violations:,} of {row.groups:,} groups"
                if row.groups
                else "does not fit the pattern"
            )
            for row in bad[:5]
        )
        raise AssertionError(
            f"{len(bad)} of {len(rows)} kernels are not exactly "
            f"{report.pattern}; worst:\n{listed}"
        )


def _model_size(model, packed, quantized):
    """The weights of a model, counted as if none were packed or quantized."""
    arrays = {id(v) for item in packed for v in item.parameters}
    shapes = [item.target.shape for item in packed]
    for target, steps in quantized:
        layer = target.layer
        parts = (target.variable, layer.kernel_scale)
        parts += tuple(
            getattr(layer, name)
            for name in ("kernel_zero", "g_idx")
            if hasattr(layer, name)
        )
        arrays.update(map(id, parts))
        shapes.append(steps.shape)
    shapes += [v.shape for v in model.weights if id(v) not in arrays]
    return sum(map(math.prod, shapes))


def _row(target, value, n, m):
    # Not the target's shape: two int4 values are stored in one.
    shape = tuple(value.shape)
    axes = target.contraction_axes
    size = math.prod(shape)
    fits = math.prod(shape[axis] for axis in axes) % m == 0
    zeros = int(np.sum(ops.convert_to_numpy(ops.equal(value, 0))))
    return SparsityRow(
        key=target.key,
        path=target.path,
        shape=shape,
        pattern=f"{n}:{m}",
        groups=size // m if fits else 0,
        violations=int(nm_violations(value, (n, m), axes)) if fits else 0,
        zero_share=zeros / size,
        size=size,
    )
