"""The settings that `CAST.compile()` takes by default."""

import dataclasses
from typing import Any

import keras
from keras import ops

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


@keras.saving.register_keras_serializable(package="keras_weightmods")
@dataclasses.dataclass(eq=False)
class WarmupLinearDecay(keras.optimizers.schedules.LearningRateSchedule):
    """Rise linearly to the rate, then fall linearly to zero.

    Keras' own decays with a warm-up follow a cosine; AdamS leaves masked
    weights at about the last rate, so it has to reach zero.

    Args:
        learning_rate: Float, the peak.
        warmup_steps: Int, steps to the peak.
        total_steps: Int, steps to zero.

    Example:

    ```python
    import numpy as np
    from keras_weightmods.sparsity.recipes import WarmupLinearDecay

    schedule = WarmupLinearDecay(1.0, warmup_steps=10, total_steps=30)
    rates = [float(schedule(t)) for t in (0, 9, 20, 30)]
    assert np.allclose(rates, [0.1, 1.0, 0.5, 0.0])
    ```
    """

    learning_rate: float
    warmup_steps: int
    total_steps: int

    def __call__(self, step):
        step = ops.cast(step, "float32")
        rise = (step + 1) / max(1, self.warmup_steps)
        decay_steps = max(1, self.total_steps - self.warmup_steps)
        fall = (self.total_steps - step) / decay_steps
        return self.learning_rate * ops.clip(ops.minimum(rise, fall), 0.0, 1.0)

    def get_config(self):
        return dataclasses.asdict(self)
