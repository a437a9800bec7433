"""Warnings of `CAST`: of runs that end too early, or go on too long."""

import functools
import math
import warnings
from typing import Any

import keras
from keras import ops

from keras_weightmods.saving.checkpoint import Checkpoint
from keras_weightmods.sparsity.adam_s import AdamS
from keras_weightmods.sparsity.kept_share import kept_share, masked_weights

# The share of the sum of all |w| below which a prune changes next to nothing.
_NO_CUT = 1e-3


def warn_about_early_stopping(callbacks: Any) -> None:
    """Warn of a callback that ends the run too early."""
    stops = keras.callbacks.EarlyStopping
    if any(isinstance(each, stops) for each in keras.tree.flatten(callbacks)):
        warnings.warn(
            "CAST: `EarlyStopping` ends the run before the weights have "
            "arrived in the pattern, and the loss rises on the way there, so "
            "that it stops soon. Leave it out; fit for fewer epochs instead.",
            stacklevel=3,
        )


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
