"""Checks of `CAST`, of its start and of the state that it is in."""

from typing import Any

from keras_weightmods.sparsity import sparsify
from keras_weightmods.sparsity.criteria import CRITERIA
from keras_weightmods.utils import checks


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
