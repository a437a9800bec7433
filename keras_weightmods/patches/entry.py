"""What a patch does to one weight."""

import dataclasses
from typing import Any

import numpy as np

from keras_weightmods.patches.architecture import STATISTICS
from keras_weightmods.patches.checkpoint import WeightInfo
from keras_weightmods.patches.quantized import Quantized
from keras_weightmods.patches.tensors import Sparse


@dataclasses.dataclass(frozen=True, eq=False)
class PatchEntry:
    """What a patch does to one weight.

    At scale s the weight w becomes `w + s * (tensor - replaced * w)`; see
    `tensors.rebuilt_pieces` for shares of more than 1.

    Attributes:
        info: `WeightInfo` of the weight, as in the model it came from.
        tensor: Read-only float32 array, `Quantized` or `Sparse`.
        replaced: Float, 0 for a weight. For a batch-norm statistic, which is
            replaced and not added to, the share that is replaced.
        depth: Int, place of the weight's layer among those with a kernel, in
            a signature; -1 in a delta.
        seed: Int, from which `random_places` draws the places of a `Sparse`;
            `None` where they are stored.
    """

    info: WeightInfo
    tensor: Any
    replaced: float = 0.0
    depth: int = -1
    seed: int | None = None

    @property
    def position(self) -> int:
        """Int, place of the weight in `model.get_weights()`."""
        return self.info.position

    @property
    def key(self) -> str:
        """String `"{position}:{path}"`."""
        return self.info.key

    @property
    def is_statistic(self) -> bool:
        """Whether it is a moving mean or variance."""
        return self.info.name in STATISTICS

    @property
    def numbers(self) -> np.ndarray:
        """The array of floats in it: scales of `Quantized`, else values."""
        tensor = self.tensor
        if isinstance(tensor, Quantized):
            return tensor.scales
        return tensor.values if isinstance(tensor, Sparse) else tensor

    @property
    def bits(self) -> int:
        """Int, bits of a number."""
        if isinstance(self.tensor, Quantized):
            return self.tensor.bits
        return 8 * self.numbers.itemsize

    @property
    def size(self) -> int:
        """Int, the number of entries of the weight that it changes."""
        if isinstance(self.tensor, Sparse):
            return self.tensor.places.size
        return int(np.prod(self.info.shape))

    @property
    def nbytes(self) -> int:
        """Int, the bytes of the numbers, with the scales where quantized."""
        if isinstance(self.tensor, Quantized):
            return self.tensor.nbytes
        return self.numbers.nbytes

    def dequantized(self, dtype: str = "float32") -> np.ndarray:
        """Return the tensor of a signature as an array."""
        tensor = self.tensor
        if isinstance(tensor, Quantized):
            tensor = tensor.dequantized()
        return tensor.astype(dtype, copy=False)

    def with_tensor(self, tensor: Any, **fields: Any) -> "PatchEntry":
        """Return the same with another tensor, an array as float32."""
        if not isinstance(tensor, Quantized):
            tensor = float32(tensor)
        return dataclasses.replace(self, tensor=tensor, **fields)


def float32(tensor: Any) -> np.ndarray:
    """Return an array as a contiguous one of float32; what overflows is inf."""
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(tensor, "float32").reshape(np.shape(tensor))
