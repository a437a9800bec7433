"""What a signature does to one weight."""

import dataclasses
from typing import Any

import numpy as np

from keras_weightmods.patches.architecture import STATISTICS
from keras_weightmods.patches.checkpoint import WeightInfo
from keras_weightmods.patches.quantized import Quantized


@dataclasses.dataclass(frozen=True, eq=False)
class SignatureEntry:
    """What a signature does to one weight.

    At scale s the weight w becomes `w + s * (tensor - replaced * w)`.

    Attributes:
        info: `WeightInfo` of the weight, as in the model it came from.
        depth: Int, place of the weight's layer among the weighted layers.
        tensor: Read-only float32 array, or `Quantized`.
        replaced: Float, 0 for a weight. For a batch-norm statistic, which is
            replaced and not added to, the share that is replaced.
    """

    info: WeightInfo
    depth: int
    tensor: np.ndarray | Quantized
    replaced: float = 0.0

    @property
    def position(self) -> int:
        """Int, place of the weight in `model.get_weights()`."""
        return self.info.position

    @property
    def key(self) -> str:
        """String `"{position}:{path}"`."""
        return self.info.key

    @property
    def bits(self) -> int:
        """Int, bits of a weight: 32, 8, 4 or 2."""
        return getattr(self.tensor, "bits", 32)

    @property
    def is_statistic(self) -> bool:
        """Whether it is a moving mean or variance."""
        return self.info.path.rpartition("/")[2] in STATISTICS

    @property
    def nbytes(self) -> int:
        """Int, the bytes of the tensor, with its scales where quantized."""
        return self.tensor.nbytes

    def dequantized(self, dtype: str = "float32") -> np.ndarray:
        """Return the tensor as an array."""
        tensor = self.tensor
        if isinstance(tensor, Quantized):
            tensor = tensor.dequantized()
        return tensor.astype(dtype, copy=False)

    def with_tensor(self, tensor: Any, **fields: Any) -> "SignatureEntry":
        """Return the same with another tensor, an array as float32."""
        if not isinstance(tensor, Quantized):
            tensor = float32(tensor)
        return dataclasses.replace(self, tensor=tensor, **fields)


def float32(tensor):
    """Return an array as a contiguous one of float32; what overflows is inf."""
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(tensor, "float32").reshape(np.shape(tensor))
