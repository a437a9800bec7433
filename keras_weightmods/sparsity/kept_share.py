"""How far the weights of an `AdamS` are from its masks."""

from typing import Any

from keras import ops

from keras_weightmods.ops import nm


def kept_share(adam_s: Any) -> tuple[float, float]:
    """Return what the masks keep, and the largest weight that they do not.

    Args:
        adam_s: A built `AdamS`.

    Returns:
        The share of the sum of all |w| that is within the masks, 1 where there
        is none, and the largest |w| outside of them.
    """
    total = masked = largest = 0.0
    for variable, _, packed in adam_s.sparsified_state:
        mask = nm.unpack_bits(packed.value, variable.shape)
        magnitude = ops.abs(ops.cast(variable.value, "float32"))
        outside = ops.where(mask, 0.0, magnitude)
        parts = ops.sum(magnitude), ops.sum(outside), ops.max(outside)
        one, other, most = (float(ops.convert_to_numpy(p)) for p in parts)
        total, masked, largest = total + one, masked + other, max(largest, most)
    return (1 - masked / total if total else 1.0), largest
