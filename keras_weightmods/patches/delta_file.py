"""Deltas in files: what changed in a model, checked before it is used."""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable

import numpy as np

from keras_weightmods.core.weight_keys import same_path
from keras_weightmods.ops.random_places import random_places
from keras_weightmods.patches import checkpoint, coding
from keras_weightmods.patches.architecture import (
    is_reparameterized,
    reparameterization_problems,
    weight_problems,
)
from keras_weightmods.patches.entry import Change, ChangeEntry
from keras_weightmods.patches.places import unpack_places
from keras_weightmods.patches.tensors import Replacing, Sparse, is_finite
from keras_weightmods.saving import bounded_json, container
from keras_weightmods.utils import parallel
from keras_weightmods.utils.dtypes import numpy_dtype

FORMAT = "keras_weightmods.delta"
VERSIONS = (1, 2, 3, 4)
# Numbers of a weight in the description.
_LENGTHS = {1: 6, 2: 8, 3: 9, 4: 9}
_PLANES = ("places", "exponents", "mantissas")
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
        reparameterized: Dict, as of `architecture.reparameterized`.
        drawn: Dict from positions to the seeds that `random_places` draws
            their places from: the file holds these in place of places.
    """

    entries: tuple[ChangeEntry, ...]
    count: int
    fingerprint: str
    whole: tuple[int, ...] = ()
    reparameterized: dict[str, str] = dataclasses.field(default_factory=dict)
    drawn: dict[int, int] = dataclasses.field(default_factory=dict)

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
        return (
            weight_problems(expected, infos, argument)
            + [
                f"{argument}, weight {info.position}: "
                f"{infos[info.position].path!r}, and {info.path!r} is expected"
                for info in expected
                if not same_path(info.path, infos[info.position].path)
            ]
            # Else the hash of the base says so.
            + (
                reparameterization_problems(
                    self.reparameterized, model, expected
                )
                if self.reparameterized
                else []
            )
        )


def write_delta(filepath, delta, dtype, overwrite, see) -> float:
    """Write a delta file; return the number of bits that a place takes.

    Args:
        filepath: String or path.
        delta: `Delta`.
        dtype: String, of the differences.
        overwrite: Bool.
        see: Callable, called with the key of each weight that is coded.
    """
    weights, drawn = [], []
    planes: dict[str, list[np.ndarray]] = {name: [] for name in _PLANES}
    for entry in delta:
        info, tensor = entry.info, entry.tensor
        if info.position in delta.drawn:
            seed = delta.drawn[info.position]
            drawn.append([info.position, seed, _checksum(tensor.places)])
            coded_places = 1, 0, 0, np.empty(0, "uint8")
        else:
            coded_places = coding.pack_places(tensor.places, info.shape)
        rows, low, coded, places = coded_places
        first, rest = coding.split_floats(tensor.values)
        first = coding.compress(first)
        row = [info.position, info.path, list(info.shape)]
        row += [tensor.places.size, low, coded, places.size, first.size, rows]
        if isinstance(tensor, Replacing):
            row.append(tensor.values.dtype.name)
        weights.append(row)
        for name, plane in zip(_PLANES, (places, first, rest)):
            planes[name].append(plane)
        see(entry.key)
    about = {
        "weights": weights,
        "count": delta.count,
        "fingerprint": delta.fingerprint,
        "dtype": dtype,
        "whole": list(delta.whole),
    }
    # Absent from most files.
    if delta.reparameterized:
        about["reparameterized"] = delta.reparameterized
    # Earlier programs read what has none.
    version = 3
    if drawn:
        about["drawn"], version = drawn, 4
    arrays = {"description": bounded_json.json_array(about)}
    arrays |= {name: np.concatenate(planes[name]) for name in _PLANES}
    container.write_arrays(filepath, FORMAT, version, arrays, overwrite)
    count = sum(entry.tensor.places.size for entry in delta)
    return 8 * arrays["places"].size / count


def read_delta(filepath) -> Delta:
    """Return the `Delta` in a file, all of it checked."""
    with container.Reader(filepath, FORMAT, VERSIONS) as reader:
        dtypes = {name: entry.dtype for name, entry in reader.entries.items()}
        old = {"description": "uint8", "places": "uint8"}
        new = {"description": "uint8", **dict.fromkeys(_PLANES, "uint8")}
        version = reader.version
        is_new = version > 1
        layouts = [{**old, "values": dtype} for dtype in DTYPES]
        if dtypes not in ([new] if is_new else layouts):
            raise reader.error("places", "must be beside the others of a delta")
        about = reader.read_json("description")
        arrays = {name: reader.read(name) for name in dtypes}
        del arrays["description"]
        try:
            _check_description(about, version)
            entries = _parse(about, arrays, version)
        except ValueError as error:
            raise reader.error("description", str(error)) from error
    return Delta(
        entries,
        about["count"],
        about["fingerprint"],
        tuple(about.get("whole", ())),
        about.get("reparameterized", {}),
        {position: seed for position, seed, _ in about.get("drawn", ())},
    )


def _check_description(description, version):
    types = {"weights": list, "count": int, "fingerprint": str}
    is_new = version > 1
    types |= {"dtype": str, "whole": list} if is_new else {}
    types |= {"drawn": list} if version > 3 else {}
    if isinstance(description, dict) and "reparameterized" in description:
        types["reparameterized"] = dict
    if not isinstance(description, dict) or types != {
        name: type(value) for name, value in description.items()
    }:
        raise ValueError(f"must have {sorted(types)}")
    if is_new and description["dtype"] not in DTYPES:
        raise ValueError(f"must have a dtype of {DTYPES}")
    stored = description.get("reparameterized", {})
    if not is_reparameterized(stored, description["count"]):
        raise ValueError("has no valid 'reparameterized'")
    drawn = description.get("drawn", [])
    positions = [row[0] for row in drawn if _is_drawn(row)]
    if len({*positions}) != len(drawn):
        raise ValueError("has no valid 'drawn'")


def _parse(description, arrays, version):
    """Return the entries; raise ValueError for what is not valid."""
    infos: list[checkpoint.WeightInfo] = []
    kinds: list[type[Sparse]] = []
    coded: list[Callable[[], tuple[np.ndarray, np.ndarray]]] = []
    previous, length = -1, _LENGTHS[version]
    drawn = {row[0]: row[1:] for row in description.get("drawn", ())}
    for weight in description["weights"]:
        if not _is_weight(weight, previous, description["count"], length):
            raise ValueError(f"has a weight that is not: {str(weight)[:200]}")
        previous, path, shape, count, *sizes = weight[:length]
        taken = functools.partial(_taken, arrays, path)
        kinds.append(Replacing if weight[length:] else Sparse)
        if version > 1:
            (dtype,) = weight[length:] or [description["dtype"]]
            dtype = numpy_dtype(dtype)
            again = drawn.pop(previous, None)
            parts = _weight(taken, count, sizes, math.prod(shape), dtype, again)
        else:
            parts = _old_weight(taken, count, sizes, math.prod(shape))
        coded.append(parts)
        infos.append(checkpoint.WeightInfo(previous, path, tuple(shape), ""))
    if drawn:
        raise ValueError(f"has no weights {str([*drawn])[:200]} to draw for")
    if any(array.size for array in arrays.values()):
        raise ValueError("has less than the file")
    decoded = parallel.map_ahead(_decoded, zip(infos, coded))
    entries = [
        ChangeEntry(info, kind(*parts))
        for info, kind, parts in zip(infos, kinds, decoded)
    ]
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


def _decoded(coded):
    """Return the places and the changes of a weight, checked."""
    info, decode = coded
    places, changes = decode()
    if not is_finite(changes):
        raise ValueError(f"has changes of {info.path!r} that are not finite")
    return places, changes


def _weight(taken, count, sizes, size, dtype, drawn):
    """Take a weight; return what decodes its places and its changes.

    `drawn` is the seed and the checksum of places that are not in the file.
    """
    low, coded, nbytes, first_nbytes, *rows = sizes
    (rows,) = rows or [1]  # in files of version 2
    if not 1 <= rows <= max(1, size) or size % rows:
        raise ValueError(f"has {rows} rows of {size} numbers")
    packed = taken("places", nbytes)
    first = taken("exponents", first_nbytes)
    rest = taken("mantissas", count * (dtype.itemsize - 1))

    if drawn and (nbytes, low, coded, rows) != (0, 0, 0, 1):
        raise ValueError("has places that are drawn as well")
    # With a change for each, no more is drawn than the file is large.
    if drawn and not count <= size < 2**31:
        raise ValueError(f"draws {count} of {size} places")

    def decode():
        exponents = coding.decompress(first, count)
        if drawn:
            where = random_places(drawn[0], size, count).astype("int64")
            if _checksum(where) != drawn[1]:
                raise ValueError("draws other places than those of its changes")
        else:
            where = coding.unpack_gaps(packed, count, low, coded, size)
            where = coding.to_rows(where, rows, size)
        return where, coding.join_floats(exponents, rest, dtype)

    return decode


def _checksum(places):
    return zlib.crc32(places.astype("<u4"))


def _is_drawn(row):
    is_row = isinstance(row, list)
    return is_row and [type(each) for each in row] == [int] * 3


def _old_weight(taken, count, sizes, size):
    """Do the same in a file of version 1."""
    bits, nbytes = sizes
    packed, change = taken("places", nbytes), taken("values", count)
    return lambda: (unpack_places(packed, count, bits, size), change)


def _taken(arrays, path, name, size):
    """Take the first `size` numbers out of an array of the file."""
    found, arrays[name] = arrays[name][:size], arrays[name][size:]
    if found.size != size:
        raise ValueError(f"has more of {path!r} than the file")
    return found


def _is_weight(value, previous, count, length):
    types = [int, str, list] + [int] * (length - 3)
    return (
        isinstance(value, list)
        and [type(each) for each in value[:length]] == types
        and (
            not value[length:]
            # By its new values, of this type; not in files of version 1.
            or (
                length > _LENGTHS[1]
                and len(value) == length + 1
                and isinstance(value[-1], str)
                and value[-1] in checkpoint.FLOATS
            )
        )
        and container.is_shape(value[2])
        and all(0 <= size < 2**48 for size in value[3:length])
        and previous < value[0] < count
    )
