"""What a GGUF file says of itself, and where its tensors lie.

`gguf.GGUFReader` makes an array of each of the 450,000 strings of a
vocabulary, which takes ten seconds.
"""

import dataclasses
import math
import mmap
import os
import struct
from typing import Any

import numpy as np

_SCALARS = dict(enumerate("BbHhIif?"))
_SCALARS |= {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# Bytes of a tensor that are dequantized together, as floats.
_CHUNK = 2**24


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: type of GGUF, shape as NumPy's, and the offset."""

    kind: Any
    shape: tuple[int, ...]
    offset: int


class _Cut(Exception):
    """The file ends within its header."""


class Header:
    """The fields and tensors of a GGUF file, checked.

    Args:
        filepath: String.

    Attributes:
        fields: Dict from keys to values.
        tensors: Dict from names to `Tensor`.

    Raises:
        ValueError: If it is no GGUF file of version 2 or 3, or ends too early.
    """

    def __init__(self, filepath: str) -> None:
        self.filepath = filepath
        self.fields: dict[str, Any] = {}
        self.tensors: dict[str, Tensor] = {}
        self._at = 0
        with open(filepath, "rb") as file:
            self._size = os.fstat(file.fileno()).st_size
            if file.read(4) != b"GGUF":
                raise self.error("it does not begin with b'GGUF'")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                self._data: Any = data
                try:
                    self._parse()
                except (_Cut, struct.error, UnicodeDecodeError) as error:
                    raise self.error(
                        f"its header ends or breaks at byte {self._at} of "
                        f"{self._size}. Copy or download it again"
                    ) from error
                finally:
                    del self._data

    def error(self, reason: str) -> ValueError:
        """Return a `ValueError` to raise, which names the file."""
        return ValueError(
            f"Expected a whole GGUF file of version 2 or 3. Received: filepath="
            f"{self.filepath!r}: {reason}."
        )

    def _parse(self) -> None:
        self._at = 4
        version, tensors, fields = self._scalars("IQQ")
        if version not in (2, 3):
            raise self.error(f"it has version {version}")
        for _ in range(fields):
            name = self._string()
            self.fields[name] = self._value(*self._scalars("I"))
        places: dict[str, Any] = {}
        for _ in range(tensors):
            name = self._string()
            (axes,) = self._scalars("I")
            if not 1 <= axes <= 4 or name in places:
                raise self.error(f"tensor {name!r} is there twice or malformed")
            places[name] = self._scalars(f"{axes}QIQ")
        alignment = self.fields.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise self.error(f"it has general.alignment={alignment!r}")
        start = -(-self._at // alignment) * alignment
        for name, (*shape, kind, offset) in places.items():
            self.tensors[name] = self._tensor(name, shape, kind, start + offset)

    def _tensor(self, name: str, shape: Any, kind: int, offset: int) -> Tensor:
        import gguf

        try:
            found = gguf.GGMLQuantizationType(kind)
        except ValueError:
            raise self.error(
                f"tensor {name!r} has type {kind}, which gguf does not know: "
                "`pip install -U gguf`"
            ) from None
        block, nbytes = gguf.GGML_QUANT_SIZES[found]
        if shape[0] % block or not math.prod(shape):
            raise self.error(
                f"tensor {name!r} has {shape[0]} columns, in blocks of {block}"
            )
        end = offset + math.prod(shape) // block * nbytes
        if end > self._size:
            raise self.error(
                f"tensor {name!r} ends at byte {end}, the file at "
                f"{self._size}. Copy or download it again"
            )
        return Tensor(found, tuple(reversed(shape)), offset)

    def _scalars(self, kinds: str) -> Any:
        kinds = "<" + kinds
        values = struct.unpack_from(kinds, self._data, self._at)
        self._at += struct.calcsize(kinds)
        return values

    def _string(self) -> str:
        (length,) = self._scalars("Q")
        start, self._at = self._at, self._at + length
        if self._at > self._size:
            raise _Cut
        return str(self._data[start : self._at], "utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind in _SCALARS:
            return self._scalars(_SCALARS[kind])[0]
        if kind != _ARRAY:
            raise _Cut
        inner, count = self._scalars("IQ")
        if inner == _STRING:
            return [self._string() for _ in range(count)]
        if inner not in _SCALARS or count > self._size:
            raise _Cut
        return list(self._scalars(f"{count}{_SCALARS[inner]}"))

    def read(self, name: str, dtype: Any) -> Any:
        """Return the values of a tensor.

        Only a few rows of a matrix are floats of 32 bits at a time.

        Args:
            name: String.
            dtype: NumPy dtype of the values. That of vectors is float32.
        """
        import gguf

        tensor = self.tensors[name]
        block, nbytes = gguf.GGML_QUANT_SIZES[tensor.kind]
        *rows, columns = tensor.shape
        count, width = math.prod(rows), columns // block * nbytes
        values = np.empty((count, columns), dtype if rows else "float32")
        step = max(1, _CHUNK // columns // 4)
        with open(self.filepath, "rb") as file:
            file.seek(tensor.offset)
            for start in range(0, count, step):
                part = values[start : start + step]
                data = np.fromfile(file, "uint8", len(part) * width)
                data = data.reshape(len(part), width)
                try:
                    part[:] = gguf.quants.dequantize(data, tensor.kind)
                except NotImplementedError:
                    raise self.error(
                        f"tensor {name!r} has type {tensor.kind.name}, which "
                        "the package gguf does not dequantize"
                    ) from None
        return values.reshape(tensor.shape)
