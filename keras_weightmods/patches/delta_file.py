"""Deltas in files: what changed in a model, checked before it is used."""

import dataclasses
import functools
import math

import numpy as np

from keras_weightmods.core.weight_keys import same_path
from keras_weightmods.patches import checkpoint
from keras_weightmods.patches.architecture import weight_problems
from keras_weightmods.patches.entry import Change, ChangeEntry
from keras_weightmods.patches.places import pack_places, unpack_places
from keras_weightmods.patches.tensors import Sparse
from keras_weightmods.saving import container

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
        tensors = [entry.tensor for entry in self.entries]
        arrays = [array for t in tensors for array in (t.places, t.values)]
        return checkpoint.digest_of([e.key for e in self.entries], arrays)

    def problems(self, model: checkpoint.Checkpoint) -> list[str]:
        """Return what keeps the delta from fitting a `Checkpoint`."""
        infos, argument = model.infos, f"`{model.argument}`"
        if self.count != len(infos):
            return [f"{len(infos)} weights, and {self.count} are expected"]
        expected = [entry.info for entry in self.entries]
        return weight_problems(expected, infos, argument) + [
            f"{argument}, weight {info.position}: "
            f"{infos[info.position].path!r}, and {info.path!r} is expected"
            for info in expected
            if not same_path(info.path, infos[info.position].path)
        ]


def write_delta(filepath, entries, count, fingerprint, overwrite) -> float:
    """Write a delta file; return the number of bits that a place takes."""
    weights, packed = [], []
    for entry in entries:
        info, tensor = entry.info, entry.tensor
        bits, places = pack_places(tensor.places)
        sizes = tensor.places.size, bits, places.size
        weights.append([info.position, info.path, list(info.shape), *sizes])
        packed.append(places)
    about = {"weights": weights, "count": count, "fingerprint": fingerprint}
    arrays = {
        "description": container.json_array(about),
        "places": np.concatenate(packed),
        "values": np.concatenate([entry.tensor.values for entry in entries]),
    }
    container.write_arrays(filepath, FORMAT, VERSION, arrays, overwrite)
    return 8 * arrays["places"].size / arrays["values"].size


def read_delta(filepath) -> Delta:
    """Return the `Delta` in a file, all of it checked."""
    with container.Reader(filepath, FORMAT, (VERSION,)) as reader:
        dtypes = {name: entry.dtype for name, entry in reader.entries.items()}
        expected = {"description": "uint8", "places": "uint8"}
        if dtypes not in [{**expected, "values": dtype} for dtype in DTYPES]:
            raise reader.error("values", "must be beside the others of a delta")
        about = reader.read_json("description")
        try:
            entries = _parse(
                about, reader.read("places"), reader.read("values")
            )
        except ValueError as error:
            raise reader.error("description", str(error)) from error
    return Delta(entries, about["count"], about["fingerprint"])


def _parse(description, places, values):
    """Return the entries; raise ValueError for what is not valid."""
    types = {"weights": list, "count": int, "fingerprint": str}
    if not isinstance(description, dict) or types != {
        name: type(value) for name, value in description.items()
    }:
        raise ValueError(f"must have {sorted(types)}")
    entries: list[ChangeEntry] = []
    previous = -1
    for weight in description["weights"]:
        if not _is_weight(weight, previous, description["count"]):
            raise ValueError(f"has a weight that is not: {str(weight)[:200]}")
        previous, path, shape, count, bits, nbytes = weight
        packed, places = places[:nbytes], places[nbytes:]
        change, values = values[:count], values[count:]
        if packed.size != nbytes or change.size != count:
            raise ValueError(f"has more of {path!r} than the file")
        where = unpack_places(packed, count, bits, math.prod(shape))
        if not np.all(np.isfinite(change.astype("float32"))):
            raise ValueError(f"has changes of {path!r} that are not finite")
        info = checkpoint.WeightInfo(previous, path, tuple(shape), "")
        entries.append(ChangeEntry(info, Sparse(where, change)))
    if places.size or values.size:
        raise ValueError("has less than the file")
    return tuple(entries)


def _is_weight(value, previous, count):
    return (
        isinstance(value, list)
        and [type(each) for each in value] == [int, str, list, int, int, int]
        and container.is_shape(value[2])
        and all(0 <= size < 2**48 for size in value[3:])
        and previous < value[0] < count
    )
