"""The start and the end of a run of `CAST`."""

import warnings
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_weightmods.calibration.block_reconstruction import (
    ROOT_MEAN_SQUARE,
    root_mean_square,
)
from keras_weightmods.calibration.inputs import measure_importance
from keras_weightmods.core import data
from keras_weightmods.core.reparameterization import (
    left_out,
    reparameterizations,
)
from keras_weightmods.core.restored import RestoredOnError
from keras_weightmods.core.targets import Targets
from keras_weightmods.sparsity import sparsify
from keras_weightmods.sparsity.adam_s import AdamS
from keras_weightmods.sparsity.criteria import CRITERIA
from keras_weightmods.sparsity.scaling import Scaling
from keras_weightmods.utils import checks

# The learning rate, ramp and criterion for a dense start, a one-shot start and
# one of whole blocks. benchmarks/quality.py chose the first. The second was not
# tuned: it is a quarter of Adam's best rate under a fixed mask. With 25,600
# tokens, 4e-5 and 1e-4 are equally good for the third.
_RECIPES = {
    "dense": (1.5e-4, 0.4, "wanda"),
    "sparse": (2.5e-4, 0.0, "magnitude"),
    "blocks": (7e-5, 0.0, "magnitude"),
}
# The default learning rate rises during this share of the run.
WARMUP = 0.1
# The number of batches that measure the importance of inputs.
_MEASURED_BATCHES = 8
# The losses that are compared: of the first steps and of this share of the run,
# if these are enough. By chance alone, all of five are above all of three in
# one run of 56.
_FIRST, _LAST, _ENOUGH = 3, 0.1, 5


def default_recipe(
    init: str = "dense", init_refine: Any = None, targets: Any = None
) -> dict[str, Any]:
    """Return the arguments of the default `AdamS` for a start of `CAST`.

    Args:
        init, init_refine: As in `CAST`.
        targets: `Targets`, such as `CAST.targets`. The learning rate is in
            proportion to the median root mean square of their weights where
            this is below 0.2, since Adam takes the same steps for small weights
            as for large ones. In Qwen2.5-Coder-0.5B it is some 0.016, in
            SmolLM2 0.26. Defaults to `None`, for 0.2 and more.

    Raises:
        ValueError: If no run can start in this way, or `targets` is something
            else.
    """
    if not isinstance(targets, Targets | None):
        expected = "`Targets`, as `kwm.find_targets` returns them, or None"
        raise checks.error("targets", expected, targets)
    checks.check_choice("init", init, ("dense", *CRITERIA))
    refinements = checks.check_choices(
        "init_refine", init_refine, sparsify.REFINEMENTS
    )
    if refinements and init == "dense":
        expected = "None where `init` is 'dense': nothing is pruned"
        raise checks.error("init_refine", expected, init_refine)
    start = "dense" if init == "dense" else "sparse"
    start = "blocks" if "blocks" in refinements else start
    rate, ramp, criterion = _RECIPES[start]
    if targets:
        sizes = [root_mean_square(target.variable) for target in targets]
        rate *= min(1.0, float(np.median(sizes)) / ROOT_MEAN_SQUARE)
    recipe = {"decay": "relative", "ramp": ramp, "criterion": criterion}
    return {"learning_rate": rate, **recipe}


def start(
    cast: Any,
    x: Any,
    batch_size: int | None,
    sample_weight: Any,
    verbose: Any,
    began: float,
) -> Any:
    """Make the start on the first batches; return `x` with all batches."""
    is_ranked_by_inputs = cast.adam_s.criterion == "wanda"
    if cast.is_started and not is_ranked_by_inputs:
        return x
    rows = 0 if cast.is_started else cast.init_rows
    first, enough, x = data.first_batches(
        x, _MEASURED_BATCHES, rows, batch_size, sample_weight
    )
    own, report = (cast.student, cast.targets), cast.init_report
    changed = [] if cast.is_started else [t.variable for t in cast.targets]
    with RestoredOnError(values=changed if is_ranked_by_inputs else ()):
        if not cast.is_started:
            refine = checks.check_choices(
                "init_refine", cast.init_refine, sparsify.REFINEMENTS
            )
            how: Any = (cast.pattern, cast.init, refine)
            is_shown = int(verbose in ("auto", 1))
            # The scales are ones.
            scales = reparameterizations(cast.student, Scaling)
            with left_out(item for item in scales if item.is_identity()):
                report = sparsify.prune(
                    *own, first[:enough], *how, verbose=is_shown
                )
        if is_ranked_by_inputs:
            batches = first[:_MEASURED_BATCHES]
            measure_importance(cast.adam_s, *own, batches, verbose, began)
    cast.init_report, cast.is_started = report, True
    return x


def check_sparsified(adam_s: AdamS, targets: Targets) -> None:
    """Raise ValueError if the optimizer does not sparsify a target."""
    known = set(map(id, adam_s.sparsified))
    left = [t.path for t in targets if id(t.variable) not in known]
    if left:
        raise ValueError(
            "Each target of `CAST` must be trained by its `AdamS`. Received: "
            f"{len(left)} that are not, frozen since or not among the "
            f"optimizer's targets: {left[:5]}. Set `trainable = True` on their "
            "layers, then `compile()` and `fit()` again, or leave them out of "
            "`targets`."
        )


def steps_taken(adam_s: AdamS) -> int:
    """Return the updates made so far."""
    return int(ops.convert_to_numpy(adam_s.iterations))


def warn_about_the_end(adam_s: AdamS, last: int | None = None) -> None:
    """Warn if the last step of a fit, by default this one, is past the run."""
    last = steps_taken(adam_s) if last is None else last
    if last > adam_s.total_steps:
        warnings.warn(
            f"CAST: this `fit` reaches step {last}, beyond the run of "
            f"{adam_s.total_steps} steps. After its end the pull is done, and "
            "the default learning rate is 0. To train in several calls of "
            "`fit`, pass the sum of their steps as `AdamS(total_steps=...)`. "
            "For another run make a new `CAST`.",
            stacklevel=3,
        )


class Losses(keras.callbacks.Callback):
    """Collect the losses of a run, in all calls of `fit`.

    Attributes:
        values: List of floats, the mean loss of each step or, with
            `steps_per_execution`, of each group of steps.
    """

    def __init__(self) -> None:
        super().__init__()
        self.values: list[float] = []
        self.async_safe = True

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._means: list[Any] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        # Keras gives the mean since the beginning of the epoch.
        self._means.append((batch + 1, logs["loss"]))

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        counts, means = np.asarray(self._means, "float64").reshape(-1, 2).T
        sums = np.diff(counts * means, prepend=0.0)
        self.values += (sums / np.diff(counts, prepend=0.0)).tolist()

    def warn_if_they_rose(self) -> None:
        """Warn if the last are above the first, or far above the very first."""
        count = round(_LAST * len(self.values))
        first, last = self.values[:_FIRST], self.values[-count:]
        if count < _ENOUGH:
            return
        # The very first is of the start, and the next may be of a spoilt model.
        has_doubled = np.median(last) - first[0] > abs(first[0])
        if min(last) > max(first) or has_doubled:
            warnings.warn(
                f"CAST: the loss rose from {first[0]:.4g} in the first step "
                f"to {np.mean(last):.4g} in the last ones. So the model is "
                "probably worse than its one-shot start. Train that again "
                "with a smaller `AdamS(learning_rate=...)`.",
                stacklevel=3,
            )
