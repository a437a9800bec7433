"""Deltas in files: what changed in a model, checked before it is used."""

import dataclasses
import functools
import math
from typing import Any

import numpy as np

from keras_weightmods.core.weight_keys import same_path
from keras_weightmods.patches.architecture import weight_problems
from keras_weightmods.patches.checkpoint import (
    Checkpoint,
    WeightInfo,
    digest_of,
)
from keras_weightmods.patches.entry import Change, ChangeEntry
from keras_weightmods.patches.places import pack_places, unpack_places
from keras_weightmods.patches.tensors import Sparse
from keras_weightmods.saving.container import Reader, json_array, write_arrays

FORMAT = "keras_weightmods.delta"
VERSION = 1
DTYPES = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True, eq=False)
class Delta(Change):
    """What a delta file holds.

    Attributes:
        entries: Tuple of `ChangeEntry`; their infos have no dtype.
        count: Int, the number of weights of the model.
        fingerprint: String, the SHA-256 of the base model's weights.
    """

    entries: tuple[ChangeEntry, ...]
    count: int
    fingerprint: str

    @functools.cached_property
    def digest(self) -> str:
        """String, the SHA-256 of the changes."""
        keys = [entry.key for entry in self.entries]
        arrays = [
            array
            for entry in self.entries
            for array in (entry.tensor.places, entry.tensor.values)
        ]
        return digest_of(keys, arrays)

    def problems(self, checkpoint: Checkpoint) -> list[str]:
        """Return what keeps the delta from fitting a `Checkpoint`."""
        infos, argument = checkpoint.infos, f"`{checkpoint.argument}`"
        if self.count != len(infos):
            return [f"{len(infos)} weights, and {self.count} are expected"]
        expected = [entry.info for entry in self.entries]
        return weight_problems(expected, infos, argument) + [
            f"{argument}, weight {info.position}: "
            f"{infos[info.position].path!r}, and {info.path!r} is expected"
            for info in expected
            if not same_path(info.path, infos[info.position].path)
        ]


def write_delta(
    filepath: Any,
    entries: list[ChangeEntry],
    count: int,
    fingerprint: str,
    overwrite: bool,
) -> float:
    """Write a delta file; return the number of bits that a place takes."""
    packed = [pack_places(entry.tensor.places) for entry in entries]
    description = {
        "weights": [
            [
                entry.position,
                entry.info.path,
                list(entry.info.shape),
                int(entry.tensor.places.size),
                bits,
                int(places.size),
            ]
            for entry, (bits, places) in zip(entries, packed)
        ],
        "count": count,
        "fingerprint": fingerprint,
    }
    arrays = {
        "description": json_array(description),
        "places": np.concatenate([places for _, places in packed]),
        "values": np.concatenate([entry.tensor.values for entry in entries]),
    }
    write_arrays(filepath, FORMAT, VERSION, arrays, overwrite)
    return 8 * arrays["places"].size / arrays["values"].size


def read_delta(filepath: Any) -> Delta:
    """Return the `Delta` in a file, all of it checked."""
    with Reader(filepath, FORMAT, (VERSION,)) as reader:
        dtypes = {name: entry.dtype for name, entry in reader.entries.items()}
        if dtypes not in [
            {"description": "uint8", "places": "uint8", "values": dtype}
            for dtype in DTYPES
        ]:
            raise reader.error("values", "must be beside the others of a delta")
        description = reader.read_json("description")
        arrays = {name: reader.read(name) for name in ("places", "values")}
        try:
            entries = _parse(description, **arrays)
        except ValueError as error:
            raise reader.error("description", str(error)) from error
    return Delta(entries, description["count"], description["fingerprint"])


def _parse(description, places, values):
    """Return the entries; raise ValueError for what is not valid."""
    types = {"weights": list, "count": int, "fingerprint": str}
    if not isinstance(description, dict) or types != {
        name: type(value) for name, value in description.items()
    }:
        raise ValueError(f"must have {sorted(types)}")
    entries: list[ChangeEntry] = []
    first_byte = first_value = 0
    previous = -1
    for weight in description["weights"]:
        if not _is_weight(weight, previous, description["count"]):
            raise ValueError(f"has a weight that is not: {str(weight)[:200]}")
        previous, path, shape, count, bits, nbytes = weight
        packed = places[first_byte : first_byte + nbytes]
        change = values[first_value : first_value + count]
        if packed.size != nbytes or change.size != count:
            raise ValueError(f"has more of {path!r} than the file")
        where = unpack_places(packed, count, bits, math.prod(shape))
        if not np.all(np.isfinite(change.astype("float32"))):
            raise ValueError(f"has changes of {path!r} that are not finite")
        info = WeightInfo(previous, path, tuple(shape), "")
        entries.append(ChangeEntry(info, Sparse(where, change)))
        first_byte += nbytes
        first_value += count
    if first_byte != places.size or first_value != values.size:
        raise ValueError("has less than the file")
    return tuple(entries)


def _is_weight(value: Any, previous: int, count: int) -> bool:
    return (
        isinstance(value, list)
        and [type(each) for each in value] == [int, str, list, int, int, int]
        and all(type(size) is int and size >= 0 for size in value[2])
        and min(value[3:]) >= 0
        and math.prod(value[2]) < 2**48
        and previous < value[0] < count
    )
