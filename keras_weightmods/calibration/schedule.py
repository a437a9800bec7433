"""A learning rate schedule for runs of a known length."""

import dataclasses

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="keras_weightmods")
@dataclasses.dataclass(eq=False)
class WarmupLinearDecay(keras.optimizers.schedules.LearningRateSchedule):
    """Rise linearly to the rate, then fall linearly to zero.

    Keras' own decays with a warm-up follow a cosine. AdamS leaves masked
    weights at about the size of the last rate, so the rate has to reach zero.

    Args:
        learning_rate: Float, the peak.
        warmup_steps: Int, steps to the peak.
        total_steps: Int, steps to zero.

    Example:

    ```python
    import numpy as np
    from keras_weightmods.calibration.schedule import WarmupLinearDecay

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
