"""The sparsity of a model, kernel by kernel, and how calls changed it."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_weightmods.backend import whole
from keras_weightmods.core.reparameterization import (
    reparameterizations,
    weight_formats,
)
from keras_weightmods.core.targets import resolve_targets
from keras_weightmods.core.weight_keys import weight_key
from keras_weightmods.ops import nm
from keras_weightmods.utils import checks
from keras_weightmods.utils.progress import Progress
from keras_weightmods.utils.report import (
    Report,
    Row,
    Skipped,
    Table,
    skipped_text,
)


@dataclasses.dataclass(frozen=True)
class ChangeReport(Report):
    """The kernels that a call changed.

    Attributes:
        title: String, what was done to them.
        kernels: Tuple of `Row`.
        skipped: Tuple of `Skipped(path, reason)`: kernels left as they are.
    """

    title: str
    kernels: tuple[Row, ...]
    skipped: tuple[Skipped, ...] = ()

    @classmethod
    def of(
        cls, title: str, weights: Any, changed: Any, skipped: Any = ()
    ) -> "ChangeReport":
        """Report that `changed` were changed, of all `weights` of a model."""
        ids = set(map(id, changed))
        kernels = tuple(
            Row(weight_key(place, v.path), v.path, tuple(v.shape))
            for place, v in enumerate(weights)
            if id(v) in ids
        )
        return cls(title, kernels, tuple(skipped))

    def tables(self) -> Iterator[Table]:
        title = f"{self.title}: {len(self.kernels)} kernels"
        yield Table(title, self.kernels, "kernel=path shape")


@dataclasses.dataclass(frozen=True)
class KernelSparsity(Row):
    """One kernel of a `SparsityReport`.

    Attributes:
        key, path, shape: As of `Row`.
        groups: Int, groups of m weights; 0 where the contraction size is no
            multiple of m.
        violations: Int, groups that hold more than n nonzeros.
        zero_share: Float in [0, 1], zeros among the weights.
        size: Int, number of weights.
    """

    groups: int
    violations: int
    zero_share: float
    size: int

    @property
    def is_exact(self) -> bool:
        """Whether every group holds at most n nonzeros."""
        return self.groups > 0 and self.violations == 0

    @property
    def bad_groups(self) -> str:
        """The share of groups with violations, in words."""
        if not self.groups:
            return "does not fit"
        return f"{self.violations:,} of {self.groups:,}"


@dataclasses.dataclass(frozen=True)
class SparsityReport(Report):
    """The result of `sparsity_report`. Prints as a table, the worst first.

    Attributes:
        pattern: String, `"n:m"`.
        kernels: Tuple of `KernelSparsity`, in the order of execution.
        skipped: Tuple of `Skipped(path, reason)`: kernels left dense.
        model_size: Int, all weights of the model, packed ones as if dense.
    """

    pattern: str
    kernels: tuple[KernelSparsity, ...]
    skipped: tuple[Skipped, ...]
    model_size: int

    @property
    def totals(self) -> dict[str, Any]:
        """Sums over the kernels, as a dict."""
        size = sum(kernel.size for kernel in self.kernels)
        zeros = sum(kernel.zero_share * kernel.size for kernel in self.kernels)
        return {
            "kernels": len(self.kernels),
            "exact": sum(kernel.is_exact for kernel in self.kernels),
            "violations": sum(kernel.violations for kernel in self.kernels),
            "zero_share": zeros / size if size else 0.0,
            "size": size,
            "model_size": self.model_size,
        }

    def tables(self) -> Iterator[Table]:
        totals = self.totals
        size, zeros = totals["size"], totals["zero_share"]
        share = size / max(1, self.model_size)
        worst_first = sorted(
            self.kernels, key=lambda k: (k.violations, not k.groups)
        )[::-1]
        sums = f"{size:,}", f"{zeros:.1%}", f"{totals['violations']:,}"
        yield Table(
            f"Sparsity, pattern {self.pattern}",
            worst_first,
            "kernel=path shape weights=size:, zeros=zero_share:.1% bad_groups",
            ("total", "", *sums),
            caption=(
                f"{totals['exact']} of {totals['kernels']} kernels are exactly "
                f"{self.pattern}; they hold {share:.1%} of the model's weights"
            ),
        )


def sparsity_report(
    model: keras.Model,
    pattern: nm.Pattern = "2:4",
    *,
    targets: Any = None,
    verbose: int = 1,
) -> SparsityReport:
    """Report how far each kernel is from an N:M pattern.

    Args:
        model: A built `keras.Model`. It is not changed.
        pattern: String `"n:m"` or pair of ints. Defaults to `"2:4"`.
        targets: The kernels, as `find_targets(model)` returns them or in a form
            that its `include` takes. `None` means all, with the packed ones
            after the others. Defaults to `None`.
        verbose: 0 or 1. 0 shows no progress bar; 1 shows one once it has
            taken two seconds. Defaults to `1`.

    Returns:
        A `SparsityReport`: print it for a table, or take `to_dict()`.

    Raises:
        ValueError: If `pattern` is malformed, `targets` do not belong to the
            model, or `verbose` is neither 0 nor 1.

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
    n, m = nm.parse_pattern(pattern)
    checks.check_verbose(verbose)
    items = reparameterizations(model) if targets is None else []
    packed = [item for item in items if item.pattern is not None]
    paths = {item.target.path for item in packed}
    targets = resolve_targets(model, targets)
    values = itertools.chain(
        ((target, target.variable.value) for target in targets),
        ((item.target, item.folded()) for item in packed),
    )
    with Progress(len(targets) + len(packed), "kernel", verbose) as progress:
        kernels = tuple(
            _sparsity(target, value, n, m)
            for target, value in progress.each(values)
        )
    return SparsityReport(
        pattern=f"{n}:{m}",
        kernels=kernels,
        skipped=tuple(s for s in targets.skipped if s.path not in paths),
        model_size=sum(math.prod(x) for x, _ in weight_formats(model)),
    )


def assert_sparse(
    model: keras.Model,
    pattern: nm.Pattern = "2:4",
    *,
    targets: Any = None,
    verbose: int = 1,
) -> None:
    """Raise unless every kernel is exactly N:M.

    Args:
        model, pattern, targets, verbose: As in `sparsity_report`. With
            `targets=None`, kernels whose contraction size is no multiple of
            m are skipped; name them to check them.

    Raises:
        AssertionError: If a kernel is not N:M. The message names the kernels
            with the most bad groups.
        ValueError: As in `sparsity_report`, or if there is no kernel to check.

    Example:

    ```python
    import keras
    import keras_weightmods as kwm

    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    kwm.SemiStructuredSparse.attach(model)
    kwm.assert_sparse(model, "2:4")
    ```
    """
    report = sparsity_report(model, pattern, targets=targets, verbose=verbose)
    kernels = [k for k in report.kernels if k.groups or targets is not None]
    if not kernels:
        raise ValueError(
            f"`assert_sparse` found no kernel that fits pattern "
            f"{report.pattern}. Skipped: {skipped_text(report.skipped)}"
        )
    bad = [kernel for kernel in kernels if not kernel.is_exact]
    if bad:
        bad.sort(key=lambda kernel: (-kernel.violations, kernel.groups > 0))
        problems = [f"{kernel.path} ({kernel.bad_groups})" for kernel in bad]
        raise AssertionError(
            f"{len(bad)} of {len(kernels)} kernels are not exactly "
            f"{report.pattern}. Groups with too many nonzeros, the worst "
            f"first (`sparsity_report` shows all):"
            f"{checks.listed(problems)}"
        )


def _sparsity(target: Any, value: Any, n: Any, m: Any) -> Any:
    shape, axes = target.shape, target.contraction_axes
    size = math.prod(shape)
    groups = 0 if target.contraction_size % m else size // m
    bad = int(nm.nm_violations(value, (n, m), axes)) if groups else 0
    zeros = int(np.sum(whole(ops.equal(value, 0))))
    return KernelSparsity(
        target.key, target.path, shape, groups, bad, zeros / size, size
    )
