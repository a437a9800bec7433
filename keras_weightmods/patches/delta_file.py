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
from keras_weightmods.patches.tensors import Replacing, Sparse
from keras_weightmods.saving import container

FORMAT = "keras_weightmods.delta"
# 2 where weights are stored by their new values.
VERSIONS = (1, 2)
DTYPES = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True, eq=False)
class Delta(Change):
    """What a delta file holds.

    Attributes:
        entries: Tuple of `ChangeEntry`; their infos have no dtype.
        count: Int, the number of weights of the model.
        fingerprint: String, the SHA-256 of the base model's weights, less
            those of `whole`.
        whole: Tuple of ints, the positions of weights that are all in the
            delta, whatever they are in the base.
    """

    entries: tuple[ChangeEntry, ...]
    count: int
    fingerprint: str
    whole: tuple[int, ...] = ()

    @functools.cached_property
    def digest(self) -> str:
        """String, the SHA-256 of the changes."""
        tensors = [entry.tensor for entry in self.entries]
        arrays = [array for t in tensors for array in (t.places, t.values)]
        keys = [
            e.key if type(e.tensor) is Sparse else f"{e.key} replaced"
            for e in self.entries
        ]
        return checkpoint.digest_of(keys, arrays)

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


def write_delta(filepath, delta, dtype, overwrite) -> float:
    """Write a delta file; return the number of bits that a place takes.

    Args:
        filepath: String or path.
        delta: `Delta`.
        dtype: String, of the differences.
        overwrite: Bool.
    """
    weights, packed, changes, replacing = [], [], [], []
    for entry in delta:
        info, tensor = entry.info, entry.tensor
        bits, places = pack_places(tensor.places)
        sizes = tensor.places.size, bits, places.size
        weights.append([info.position, info.path, list(info.shape), *sizes])
        packed.append(places)
        if isinstance(tensor, Replacing):
            weights[-1].append(tensor.values.dtype.name)
            replacing.append(tensor.values.view("uint8"))
        else:
            changes.append(tensor.values)
    about = {
        "weights": weights,
        "count": delta.count,
        "fingerprint": delta.fingerprint,
    }
    empty = np.empty(0, container.numpy_dtype(dtype))
    arrays = {
        "places": np.concatenate(packed),
        "values": np.concatenate([empty, *changes]),
    }
    version, _ = VERSIONS
    if replacing:
        _, version = VERSIONS
        about["whole"] = list(delta.whole)
        arrays["replacing"] = np.concatenate(replacing)
    arrays = {"description": container.json_array(about), **arrays}
    container.write_arrays(filepath, FORMAT, version, arrays, overwrite)
    count = sum(entry.tensor.places.size for entry in delta)
    return 8 * arrays["places"].size / count


def read_delta(filepath) -> Delta:
    """Return the `Delta` in a file, all of it checked."""
    with container.Reader(filepath, FORMAT, VERSIONS) as reader:
        dtypes = {name: entry.dtype for name, entry in reader.entries.items()}
        expected = {"description": "uint8", "places": "uint8"}
        replacing = np.empty(0, "uint8")
        if "replacing" in dtypes:
            expected["replacing"] = "uint8"
            replacing = reader.read("replacing")
        if dtypes not in [{**expected, "values": dtype} for dtype in DTYPES]:
            raise reader.error("values", "must be beside the others of a delta")
        about = reader.read_json("description")
        try:
            entries = _parse(
                about, reader.read("places"), reader.read("values"), replacing
            )
        except ValueError as error:
            raise reader.error("description", str(error)) from error
    whole = tuple(about.get("whole", ()))
    return Delta(entries, about["count"], about["fingerprint"], whole)


def _parse(description, places, values, replacing):
    """Return the entries; raise ValueError for what is not valid."""
    types: dict[str, type] = {"weights": list, "count": int, "fingerprint": str}
    if replacing.size:
        types["whole"] = list
    if not isinstance(description, dict) or types != {
        name: type(value) for name, value in description.items()
    }:
        raise ValueError(f"must have {sorted(types)}")
    entries: list[ChangeEntry] = []
    previous = -1
    for weight in description["weights"]:
        if not _is_weight(weight, previous, description["count"]):
            raise ValueError(f"has a weight that is not: {str(weight)[:200]}")
        previous, path, shape, count, bits, nbytes, *dtype = weight
        packed, places = places[:nbytes], places[nbytes:]
        kind: type[Sparse] = Replacing if dtype else Sparse
        if dtype:
            item = container.numpy_dtype(dtype[0])
            size = count * item.itemsize
            change, replacing = replacing[:size], replacing[size:]
            change = change[: len(change) // item.itemsize * item.itemsize]
            change = change.view(item)
        else:
            change, values = values[:count], values[count:]
        if packed.size != nbytes or change.size != count:
            raise ValueError(f"has more of {path!r} than the file")
        where = unpack_places(packed, count, bits, math.prod(shape))
        if not np.all(np.isfinite(change.astype("float64"))):
            raise ValueError(f"has changes of {path!r} that are not finite")
        info = checkpoint.WeightInfo(previous, path, tuple(shape), "")
        entries.append(ChangeEntry(info, kind(where, change)))
    if places.size or values.size or replacing.size:
        raise ValueError("has less than the file")
    all_of = [
        entry.position
        for entry in entries
        if type(entry.tensor) is Replacing
        and entry.tensor.places.size == math.prod(entry.info.shape)
    ]
    for position in description.get("whole", ()):
        if type(position) is not int or position not in all_of:
            raise ValueError(f"has less of the weight {position!r} than all")
    return tuple(entries)


def _is_weight(value, previous, count):
    types = [int, str, list, int, int, int]
    return (
        isinstance(value, list)
        and [type(each) for each in value[:6]] == types
        and (
            not value[6:] or (len(value) == 7 and value[6] in checkpoint.FLOATS)
        )
        and container.is_shape(value[2])
        and all(0 <= size < 2**48 for size in value[3:6])
        and previous < value[0] < count
    )
