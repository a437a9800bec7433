"""One array of several models, as the methods of merging read it."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from keras_weightmods.utils.parallel import map_ahead

# Elements computed at a time: as many as the caches hold.
PIECE = 1 << 17


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """One array to merge.

    Attributes:
        shape: Tuple of ints.
        read: Callable from the number of a model (-1 for the base) and a slice
            of the array flattened to the values there, float32 or float64.
            Several threads call it.
        weights: Tuple of floats, one for each model.
        options: Dict from the names of the method's numbers to these.
        seed: Tuple of ints, of random entries.
        axes: Pair of tuples, the contraction and the stack axes of a kernel;
            `None` for any other weight.
    """

    shape: tuple[int, ...]
    read: Callable[[int, slice], np.ndarray]
    weights: tuple[float, ...]
    options: Mapping[str, float]
    seed: tuple[int, ...]
    axes: Any = None

    @property
    def size(self) -> int:
        """Int, the number of entries."""
        return math.prod(self.shape)

    def pieces(self, size: int | None = None) -> list[slice]:
        """Return slices that cover the array."""
        size = size or PIECE
        starts = range(0, self.size, size)
        return [slice(x, min(x + size, self.size)) for x in starts]

    def mapped(
        self, function: Callable[[slice], Any], size: int | None = None
    ) -> Iterator[tuple[slice, Any]]:
        """Yield slices that cover the array, with the results of a function.

        The function runs on all cores.
        """
        pieces = self.pieces(size)
        return zip(pieces, map_ahead(function, pieces))

    def models(self, part: slice) -> list[np.ndarray]:
        """Return the values of each model."""
        return [self.read(i, part) for i in range(len(self.weights))]

    def changes(self, part: slice) -> tuple[np.ndarray, list[np.ndarray]]:
        """Return the base's values, and what each model has changed."""
        base = self.read(-1, part)
        return base, [values - base for values in self.models(part)]

    def generator(self, model: int, draws: int) -> Any:
        """Return the generator of a model after some draws of 64 bits."""
        bits = np.random.PCG64([*self.seed, model])
        return np.random.Generator(bits.advance(draws))

    def kth_largest(self, *counts: int) -> list[list[Any]]:
        """Return the `count`-th largest magnitude of each model's changes.

        The bits of nonnegative floats have the order of the numbers. The first
        of two passes finds the upper half of the bits, the second the lower
        half.

        Args:
            *counts: Ints, from 1 to the number of entries.

        Returns:
            List with an entry for each count, the list of the sizes, float32,
            for each model.
        """

        def counted(halves):
            """Return how often each half of 16 bits occurs in each row."""

            def of_piece(piece):
                _, changes = self.changes(piece)
                rows = [rank(x).view("uint32") for x in changes]
                return [
                    [np.bincount(x, minlength=1 << 16) for x in halves(i, bits)]
                    for i, bits in enumerate(rows)
                ]

            return sum(map(np.array, map_ahead(of_piece, self.pieces())))

        uppers = counted(lambda row, bits: [bits >> 16])[:, 0]
        found = [[_place(row, count) for count in counts] for row in uppers]

        def lower(row, bits):
            return [bits[bits >> 16 == high] & 0xFFFF for high, _ in found[row]]

        lowers = counted(lower)
        bits = [
            [
                high << 16 | _place(lowers[row, i], rest)[0]
                for row, (high, rest) in enumerate(column)
            ]
            for i, column in enumerate(zip(*found))
        ]
        return [list(row) for row in np.array(bits, "uint32").view("float32")]


def rank(x):
    """Return the magnitudes of changes, as `kth_largest` compares them."""
    return np.abs(x).astype("float32", copy=False)


def _place(counts, count):
    """Return the bin of the `count`-th largest, and its place in it."""
    above = np.cumsum(counts[::-1])
    place = int(np.searchsorted(above, count))
    found = counts.size - 1 - place
    return found, count - int(above[place] - counts[found])
