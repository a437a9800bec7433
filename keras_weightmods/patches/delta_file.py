"""Deltas in files: what changed in a model, checked before it is used."""

import functools
import math
import zlib
from collections.abc import Callable

import numpy as np

from keras_weightmods.ops.random_places import random_places
from keras_weightmods.patches import checkpoint, coding
from keras_weightmods.patches.architecture import is_reparameterized
from keras_weightmods.patches.entry import PatchEntry
from keras_weightmods.patches.tensors import Replacing, Sparse, is_finite
from keras_weightmods.saving import bounded_json, container
from keras_weightmods.saving.atomic_file import check_filepath
from keras_weightmods.utils import parallel
from keras_weightmods.utils.dtypes import numpy_dtype

FORMAT = "keras_weightmods.delta"
VERSIONS = (3, 4)
# Numbers of a weight in the description.
_LENGTH = 9
_PLANES = ("places", "exponents", "mantissas")
DTYPES = ("bfloat16", "float16", "float32")


def write(filepath, patch, overwrite, see) -> float:
    """Write a delta; return the number of bits that a place takes.

    Args:
        filepath: String or path.
        patch: `Patch`.
        overwrite: Bool.
        see: Callable, called with the key of each weight that is coded.
    """
    check_filepath(filepath, overwrite)
    dtype = "bfloat16"
    weights, drawn = [], []
    planes: dict[str, list[np.ndarray]] = {name: [] for name in _PLANES}
    for entry in patch:
        info, tensor = entry.info, entry.tensor
        if entry.seed is not None:
            checksum = _checksum(tensor.places)
            drawn.append([info.position, entry.seed, checksum])
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
        else:
            dtype = tensor.values.dtype.name
        weights.append(row)
        for name, plane in zip(_PLANES, (places, first, rest)):
            planes[name].append(plane)
        see(entry.key)
    about = {
        "weights": weights,
        "count": patch.count,
        "fingerprint": patch.base,
        "dtype": dtype,
        "whole": list(patch.whole),
    }
    # Absent from most files.
    if patch.reparameterized:
        about["reparameterized"] = patch.reparameterized
    # Earlier programs read what has none.
    version = 3
    if drawn:
        about["drawn"], version = drawn, 4
    arrays = {"description": bounded_json.json_array(about)}
    arrays |= {name: np.concatenate(planes[name]) for name in _PLANES}
    container.write_arrays(filepath, FORMAT, version, arrays, overwrite)
    count = sum(entry.size for entry in patch)
    return 8 * arrays["places"].size / count


def read(filepath):
    """Return the fields of a `Patch` in a file, all of it checked."""
    with container.Reader(filepath, FORMAT, VERSIONS) as reader:
        dtypes = {name: entry.dtype for name, entry in reader.entries.items()}
        if dtypes != dict.fromkeys(("description", *_PLANES), "uint8"):
            raise reader.error("places", "must be beside the others of a delta")
        about = reader.read_json("description")
        arrays = {name: reader.read(name) for name in _PLANES}
        try:
            _check_description(about, reader.version)
            entries = _parse(about, arrays)
        except ValueError as error:
            raise reader.error("description", str(error)) from error
    return {
        "entries": entries,
        "count": about["count"],
        "base": about["fingerprint"],
        "whole": tuple(about["whole"]),
        "reparameterized": about.get("reparameterized", {}),
    }


def _check_description(description, version):
    types = {
        "weights": list,
        "count": int,
        "fingerprint": str,
        "dtype": str,
        "whole": list,
    }
    types |= {"drawn": list} if version > 3 else {}
    if isinstance(description, dict) and "reparameterized" in description:
        types["reparameterized"] = dict
    if not isinstance(description, dict) or types != {
        name: type(value) for name, value in description.items()
    }:
        raise ValueError(f"must have {sorted(types)}")
    if description["dtype"] not in DTYPES:
        raise ValueError(f"must have a dtype of {DTYPES}")
    stored = description.get("reparameterized", {})
    if not is_reparameterized(stored, description["count"]):
        raise ValueError("has no valid 'reparameterized'")
    drawn = description.get("drawn", [])
    positions = [
        row[0]
        for row in drawn
        if isinstance(row, list) and [type(each) for each in row] == [int] * 3
    ]
    if len({*positions}) != len(drawn):
        raise ValueError("has no valid 'drawn'")


def _parse(description, arrays):
    """Return the entries; raise ValueError for what is not valid."""
    made: list[Callable[[], PatchEntry]] = []
    previous = -1
    drawn = {row[0]: row[1:] for row in description.get("drawn", ())}
    for weight in description["weights"]:
        if not _is_weight(weight, previous, description["count"]):
            raise ValueError(f"has a weight that is not: {str(weight)[:200]}")
        previous, path, shape = weight[:3]
        info = checkpoint.WeightInfo(previous, path, tuple(shape), "")
        made.append(
            _entry(
                functools.partial(_taken, arrays, path),
                info,
                *weight[3:_LENGTH],
                dtype=(weight[_LENGTH:] or [description["dtype"]])[0],
                kind=Replacing if weight[_LENGTH:] else Sparse,
                drawn=drawn.pop(previous, None),
            )
        )
    if drawn:
        raise ValueError(f"has no weights {str([*drawn])[:200]} to draw for")
    if any(array.size for array in arrays.values()):
        raise ValueError("has less than the file")
    entries = tuple(parallel.map_ahead(lambda make: make(), made))
    all_of = [
        entry.position
        for entry in entries
        if type(entry.tensor) is Replacing
        and entry.size == math.prod(entry.info.shape)
    ]
    for position in description["whole"]:
        if type(position) is not int or position not in all_of:
            raise ValueError(f"has less of the weight {position!r} than all")
    return entries


def _entry(
    taken, info, count, low, coded, nbytes, exponents, rows, dtype, kind, drawn
):
    """Take a weight; return what decodes its entry and checks it.

    `drawn` is the seed and the checksum of places that are not in the file.
    """
    size, dtype = math.prod(info.shape), numpy_dtype(dtype)
    if not 1 <= rows <= max(1, size) or size % rows:
        raise ValueError(f"has {rows} rows of {size} numbers")
    packed = taken("places", nbytes)
    first = taken("exponents", exponents)
    rest = taken("mantissas", count * (dtype.itemsize - 1))
    if drawn and (nbytes, low, coded, rows) != (0, 0, 0, 1):
        raise ValueError("has places that are drawn as well")
    # With a change for each, no more is drawn than the file is large.
    if drawn and not count <= size < 2**31:
        raise ValueError(f"draws {count} of {size} places")

    def decode():
        numbers = coding.decompress(first, count)
        if drawn:
            places = random_places(drawn[0], size, count).astype("int64")
            if _checksum(places) != drawn[1]:
                raise ValueError("draws other places than those of its changes")
        else:
            places = coding.unpack_gaps(packed, count, low, coded, size)
            places = coding.to_rows(places, rows, size)
        values = coding.join_floats(numbers, rest, dtype)
        if not is_finite(values):
            raise ValueError(
                f"has changes of {info.path!r} that are not finite"
            )
        seed = drawn[0] if drawn else None
        return PatchEntry(info, kind(places, values), seed=seed)

    return decode


def _checksum(places):
    return zlib.crc32(places.astype("<u4"))


def _taken(arrays, path, name, size):
    """Take the first `size` numbers out of an array of the file."""
    found, arrays[name] = arrays[name][:size], arrays[name][size:]
    if found.size != size:
        raise ValueError(f"has more of {path!r} than the file")
    return found


def _is_weight(value, previous, count):
    types = [int, str, list] + [int] * (_LENGTH - 3)
    return (
        isinstance(value, list)
        and [type(each) for each in value[:_LENGTH]] == types
        and (
            not value[_LENGTH:]
            # By its new values, of this type.
            or (
                len(value) == _LENGTH + 1
                and isinstance(value[-1], str)
                and value[-1] in checkpoint.FLOATS
            )
        )
        and container.is_shape(value[2])
        and all(0 <= size < 2**48 for size in value[3:_LENGTH])
        and previous < value[0] < count
    )
