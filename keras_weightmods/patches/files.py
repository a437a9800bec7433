"""Patches in files, checked before anything in them is used.

A file (see `saving.container`) holds for each weight of a signature an array of
floats, or integers and their scale. For each weight of a delta it holds bytes:
places, exponents, and the rest of the numbers (see `coding`). JSON holds the
other fields.
"""

import math
import re
from typing import Any

import numpy as np

from keras_weightmods.ops.random_places import random_places
from keras_weightmods.patches import coding
from keras_weightmods.patches.entry import (
    FLOATS,
    PatchEntry,
    Quantized,
    Replacing,
    Sparse,
    WeightInfo,
    code_bytes,
)
from keras_weightmods.patches.tensors import is_finite
from keras_weightmods.saving import bounded_json, container
from keras_weightmods.saving.atomic_file import check_filepath
from keras_weightmods.utils import parallel
from keras_weightmods.utils.dtypes import numpy_dtype

FORMAT = "keras_weightmods.patch"
VERSION = 1
CONFIG = "patch.json"
# Dtypes of the differences of a delta.
DIFFERENCES = ("bfloat16", "float32")
_ABOUT = {
    "method": str,
    "name": str | None,
    "base": str | None,
    "whole": list,
}
_FIELDS = {"kind": str, **_ABOUT, "architecture": list, "entries": list}
_SPARSE = {"dtype": str, "rows": int, "seed": int | None}
_PLANES = (".places", ".exponents", ".rest")
# The JSON fields of each kind of entry, and the endings of its arrays.
_KINDS: dict[Any, tuple[dict[str, Any], tuple[str, ...]]] = {
    "floats": ({"depth": int, "replaced": float}, ("",)),
    "integers": ({"depth": int, "bits": int}, ("", ".scale")),
    "differences": (_SPARSE, _PLANES),
    "values": (_SPARSE, _PLANES),
}


def save(filepath, kind, patch, overwrite, see):
    """Write a patch.

    Args:
        filepath: String or path.
        kind: String, of the patch.
        patch: `Patch`.
        overwrite: Bool.
        see: Callable, called with the key of each weight that is coded.

    Returns:
        Float, the bits that a place takes; `None` without places.
    """
    check_filepath(filepath, overwrite)
    arrays, rows, count, index_bytes = {}, [], 0, 0
    for entry in patch:
        tensor, found = entry.tensor, entry.arrays
        row = {"position": entry.position}
        if isinstance(tensor, Sparse):
            kind_of = (
                "values" if isinstance(tensor, Replacing) else "differences"
            )
            along, places = 1, np.empty(0, "uint8")
            if entry.seed is None:
                shape = entry.info.shape
                along, places = coding.pack_places(tensor.places, shape)
            first, rest = coding.split_floats(tensor.values)
            found = places, coding.compress(first), rest
            row["dtype"] = tensor.values.dtype.name
            row |= {"seed": entry.seed, "rows": along}
            count += tensor.size
            index_bytes += places.size
        elif isinstance(tensor, Quantized):
            kind_of = "integers"
            row |= {"depth": entry.depth, "bits": tensor.bits}
        else:
            kind_of = "floats"
            replaced = float(entry.replaced)
            row |= {"depth": entry.depth, "replaced": replaced}
        rows.append({**row, "kind": kind_of})
        for ending, array in zip(_KINDS[kind_of][1], found):
            arrays[f"{entry.position}{ending}"] = array
        see(entry.key)
    config = {
        "kind": kind,
        **{name: getattr(patch, name) for name in _ABOUT},
        "architecture": [
            [info.path, list(info.shape), info.dtype, info.stored]
            for info in patch.architecture
        ],
        "entries": rows,
    }
    arrays[CONFIG] = bounded_json.json_array(config)
    container.write_arrays(filepath, FORMAT, VERSION, arrays, overwrite)
    return 8 * index_bytes / count if count else None


def load(filepath):
    """Return the kind and the fields of the patch in a file, all checked."""
    with container.Reader(filepath, FORMAT, (VERSION,)) as reader:
        config = reader.read_json(CONFIG)
        try:
            return _parse(config, reader)
        except ValueError as error:
            raise reader.error(CONFIG, str(error)) from error


def _parse(config, reader):
    """Return the kind and the fields; raise ValueError for an invalid file."""
    _check(_has_types(config, _FIELDS), "fields")
    for weight in config["architecture"]:
        _check(
            isinstance(weight, list)
            and [type(each) for each in weight[:3]] == [str, list, str]
            and container.is_shape(weight[1])
            and weight[2] in container.DTYPES
            and len(weight) == 4
            and isinstance(weight[3], str | None),
            "architecture",
        )
    infos = tuple(
        WeightInfo(position, path, tuple(shape), *others)
        for position, (path, shape, *others) in enumerate(
            config["architecture"]
        )
    )
    base = config["base"]
    is_hash = base is None or re.fullmatch("[0-9a-f]{64}", base)
    _check(is_hash, "hash of the base")
    previous, expected = -1, {CONFIG}
    for row in config["entries"]:
        kind = row.get("kind") if isinstance(row, dict) else None
        _check(isinstance(kind, str) and kind in _KINDS, "entries")
        types, endings = _KINDS[kind]
        _check(
            _has_types(row, {"position": int, "kind": str, **types})
            and previous < row["position"] < len(infos)
            and infos[row["position"]].dtype in FLOATS
            and row.get("depth", 0) in range(len(infos)),
            "entries",
        )
        previous = row["position"]
        expected |= {f"{previous}{ending}" for ending in endings}
    _check(expected == {*reader.entries}, "arrays, one for each entry")

    def entry_of(row):
        info = infos[row["position"]]
        return (_sparse if "dtype" in row else _dense)(row, info, reader)

    entries = tuple(parallel.map_ahead(entry_of, config["entries"]))
    whole = [
        each.position
        for each in entries
        if isinstance(each.tensor, Replacing)
        and each.tensor.size == math.prod(each.info.shape)
    ]
    for position in config["whole"]:
        _check(type(position) is int and position in whole, "whole weights")
    fields = {name: config[name] for name in _ABOUT}
    fields |= {"architecture": infos, "entries": entries}
    return config["kind"], {**fields, "whole": tuple(config["whole"])}


def _dense(row, info, reader):
    """Return the entry of a row of floats or integers with correct types."""
    name, replaced = f"{info.position}", row.get("replaced", 0.0)
    if row["kind"] == "floats":
        is_right = info.is_statistic or replaced == 0
        _check(is_right and math.isfinite(replaced), f"entry for {info.key}")
        tensor: Any = _array(reader, name, "float32", info.shape)
    else:
        bits = row["bits"]
        is_right = bits in (8, 4, 2) and not info.is_statistic
        _check(is_right, f"entry for {info.key}")
        size = code_bytes(math.prod(info.shape), bits)
        packed = _array(reader, name, "uint8", (size,))
        scale = _array(reader, f"{name}.scale", "float32", ())
        tensor = Quantized(packed, scale, bits, info.shape)
        is_right = scale >= 0 and np.all(tensor.codes() < 2**bits - 1)
        _check(is_right, f"codes of {info.key}")
    return PatchEntry(info, tensor, replaced, row["depth"])


def _sparse(row, info, reader):
    """Return the entry of a row of sparse changes with correct types."""
    size, rows, seed = math.prod(info.shape), row["rows"], row["seed"]
    is_new = row["kind"] == "values"
    _check(
        row["dtype"] in ((info.dtype,) if is_new else DIFFERENCES)
        and 1 <= rows <= max(1, size)
        and size % rows == 0,
        f"entry for {info.key}",
    )
    dtype = numpy_dtype(row["dtype"])
    packed, first, rest = (
        _array(reader, f"{info.position}{ending}", "uint8")
        for ending in _PLANES
    )
    count, odd = divmod(rest.size, dtype.itemsize - 1)
    numbers = coding.decompress(first, count)
    _check(numbers.size == count <= size and not odd, f"numbers of {info.key}")
    if seed is None:
        places = coding.unpack_gaps(packed, count, size)
        places = coding.to_rows(places, rows, size)
    else:
        # Each place has a change, so the file's size limits the draw.
        _check(
            seed >= 0 and size < 2**31 and (packed.size, rows) == (0, 1),
            f"places to draw for {info.key}",
        )
        places = random_places(seed, size, count).astype("int64")
    values = coding.join_floats(numbers, rest, dtype)
    _check(is_finite(values), f"finite numbers of {info.key}")
    kind = Replacing if is_new else Sparse
    return PatchEntry(info, kind(places, values), seed=seed)


def _array(reader, name, dtype, shape=None):
    """Return an array of a file; of one axis without a shape."""
    found = reader.entries[name]
    is_shape = len(found.shape) == 1 if shape is None else found.shape == shape
    _check(found.dtype == dtype and is_shape, f"array {name!r}")
    array = reader.read(name)
    _check(dtype == "uint8" or is_finite(array), f"finite numbers in {name!r}")
    return array


def _has_types(value, types):
    return (
        isinstance(value, dict)
        and set(value) == set(types)
        and all(isinstance(value[name], types[name]) for name in types)
        and not any(isinstance(each, bool) for each in value.values())
    )


def _check(condition, what):
    if not condition:
        raise ValueError(f"has no valid {what}")
