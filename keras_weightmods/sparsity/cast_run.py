"""A run of `CAST`: how it starts, what a checkpoint holds, and its end."""

import functools
import math
import warnings
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_weightmods.calibration.schedule import WarmupLinearDecay
from keras_weightmods.saving.checkpoint import Checkpoint
from keras_weightmods.sparsity import sparsify
from keras_weightmods.sparsity.adam_s import AdamS
from keras_weightmods.sparsity.criteria import CRITERIA
from keras_weightmods.sparsity.sparsity_monitor import (
    kept_share,
    masked_weights,
)
from keras_weightmods.utils import checks

# Learning rate, ramp and criterion. The first chosen by
# benchmarks/quality.py, the second with the rate of Adam that is best
# under a fixed mask, over four, and not searched for. Of the third 4e-5 and
# 1e-4 are as good for 25,600 tokens.
_FROM_DENSE = 1.5e-4, 0.4, "wanda"
_FROM_SPARSE = 2.5e-4, 0.0, "magnitude"
_FROM_BLOCKS = 7e-5, 0.0, "magnitude"
_WARMUP = 0.1


def default_recipe(
    init: str = "dense", init_refine: Any = None
) -> dict[str, Any]:
    """Return the arguments of the default `AdamS` for a start of `CAST`.

    Args:
        init, init_refine: As in `CAST`, which checks them.
    """
    settings = _FROM_DENSE if init == "dense" else _FROM_SPARSE
    if "blocks" in (init_refine or ()):
        settings = _FROM_BLOCKS
    rate, ramp, criterion = settings
    recipe = {"decay": "relative", "ramp": ramp, "criterion": criterion}
    return {"learning_rate": rate, **recipe}


def default_schedule(init: str, init_refine: Any, steps: int) -> Any:
    """Return the schedule of the default recipe over `steps` batches."""
    rate = default_recipe(init, init_refine)["learning_rate"]
    return WarmupLinearDecay(rate, max(1, round(_WARMUP * steps)), steps)


def check_start(init: str, init_refine: Any) -> None:
    """Raise ValueError unless a run can start in this way."""
    checks.check_choice("init", init, ("dense", *CRITERIA))
    sparsify.check_refine("init_refine", init_refine)


def check_all_sparsified(targets: Any, adam_s: Any) -> None:
    """Raise ValueError unless the built optimizer sparsifies all targets."""
    sparsified = {id(variable) for variable in adam_s.sparsified}
    left_out = [t.path for t in targets if id(t.variable) not in sparsified]
    if left_out:
        raise ValueError(
            "Each target of `CAST` must be trained by its `AdamS`. "
            f"Received: {len(left_out)} that are not, frozen since or not "
            f"among the optimizer's targets: {left_out[:5]}. Set "
            "`trainable = True` on their layers, then `compile()` and "
            "`fit()` again, or leave them out of `targets`."
        )


def check_not_finalized(report: Any, what: str) -> None:
    """Raise ValueError if there is a report, which `finalize` makes.

    Args:
        report: The `report` of a `CAST`.
        what: String, the method that was called.
    """
    if report is not None:
        raise ValueError(
            f"`CAST.{what}()` was called after `finalize()`. The model is "
            "a plain one now; make a new `CAST` to train it on."
        )


class RunState:
    """The length of a run, whether it is started, and its random numbers.

    Args:
        model: The `keras.Model` that is trained.
        is_started: Bool, False where a one-shot start is to come.

    Attributes:
        is_started: Bool.
        planned_batches: Int, the length of the run, or `None` where `CAST`
            has not planned it.
        random_stream: The `RandomStream` of the train steps on torch; `None`
            on the other backends, whose random numbers are in the variables.
    """

    def __init__(self, model, is_started):
        self.model = model
        self.is_started = is_started
        self.planned_batches = None
        self.random_stream: Any = None
        if keras.backend.backend() == "torch":
            from keras_weightmods.backend.torch.random_stream import (
                RandomStream,
            )

            self.random_stream = RandomStream()

    def save(self, store):
        """Write the state into a store of `save_own_variables`."""
        store["is_started"] = np.asarray(self.is_started)
        if self.planned_batches is not None:
            store["planned_batches"] = np.asarray(self.planned_batches)
        for key, variable in self._seed_states().items():
            store[key] = variable
        if self.random_stream is not None:
            for device, state in self.random_stream.states.items():
                store[f"random_state_{device}"] = state

    def load(self, store):
        """Take the state, or as much of it as there is, from a store.

        Returns:
            The `planned_batches` in the store, for `CAST` to plan with.

        Raises:
            ValueError: If a random state does not fit. Nothing is changed
                then.
        """
        saved = {key: np.asarray(store[key]) for key in list(store.keys())}
        states = {
            key.removeprefix("random_state_"): state
            for key, state in saved.items()
            if key.startswith("random_state_")
        }
        if self.random_stream is not None and states:
            self.random_stream.states = states
        for key, variable in self._seed_states().items():
            if key in saved:
                variable.assign(saved[key])
        self.is_started = bool(saved.get("is_started", self.is_started))
        planned = saved.get("planned_batches")
        return None if planned is None else int(planned)

    def _seed_states(self):
        # Of dropout; Keras leaves them out of checkpoints.
        states = [
            variable
            for variable in self.model.non_trainable_variables
            if variable.name == "seed_generator_state"
        ]
        return {f"seed_state_{i}": state for i, state in enumerate(states)}


# The share of the sum of all |w| below which a prune changes next to nothing.
_NO_CUT = 1e-3


def warn_about_the_end(
    adam_s: AdamS, taken: int, left: float, callbacks: Any
) -> None:
    """Warn where a fit of `left` batches goes beyond the planned run."""
    planned = adam_s.total_steps
    wanted = taken + left // (adam_s.gradient_accumulation_steps or 1)
    if taken >= planned:
        message = f"the run of {planned} steps that was planned is over"
    elif planned < wanted < math.inf and not any(
        # Which epoch it begins with is not known yet.
        isinstance(callback, (Checkpoint, keras.callbacks.BackupAndRestore))
        for callback in keras.tree.flatten(callbacks)
    ):
        message = (
            f"this fit goes to step {wanted}, beyond the {planned} that "
            "were planned at its start"
        )
    else:
        return
    warnings.warn(
        f"CAST: {message}. From there on the pull is done, and the "
        "learning rate of the default optimizer is 0. To resume an "
        "interrupted run, pass the `initial_epoch` to begin with. To "
        "train in several calls of `fit`, pass the sum of their steps as "
        "`AdamS(total_steps=...)`. For another run, `finalize()` and make "
        "a new `CAST`.",
        stacklevel=3,
    )


def warn_about_an_early_end(adam_s: AdamS) -> None:
    """Warn where the run is not over, and the prune cuts what matters."""
    taken = int(ops.convert_to_numpy(adam_s.iterations))
    planned = adam_s.total_steps
    if not 0 < taken < planned:
        return
    share, largest = kept_share(masked_weights(adam_s))
    if 1 - share < _NO_CUT:
        return
    warnings.warn(
        f"CAST: this cuts weights that the training has not brought to "
        f"zero, after {taken} of {planned} steps: {1 - share:.1%} of the "
        f"sum of all |w|, the largest being {largest:.2g}. The model "
        "returned is much worse than the one that was trained. `finalize` "
        "at the end of the run: go on by `fit` with the same `epochs`, and "
        "`initial_epoch` where it stopped, from a checkpoint by "
        "`save_weights` if this model is finalized now. For a shorter run "
        "make a new `CAST` and fit it for fewer epochs.",
        stacklevel=3,
    )


@functools.cache
def say_that_a_fit_loses_the_pattern(pattern: str) -> None:
    """Say it once in a process, for each pattern."""
    warnings.warn(
        f"The finished model is {pattern}, and a plain one: to fit it again "
        "as it is loses the pattern. Before, call `SemiStructuredSparse."
        f"attach(model, {pattern!r}, frozen=True)`, which holds it; "
        "`PrincipalMaskCallback(keep_pattern=True)` holds it too. This is "
        "said once.",
        stacklevel=3,
    )
