"""Patches in files, checked before anything in them is used.

A file (see `saving.container`) holds an array for each weight of a signature,
of floats or of integers with their scales beside it; one array with the sparse
changes of a delta, for each weight the bytes of the places, of the exponents
and of the mantissas (see `coding`); and, as JSON, everything else.
"""

import math
import re
import zlib
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
_SPARSE_ARRAY = "changes"
# Of the differences of a delta.
DIFFERENCES = ("bfloat16", "float16", "float32")
_ABOUT = {
    "method": str,
    "name": str | None,
    "model_class": str | None,
    "fingerprints": dict,
    "whole": list,
    "reparameterized": dict,
}
_FIELDS = {"kind": str, **_ABOUT, "architecture": list, "entries": list}
_SPARSE = {
    "dtype": str,
    "seed": int | None,
    "checksum": int | None,
    **dict.fromkeys(("count", "rows", "low", "coded"), int),
    **dict.fromkeys(("places", "exponents"), int),
}
_KINDS: dict[str, dict[str, Any]] = {
    "floats": {"depth": int, "replaced": float},
    "integers": {"depth": int, "bits": int},
    "differences": _SPARSE,
    "values": _SPARSE,
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
    arrays, rows, planes = {}, [], []
    for entry in patch:
        name, tensor = str(entry.position), entry.tensor
        row = {"position": entry.position, "depth": entry.depth}
        if isinstance(tensor, Sparse):
            row, found = _coded(entry)
            planes += found
        elif isinstance(tensor, Quantized):
            row |= {"kind": "integers", "bits": tensor.bits}
            arrays[name] = tensor.packed
            arrays[f"{name}.scales"] = tensor.scales
        else:
            row |= {"kind": "floats", "replaced": float(entry.replaced)}
            arrays[name] = tensor
        rows.append(row)
        see(entry.key)
    if planes:
        arrays[_SPARSE_ARRAY] = np.concatenate(planes)
    config = {
        "kind": kind,
        **{name: getattr(patch, name) for name in _ABOUT},
        "architecture": [
            [info.path, list(info.shape), info.dtype]
            for info in patch.architecture
        ],
        "entries": rows,
    }
    arrays[CONFIG] = bounded_json.json_array(config)
    container.write_arrays(filepath, FORMAT, VERSION, arrays, overwrite)
    count = sum(row.get("count", 0) for row in rows)
    places = sum(row.get("places", 0) for row in rows)
    return 8 * places / count if count else None


def _coded(entry):
    """Return what the JSON holds of a sparse change, and its planes."""
    tensor = entry.tensor
    rows, low, coded, places = 1, 0, 0, np.empty(0, "uint8")
    checksum = None
    if entry.seed is None:
        found = coding.pack_places(tensor.places, entry.info.shape)
        rows, low, coded, places = found
    else:
        checksum = _checksum(tensor.places)
    first, rest = coding.split_floats(tensor.values)
    first = coding.compress(first)
    is_new = isinstance(tensor, Replacing)
    row = {
        "position": entry.position,
        "kind": "values" if is_new else "differences",
        "dtype": tensor.values.dtype.name,
        "seed": entry.seed,
        "checksum": checksum,
        "count": tensor.places.size,
        "rows": rows,
        "low": low,
        "coded": coded,
        "places": places.size,
        "exponents": first.size,
    }
    return row, [places, first, rest]


def load(filepath):
    """Return the kind and the fields of the patch in a file, all checked."""
    with container.Reader(filepath, FORMAT, (VERSION,)) as reader:
        if CONFIG not in reader.entries:
            raise reader.error(CONFIG, "is missing")
        config = reader.read_json(CONFIG)
        try:
            return _parse(config, reader)
        except ValueError as error:
            raise reader.error(CONFIG, str(error)) from error


def _parse(config, reader):
    """Return the kind and the fields; raise ValueError for what is wrong."""
    _check(_has_types(config, _FIELDS), "fields")
    for weight in config["architecture"]:
        _check(
            isinstance(weight, list)
            and [type(each) for each in weight] == [str, list, str]
            and container.is_shape(weight[1])
            and weight[2] in container.DTYPES,
            "architecture",
        )
    infos = tuple(
        WeightInfo(position, path, tuple(shape), dtype)
        for position, (path, shape, dtype) in enumerate(config["architecture"])
    )
    _check(
        {*config["fingerprints"]} <= {"base", "init", "clean", "robust"}
        and all(
            isinstance(each, str) and re.fullmatch("[0-9a-f]{64}", each)
            for each in config["fingerprints"].values()
        ),
        "fingerprints",
    )
    _check(
        all(
            key.isdecimal() and int(key) < len(infos) and isinstance(how, str)
            for key, how in config["reparameterized"].items()
        ),
        "reparameterized weights",
    )
    previous, expected, end, starts = -1, {CONFIG}, 0, []
    for row in config["entries"]:
        kind = row.get("kind") if isinstance(row, dict) else None
        types = _KINDS.get(kind) if isinstance(kind, str) else None
        _check(
            types is not None
            and _has_types(row, {"position": int, "kind": str, **types})
            and previous < row["position"] < len(infos)
            and infos[row["position"]].dtype in FLOATS
            and row.get("depth", 0) in range(len(infos)),
            "entries",
        )
        previous = row["position"]
        starts.append(end)
        if types is _SPARSE:
            expected.add(_SPARSE_ARRAY)
            end += _sparse_size(row, infos[previous])
        else:
            expected.add(f"{previous}")
        if kind == "integers":
            expected.add(f"{previous}.scales")
    _check(expected == {*reader.entries}, "arrays, one for each entry")
    if _SPARSE_ARRAY in expected:
        found = reader.entries[_SPARSE_ARRAY]
        is_right = (found.dtype, found.shape) == ("uint8", (end,))
        _check(is_right, f"array {_SPARSE_ARRAY!r} of {end} bytes")

    def entry_of(each):
        row, start = each
        info = infos[row["position"]]
        if "dtype" in row:
            return _sparse(row, info, reader, start)
        return _dense(row, info, reader)

    pairs = zip(config["entries"], starts)
    entries = tuple(parallel.map_ahead(entry_of, pairs))
    whole = [
        entry.position
        for entry in entries
        if isinstance(entry.tensor, Replacing)
        and entry.size == math.prod(entry.info.shape)
    ]
    for position in config["whole"]:
        _check(type(position) is int and position in whole, "whole weights")
    fields = {name: config[name] for name in _ABOUT}
    fields |= {"architecture": infos, "entries": entries}
    return config["kind"], {**fields, "whole": tuple(config["whole"])}


def _dense(row, info, reader):
    """Return the entry of a row of floats or integers; types are right."""
    name, size = f"{info.position}", math.prod(info.shape)
    if row["kind"] == "floats":
        replaced = row["replaced"]
        is_right = math.isfinite(replaced) and (
            info.is_statistic or replaced == 0
        )
        _check(is_right, f"entry for {info.key}")
        tensor: Any = _array(reader, name, "float32", [info.shape])
        return PatchEntry(info, tensor, replaced, row["depth"])
    bits = row["bits"]
    is_right = bits in (8, 4, 2) and not info.is_statistic
    _check(is_right, f"entry for {info.key}")
    packed = _array(reader, name, "uint8", [(code_bytes(size, bits),)])
    shapes = [(), info.shape[-1:]] if len(info.shape) > 1 else [()]
    scales = _array(reader, f"{name}.scales", "float32", shapes)
    tensor = Quantized(packed, scales, bits, info.shape)
    _check(
        np.all(scales >= 0) and np.all(tensor.codes < 2**bits - 1),
        f"codes of {info.key}",
    )
    return PatchEntry(info, tensor, depth=row["depth"])


def _sparse_size(row, info):
    """Return the bytes of a sparse change whose row has the right types."""
    size = math.prod(info.shape)
    dtypes = (info.dtype,) if row["kind"] == "values" else DIFFERENCES
    _check(
        row["dtype"] in dtypes
        and 0 <= row["count"] <= size
        and 1 <= row["rows"] <= max(1, size)
        and size % row["rows"] == 0
        and min(row["places"], row["exponents"]) >= 0,
        f"entry for {info.key}",
    )
    rest = row["count"] * (numpy_dtype(row["dtype"]).itemsize - 1)
    return row["places"] + row["exponents"] + rest


def _sparse(row, info, reader, start):
    """Return the entry of a sparse change, whose bytes begin at `start`."""
    size, dtype = math.prod(info.shape), numpy_dtype(row["dtype"])
    count, rows, seed = row["count"], row["rows"], row["seed"]
    stop = start + _sparse_size(row, info)
    data = reader.read_part(_SPARSE_ARRAY, start, stop)
    ends = row["places"], row["places"] + row["exponents"]
    packed, first, rest = np.split(data, ends)
    numbers = coding.decompress(first, count)
    if seed is not None:
        # With a change for each, no more is drawn than the file is large.
        _check(
            size < 2**31
            and (row["places"], row["low"], row["coded"], rows) == (0, 0, 0, 1),
            f"places to draw for {info.key}",
        )
        places = random_places(seed, size, count).astype("int64")
        _check(
            _checksum(places) == row["checksum"], f"drawn places of {info.key}"
        )
    else:
        low, coded = row["low"], row["coded"]
        places = coding.unpack_gaps(packed, count, low, coded, size)
        places = coding.to_rows(places, rows, size)
    values = coding.join_floats(numbers, rest, dtype)
    _check(is_finite(values), f"finite numbers of {info.key}")
    kind = Replacing if row["kind"] == "values" else Sparse
    return PatchEntry(info, kind(places, values), seed=seed)


def _array(reader, name, dtype, shapes):
    found = reader.entries[name]
    _check(
        found.dtype == dtype and found.shape in shapes,
        f"array {name!r}, {dtype} of shape {shapes[-1]}",
    )
    array = reader.read(name)
    is_right = dtype != "float32" or is_finite(array)
    _check(is_right, f"array {name!r} of finite numbers")
    return array


def _checksum(places):
    return zlib.crc32(places.astype("<u4"))


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
