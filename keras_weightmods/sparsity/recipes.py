"""The settings that `CAST.compile()` takes by default."""

from typing import Any

from keras_weightmods.sparsity.schedules import WarmupLinearDecay

# The first chosen by benchmarks/cast_quality.py, the second with the rate of
# Adam that is best under a fixed mask, over four, and not searched for.
_FROM_DENSE = {
    "learning_rate": 1.5e-4,
    "decay": "relative",
    "ramp": 0.4,
    "criterion": "activation",
}
_FROM_SPARSE = {
    "learning_rate": 2.5e-4,
    "decay": "relative",
    "ramp": 0.0,
    "criterion": "magnitude",
}
_WARMUP = 0.1


def default_recipe(init: str = "dense") -> dict[str, Any]:
    """Return the arguments of the default `AdamS` for a start of `CAST`."""
    return dict(_FROM_DENSE if init == "dense" else _FROM_SPARSE)


def default_schedule(init: str, steps: int) -> WarmupLinearDecay:
    """Return the schedule of the default recipe over `steps` batches."""
    rate = default_recipe(init)["learning_rate"]
    return WarmupLinearDecay(rate, max(1, round(_WARMUP * steps)), steps)
