"""The settings that `CAST.compile()` takes by default."""

from typing import Any

from keras_weightmods.calibration.schedule import WarmupLinearDecay

# Learning rate, ramp and criterion. The first chosen by
# benchmarks/quality.py, the second with the rate of Adam that is best
# under a fixed mask, over four, and not searched for. Of the third 4e-5 and
# 1e-4 are as good for 25,600 tokens.
_FROM_DENSE = 1.5e-4, 0.4, "activation"
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


def default_schedule(init, init_refine, steps):
    """Return the schedule of the default recipe over `steps` batches."""
    rate = default_recipe(init, init_refine)["learning_rate"]
    return WarmupLinearDecay(rate, max(1, round(_WARMUP * steps)), steps)
