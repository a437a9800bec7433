"""How far weights are from their masks."""

from collections.abc import Iterable
from typing import Any

from keras import ops

from keras_weightmods.ops import nm


def kept_share(masked: Iterable[tuple[Any, Any]]) -> tuple[float, float]:
    """Return what masks keep, and the largest weight that they do not.

    Args:
        masked: Pairs of a variable and its mask, in bits.

    Returns:
        The share of the sum of all |w| that is within the masks, 1 where there
        is none, and the largest |w| outside of them.
    """
    total = out = largest = 0.0
    for variable, bits in masked:
        mask = nm.unpack_bits(bits, variable.shape)
        magnitude = ops.abs(ops.cast(variable.value, "float32"))
        outside = ops.where(mask, 0.0, magnitude)
        parts = ops.sum(magnitude), ops.sum(outside), ops.max(outside)
        one, other, most = (float(ops.convert_to_numpy(p)) for p in parts)
        total, out, largest = total + one, out + other, max(largest, most)
    return (1 - out / total if total else 1.0), largest


def masked_weights(adam_s: Any) -> list[tuple[Any, Any]]:
    """Return pairs of a variable and its mask, in bits, of a built `AdamS`."""
    return [(v, bits.value) for v, _, bits in adam_s.sparsified_state]
