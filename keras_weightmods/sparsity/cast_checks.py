"""How a run of `CAST` starts, and checks of the state that it is in."""

from typing import Any

from keras_weightmods.calibration.schedule import WarmupLinearDecay
from keras_weightmods.sparsity import sparsify
from keras_weightmods.sparsity.criteria import CRITERIA
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
