"""Signatures in files, checked before anything in them is used.

A file (see `saving.container`) holds the tensors of the entries and, as JSON,
everything else.
"""

import math
import re
from typing import Any

import numpy as np

from keras_weightmods.patches import checkpoint
from keras_weightmods.patches.architecture import (
    STATISTICS,
    is_reparameterized,
)
from keras_weightmods.patches.entry import PatchEntry
from keras_weightmods.patches.quantized import Quantized, code_bytes
from keras_weightmods.patches.tensors import is_finite
from keras_weightmods.saving import bounded_json, container

FORMAT = "keras_weightmods.signature"
VERSION = 2
_CONFIG = "signature.json"
_CONFIG_TYPES = {
    "method": str,
    "name": str | None,
    "model_class": str | None,
    "fingerprints": dict,
    "architecture": list,
    "entries": list,
}
_ENTRY_TYPES = {"position": int, "depth": int, "replaced": float, "bits": int}


def save(filepath, signature, overwrite):
    """Write a signature; see `WeightSignature.save`."""
    config = bounded_json.json_array(config_of(signature))
    arrays = {_CONFIG: config, **arrays_of(signature)}
    container.write_arrays(filepath, FORMAT, VERSION, arrays, overwrite)


def load(filepath):
    """Return the fields of a signature; see `WeightSignature.load`."""
    with container.Reader(filepath, FORMAT, (VERSION,)) as reader:
        if _CONFIG not in reader.entries:
            raise reader.error(_CONFIG, "is missing")
        config = reader.read_json(_CONFIG)
        names = [name for name in reader.entries if name != _CONFIG]
        arrays = {name: reader.read(name) for name in names}
        try:
            return _fields(config, arrays)
        except ValueError as error:
            raise reader.error(_CONFIG, str(error)) from error


def config_of(signature):
    """Return all of a signature but the tensors, as plain Python values."""
    infos = signature.architecture
    # Absent from most files.
    stored = signature.reparameterized
    return {
        **({"reparameterized": stored} if stored else {}),
        **{name: getattr(signature, name) for name in list(_CONFIG_TYPES)[:4]},
        "architecture": [[i.path, list(i.shape), i.dtype] for i in infos],
        "entries": [
            {k: getattr(e, k) for k in _ENTRY_TYPES} for e in signature
        ],
    }


def arrays_of(signature):
    """Return arrays under `"{position}"` and `"{position}.scales"`."""
    found = {}
    for entry in signature:
        tensor, name = entry.tensor, str(entry.position)
        if isinstance(tensor, Quantized):
            found[name] = tensor.packed
            found[f"{name}.scales"] = tensor.scales
        else:
            found[name] = tensor
    return found


def _fields(config, arrays):
    """Return the fields of a signature from what a file holds.

    Raises:
        ValueError: If they do not make a signature.
    """
    types: dict[str, Any] = dict(_CONFIG_TYPES)
    if isinstance(config, dict) and "reparameterized" in config:
        types["reparameterized"] = dict
    _check(_has_types(config, types), "fields")
    stored = config.get("reparameterized", {})
    count = len(config["architecture"])
    _check(is_reparameterized(stored, count), "reparameterized weights")
    _check(
        all(
            isinstance(each, str) and re.fullmatch("[0-9a-f]{64}", each)
            for each in config["fingerprints"].values()
        )
        and set(config["fingerprints"]) <= {"init", "clean", "robust"},
        "fingerprints",
    )
    for weight in config["architecture"]:
        _check(
            isinstance(weight, list)
            and [type(each) for each in weight] == [str, list, str]
            and container.is_shape(weight[1])
            and weight[2] in checkpoint.DTYPES,
            "architecture",
        )
    infos = tuple(
        checkpoint.WeightInfo(position, path, tuple(shape), dtype)
        for position, (path, shape, dtype) in enumerate(config["architecture"])
    )
    places = range(len(infos))
    for each in config["entries"]:
        _check(
            _has_types(each, _ENTRY_TYPES)
            and each["position"] in places
            and each["depth"] in places,
            "entries",
        )
    positions = [each["position"] for each in config["entries"]]
    _check(positions == sorted(set(positions)), "order of entries")
    entries = [_entry(each, infos, arrays) for each in config["entries"]]
    _check(not arrays, f"entry for the arrays {sorted(arrays)[:5]}")
    return {**config, "architecture": infos, "entries": entries}


def _entry(config, infos, arrays):
    info = infos[config["position"]]
    bits, replaced = config["bits"], config["replaced"]
    statistic = info.name in STATISTICS
    _check(
        info.dtype in checkpoint.FLOATS
        and bits in ((32,) if statistic else (32, 8, 4, 2))
        and math.isfinite(replaced)
        and (statistic or replaced == 0.0),
        f"entry for {info.key}",
    )
    name = str(info.position)
    if bits == 32:
        tensor: Any = _taken(arrays, name, "float32", [info.shape])
    else:
        size = code_bytes(math.prod(info.shape), bits)
        packed = _taken(arrays, name, "uint8", [(size,)])
        shapes = [(), info.shape[-1:]] if len(info.shape) > 1 else [()]
        scales = _taken(arrays, f"{name}.scales", "float32", shapes)
        tensor = Quantized(packed, scales, bits, info.shape)
        _check(
            np.all(scales >= 0) and np.all(tensor.codes < 2**bits - 1),
            f"codes of {info.key}",
        )
    return PatchEntry(info, tensor, replaced, config["depth"])


def _taken(arrays, name, dtype, shapes):
    array = arrays.pop(name, None)
    _check(
        array is not None
        and array.dtype == dtype
        and array.shape in shapes
        and (dtype != "float32" or is_finite(array)),
        f"array {name!r}, {dtype} of shape {shapes[-1]}",
    )
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
