"""What changes of a model do to single weights."""

import dataclasses
from typing import Any

import numpy as np

from keras_weightmods.patches.architecture import STATISTICS
from keras_weightmods.patches.checkpoint import Checkpoint, WeightInfo
from keras_weightmods.patches.quantized import Quantized


@dataclasses.dataclass(frozen=True, eq=False)
class ChangeEntry:
    """What a change does to one weight.

    At scale s the weight w becomes `w + s * (tensor - replaced * w)`; see
    `tensors.rebuilt_pieces` for shares of more than 1.

    Attributes:
        info: `WeightInfo` of the weight, as in the model it came from.
        tensor: Array, `Quantized` or `Sparse`.
        replaced: Float, 0 for a weight. For a batch-norm statistic, which is
            replaced and not added to, the share that is replaced.
    """

    info: WeightInfo
    tensor: Any
    replaced: float = 0.0

    @property
    def position(self) -> int:
        """Int, place of the weight in `model.get_weights()`."""
        return self.info.position

    @property
    def key(self) -> str:
        """String `"{position}:{path}"`."""
        return self.info.key


class Change:
    """What can be added to the weights of a model and taken off again.

    Attributes:
        entries: Tuple of `ChangeEntry`, one for each weight that it changes.
        digest: String, equal for changes that do the same.
    """

    entries: tuple[Any, ...]
    digest: Any

    def __iter__(self) -> Any:
        return iter(self.entries)

    def problems(self, checkpoint: Checkpoint) -> list[str]:
        """Return what keeps the change from fitting a `Checkpoint`."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, eq=False)
class SignatureEntry(ChangeEntry):
    """What a signature does to one weight.

    Attributes:
        info, replaced: As in `ChangeEntry`.
        tensor: Read-only float32 array, or `Quantized`.
        depth: Int, place of the weight's layer among the weighted layers.
    """

    tensor: np.ndarray | Quantized
    depth: int = dataclasses.field(kw_only=True)

    @property
    def bits(self) -> int:
        """Int, bits of a weight: 32, 8, 4 or 2."""
        return self.tensor.bits if isinstance(self.tensor, Quantized) else 32

    @property
    def is_statistic(self) -> bool:
        """Whether it is a moving mean or variance."""
        return self.info.name in STATISTICS

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


def float32(tensor: Any) -> np.ndarray:
    """Return an array as a contiguous one of float32; what overflows is inf."""
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(tensor, "float32").reshape(np.shape(tensor))
