"""Signatures in safetensors files, checked before anything is believed.

A file holds the tensors of `WeightSignature.get_tensors()` and, as metadata,
`format`, `format_version`, `signature` (the JSON of `get_config()`) and
`digest`, the SHA-256 of both together.
"""

import json
import math
import os
import pathlib
import re
import stat
import tempfile

import numpy as np

from keras_weightmods.patches import checkpoint as checkpoints
from keras_weightmods.patches import tensors
from keras_weightmods.patches.checkpoint import WeightInfo
from keras_weightmods.patches.tensors import Quantized
from keras_weightmods.patches.weight_signature import (
    SignatureEntry,
    WeightSignature,
)

FORMAT = "keras_weightmods.signature"
VERSION = 1

_MAX_HEADER = 1 << 25
_MAX_AXES = 16
_ITEM_SIZES = {"F32": 4, "U8": 1}
_ENTRY_TYPES = {"position": int, "depth": int, "pull": float, "bits": int}


class _Unreadable(Exception):
    """Why a file is refused."""


def save_signature(signature, path, overwrite=True):
    """Writes a signature; see `WeightSignature.save`."""
    save = _safetensors().save
    path = pathlib.Path(path)
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"There is a file already. Received: path={str(path)!r}, "
            "overwrite=False"
        )
    data = save(
        signature.get_tensors(),
        metadata={
            "format": FORMAT,
            "format_version": str(VERSION),
            "signature": json.dumps(signature.get_config(), sort_keys=True),
            "digest": signature.digest,
        },
    )
    # Complete, or not there at all.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        # `mkstemp` lets nobody else read.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def load_signature(path):
    """Reads a signature; see `WeightSignature.load`."""
    load = _safetensors().load
    try:
        header, data, found = _read(path)
        config = _check_metadata(found.pop("__metadata__", None))
        digest = config.pop("digest")
        entries, architecture = _plan(config, found)
        try:
            arrays = load(len(header).to_bytes(8, "little") + header + data)
        # What the package raises is a class of its own, and has changed.
        except Exception as error:
            raise _Unreadable(f"safetensors refuses it ({error})") from error
        signature = WeightSignature(
            [_entry(entry, architecture, arrays) for entry in entries],
            architecture,
            method=config["method"],
            name=config["name"],
            model_class=config["model_class"],
            fingerprints=config["fingerprints"],
        )
        if signature.digest != digest:
            raise _Unreadable("its contents do not have the digest it states")
        return signature
    except (_Unreadable, ValueError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        raise ValueError(
            f"`path` must be a whole signature file, as `save` writes it, and "
            f"is none: {reason}. Received: path={os.fspath(path)!r}"
        ) from error


def _safetensors():
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            "Signature files need the package safetensors: "
            "`pip install 'keras-weightmods[files]'`"
        ) from error
    return safetensors.numpy


def _read(path):
    """Header, data, and what the header says, checked before data are read."""
    # Without blocking: opening a pipe would wait for its other end.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise _Unreadable("it is no regular file")
        size = status.st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise _Unreadable(f"of {size} bytes it is too short for its header")
        if length > _MAX_HEADER:
            raise _Unreadable(
                f"its header of {length} bytes is over {_MAX_HEADER}"
            )
        header = file.read(length)
        found = _check_header(header, size - 8 - length)
        data = file.read(size - 8 - length)
    if len(header) + len(data) + 8 != size:
        raise _Unreadable("it was cut off while it was read")
    return header, data, found


def _parse(text, what):
    def unique(pairs):
        found = dict(pairs)
        if len(found) != len(pairs):
            raise _Unreadable(f"a name comes twice in its {what}")
        return found

    def constant(name):
        raise _Unreadable(f"{name} in its {what}")

    try:
        return json.loads(
            text, object_pairs_hook=unique, parse_constant=constant
        )
    except (ValueError, RecursionError) as error:
        raise _Unreadable(f"its {what} is no JSON ({error})") from error


def _check_header(header, size):
    """{name: {"dtype", "shape", ...}}: tensors that fill `size` bytes."""
    try:
        text = header.decode()
    except UnicodeDecodeError as error:
        raise _Unreadable("its header is no UTF-8") from error
    found = _parse(text, "header")
    if not isinstance(found, dict):
        raise _Unreadable("its header is no object")
    spans = []
    for name, about in found.items():
        if name == "__metadata__":
            continue
        if not isinstance(about, dict) or set(about) != {
            "dtype",
            "shape",
            "data_offsets",
        }:
            raise _Unreadable(f"tensor {name!r} is not described as it must be")
        offsets = about["data_offsets"]
        # A tuple: what is no string may not be hashable.
        if about["dtype"] not in tuple(_ITEM_SIZES):
            raise _Unreadable(f"tensor {name!r} is of {about['dtype']!r}")
        if not _is_shape(about["shape"]) or not (
            _is_shape(offsets) and len(offsets) == 2
        ):
            raise _Unreadable(f"tensor {name!r} has no sound shape and place")
        begin, end = offsets
        expected = math.prod(about["shape"]) * _ITEM_SIZES[about["dtype"]]
        if end - begin != expected:
            raise _Unreadable(
                f"tensor {name!r} has {end - begin} bytes, not {expected}"
            )
        spans.append((begin, end, name))
    place = 0
    for begin, end, name in sorted(spans):
        if begin != place:
            raise _Unreadable(
                f"tensor {name!r} begins at {begin}, and not at {place}"
            )
        place = end
    if place != size:
        raise _Unreadable(f"it has {size} bytes of tensors, not {place}")
    return found


def _is_shape(value):
    """A list of ints that NumPy can hold, also where the product is 0."""
    return (
        isinstance(value, list)
        and len(value) <= _MAX_AXES
        and all(type(each) is int and 0 <= each < 2**48 for each in value)
        and math.prod(each for each in value if each) < 2**60
    )


def _check_metadata(metadata):
    """The config, with the digest in it."""
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise _Unreadable("its metadata names another format, or none")
    version = metadata.get("format_version")
    if version != str(VERSION):
        raise _Unreadable(
            f"its format version is {version!r}, and this release of "
            f"keras_weightmods reads {VERSION}"
        )
    texts = [metadata.get(key) for key in ("signature", "digest")]
    if not all(isinstance(text, str) for text in texts):
        raise _Unreadable("its metadata lack the signature or the digest")
    config = _parse(texts[0], "metadata")
    _check_config(config)
    return {**config, "digest": texts[1]}


def _check_config(config):
    def check(condition, what):
        if not condition:
            raise _Unreadable(f"its metadata have no sound {what}")

    names = {
        "method",
        "name",
        "model_class",
        "fingerprints",
        "architecture",
        "entries",
    }
    check(isinstance(config, dict) and set(config) == names, "set of fields")
    check(isinstance(config["method"], str), "method")
    for key in ("name", "model_class"):
        check(config[key] is None or isinstance(config[key], str), key)
    fingerprints = config["fingerprints"]
    check(
        isinstance(fingerprints, dict)
        and set(fingerprints) <= {"init", "clean", "robust"}
        and all(
            isinstance(each, str) and re.fullmatch("[0-9a-f]{64}", each)
            for each in fingerprints.values()
        ),
        "fingerprints",
    )
    architecture, entries = config["architecture"], config["entries"]
    check(
        isinstance(architecture, list)
        and all(
            isinstance(each, list)
            and len(each) == 3
            and isinstance(each[0], str)
            and _is_shape(each[1])
            and each[2] in checkpoints.DTYPES
            for each in architecture
        ),
        "architecture",
    )
    check(
        isinstance(entries, list)
        and all(
            isinstance(each, dict)
            and {k: type(v) for k, v in each.items()} == _ENTRY_TYPES
            for each in entries
        ),
        "entries",
    )
    positions = [each["position"] for each in entries]
    count = len(architecture)
    check(
        positions == sorted(set(positions))
        and all(0 <= position < count for position in positions),
        "positions",
    )
    for each in entries:
        check(0 <= each["depth"] < count, "depths")
        check(each["bits"] in (32, 8, 4, 2), "number of bits")
        path, _, dtype = architecture[each["position"]]
        check(dtype in checkpoints.FLOATS, "dtypes")
        is_statistic = path.rpartition("/")[2] in checkpoints.STATISTICS
        check(
            math.isfinite(each["pull"])
            and (is_statistic or each["pull"] == 0.0),
            "share of a statistic",
        )
        check(each["bits"] == 32 or not is_statistic, "number of bits")


def _plan(config, found):
    """Entries and `WeightInfo`s, once the tensors found are those needed."""
    architecture = [
        WeightInfo(position, path, tuple(shape), dtype)
        for position, (path, shape, dtype) in enumerate(config["architecture"])
    ]
    expected: dict[str, tuple] = {}
    for entry in config["entries"]:
        name = str(entry["position"])
        shape = list(architecture[entry["position"]].shape)
        if entry["bits"] == 32:
            expected[name] = ("F32", [shape])
            continue
        size = tensors.packed_size(math.prod(shape), entry["bits"])
        expected[name] = ("U8", [[size]])
        scales = [[]] if len(shape) < 2 else [[], shape[-1:]]
        expected[f"{name}.scales"] = ("F32", scales)
    if set(found) != set(expected):
        strange = sorted(set(found) ^ set(expected))[:5]
        raise _Unreadable(f"it lacks tensors, or has others: {strange}")
    for name, (dtype, shapes) in expected.items():
        about = found[name]
        if about["dtype"] != dtype or about["shape"] not in shapes:
            raise _Unreadable(
                f"tensor {name!r} is {about['dtype']} of shape "
                f"{about['shape']}, and {dtype} of {shapes[-1]} is expected"
            )
    return config["entries"], architecture


def _entry(entry, architecture, arrays):
    info = architecture[entry["position"]]
    name = str(entry["position"])
    tensor = arrays[name]
    bits = entry["bits"]
    if bits != 32:
        scales = arrays[f"{name}.scales"]
        tensor = Quantized(tensor, scales, bits, info.shape)
        levels = 2 ** (bits - 1) - 1
        if np.any(scales < 0) or np.any(tensor.codes > 2 * levels):
            raise _Unreadable(f"the codes of {info.key} are out of range")
    return SignatureEntry(info, entry["depth"], tensor, entry["pull"])
