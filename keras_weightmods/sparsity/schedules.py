"""The learning-rate schedule of `CAST`."""

from typing import Any

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="keras_weightmods")
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
    from keras_weightmods.sparsity.schedules import WarmupLinearDecay

    schedule = WarmupLinearDecay(1.0, warmup_steps=10, total_steps=30)
    rates = [float(schedule(t)) for t in (0, 9, 20, 30)]
    assert np.allclose(rates, [0.1, 1.0, 0.5, 0.0])
    ```
    """

    def __init__(
        self, learning_rate: float, warmup_steps: int, total_steps: int
    ) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps

    def __call__(self, step: Any) -> Any:
        step = ops.cast(step, "float32")
        rise = (step + 1) / max(1, self.warmup_steps)
        decay_steps = max(1, self.total_steps - self.warmup_steps)
        fall = (self.total_steps - step) / decay_steps
        share = ops.maximum(ops.minimum(ops.minimum(rise, fall), 1.0), 0.0)
        return self.learning_rate * share

    def get_config(self) -> dict[str, Any]:
        return {
            "learning_rate": self.learning_rate,
            "warmup_steps": self.warmup_steps,
            "total_steps": self.total_steps,
        }
