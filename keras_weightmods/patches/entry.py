"""The change that a patch makes to one weight, and its forms."""

import dataclasses
import math
from typing import Any

import numpy as np

from keras_weightmods.core.weight_keys import weight_key

FLOATS = ("float16", "bfloat16", "float32", "float64")
# The candidates for the largest level, as shares of the largest weight.
_CLIPS = np.arange(32, 0, -1) / 32


@dataclasses.dataclass(frozen=True)
class WeightInfo:
    """One weight of a model, without its values.

    Attributes:
        position: Int, place in `model.get_weights()`.
        path: String, the variable's path less the model's own name, or `""`
            where it is not known. Not unique.
        shape: Tuple of ints.
        dtype: String.
        stored: String, the reparameterization that the variable holds the
            weight in, as a fixed compander; `""` for a plain weight, `None`
            where it is not known.
    """

    position: int
    path: str
    shape: tuple[int, ...]
    dtype: str
    stored: str | None = ""

    @property
    def key(self) -> str:
        """String `"{position}:{path}"`, unique in the model."""
        return weight_key(self.position, self.path)

    @property
    def name(self) -> str:
        """String, the last part of the path."""
        return self.path.rpartition("/")[2]

    @property
    def is_statistic(self) -> bool:
        """Whether it is a moving mean or variance."""
        return self.name in ("moving_mean", "moving_variance")

    @property
    def nbytes(self) -> int:
        """Int, the bytes of the values."""
        # Keras has registered bfloat16 with NumPy.
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True, eq=False)
class Quantized:
    """An array in integers of 8, 4 or 2 bits, symmetric around zero.

    A weight is `scale * (code - levels)`, with `levels = 2 ** (bits - 1) - 1`.

    Attributes:
        packed: uint8 array, one axis: 1, 2 or 4 codes a byte, the first in
            the lowest bits.
        scale: float32 array of shape `()`.
        bits: 8, 4 or 2.
        shape: Tuple of ints.
    """

    packed: np.ndarray
    scale: np.ndarray
    bits: int
    shape: tuple[int, ...]

    @property
    def size(self):
        """Int, the number of weights."""
        return math.prod(self.shape)

    @property
    def nbytes(self):
        """Int, the bytes of the codes and of the scale."""
        return self.packed.nbytes + self.scale.nbytes

    def codes(self):
        """Return the uint8 array of `shape`."""
        shifts = np.arange(8 // self.bits, dtype="uint8") * np.uint8(self.bits)
        mask = np.uint8(2**self.bits - 1)
        codes = (self.packed[:, None] >> shifts) & mask
        return codes.reshape(-1)[: self.size].reshape(self.shape)

    def dequantized(self):
        """Return the float32 array of `shape`."""
        levels = np.float32(2 ** (self.bits - 1) - 1)
        return np.asarray((self.codes() - levels) * self.scale)


@dataclasses.dataclass(frozen=True, eq=False)
class Sparse:
    """Numbers to add at some places of an array, and nothing elsewhere.

    Attributes:
        places: int64 array, rising, places in the array flattened.
        values: Array of as many numbers.
    """

    places: np.ndarray
    values: np.ndarray

    @property
    def size(self):
        """Int, the number of places."""
        return self.places.size

    @property
    def nbytes(self):
        """Int, the bytes of the numbers, without their places."""
        return self.values.nbytes

    def at(self, places):
        """Return the same for an array of only the entries at `places`."""
        return type(self)(np.searchsorted(places, self.places), self.values)

    def within(self, part):
        """Return the places in a slice of the array, and their numbers."""
        first, last = np.searchsorted(self.places, (part.start, part.stop))
        return self.places[first:last] - part.start, self.values[first:last]


class Replacing(Sparse):
    """Numbers that replace those of an array.

    They replace exactly at scale 1 if nothing else changes an entry. Otherwise
    their difference from the array's numbers is added.
    """


@dataclasses.dataclass(frozen=True, eq=False)
class PatchEntry:
    """The change that a patch makes to one weight.

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
    def arrays(self) -> tuple[np.ndarray, ...]:
        """The arrays that hold the tensor; the last one is of floats."""
        if isinstance(self.tensor, np.ndarray):
            return (self.tensor,)
        names = (field.name for field in dataclasses.fields(self.tensor))
        held = (getattr(self.tensor, name) for name in names)
        return tuple(each for each in held if isinstance(each, np.ndarray))

    def dequantized(self, dtype: str = "float32") -> np.ndarray:
        """Return the tensor of a signature as an array."""
        tensor = self.tensor
        if isinstance(tensor, Quantized):
            tensor = tensor.dequantized()
        return tensor.astype(dtype, copy=False)

    def with_tensor(self, tensor: Any, **fields: Any) -> "PatchEntry":
        """Return the same with another tensor, an array as float32."""
        if not isinstance(tensor, Quantized):
            # An overflow becomes infinite, which a patch refuses.
            with np.errstate(over="ignore"):
                tensor = np.array(tensor, "float32", order="C")
        return dataclasses.replace(self, tensor=tensor, **fields)


def code_bytes(size, bits):
    """Return the number of bytes that hold `size` codes of `bits` bits."""
    return -(-size * bits // 8)


def quantize(x, bits):
    """Round an array to integers of `bits` bits.

    With 8 bits, the largest level is the largest weight. With 4 and 2, it is
    the one of 32 candidates with the smallest squared error. With so few
    levels, one outlier would otherwise round the rest to zero.

    Args:
        x: float32 array.
        bits: 8, 4 or 2.

    Returns:
        A `Quantized`.
    """
    levels = 2 ** (bits - 1) - 1
    flat = x.reshape(-1).astype("float64")
    largest = np.max(np.abs(flat), initial=0.0)

    def rounded(scale):
        with np.errstate(over="ignore"):
            scaled = flat / scale if scale > 0 else np.zeros_like(flat)
        return np.clip(np.rint(scaled), -levels, levels)

    def error(scale):
        return np.sum(np.square(rounded(scale) * scale - flat))

    clips = _CLIPS if bits < 8 else _CLIPS[:1]
    scales = [np.float32(clip * largest / levels) for clip in clips]
    scale = min(scales, key=error)
    per_byte = 8 // bits
    codes = np.zeros(code_bytes(x.size, bits) * per_byte, "uint8")
    codes[: x.size] = rounded(scale) + levels
    shifts = np.arange(per_byte, dtype="uint8") * np.uint8(bits)
    packed = np.bitwise_or.reduce(codes.reshape(-1, per_byte) << shifts, 1)
    return Quantized(packed, np.asarray(scale), bits, x.shape)
