"""What a file holds, without Keras."""

import contextlib
import dataclasses
import io
import os
import re
import zipfile
from collections.abc import Iterator
from typing import Any

import keras_weightmods as kwm
from keras_weightmods.cli.command import command, reported
from keras_weightmods.saving import bounded_json, container, file_kinds
from keras_weightmods.utils.checks import cut
from keras_weightmods.utils.report import Report, Table, size_text

# Bytes of compressed weights that are inflated in memory. Keras' are not.
_MAX_INFLATED = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class FileReport(Report):
    """What a file holds.

    Attributes:
        filepath: String.
        kind: String, what the file is.
        reader: String, the call that reads it.
        about: Dict, what it says of itself.
        arrays: Tuple of (name, shape, dtype).
        nbytes: Int, of the file.
    """

    filepath: str
    kind: str
    reader: str
    about: dict[str, Any]
    arrays: tuple[tuple[str, tuple[int, ...], str], ...]
    nbytes: int

    def tables(self) -> Iterator[Table]:
        yield Table(f"{self.filepath}: {self.kind}, which {self.reader} reads")
        yield Table("", [*self.about.items()], "about_it value")
        size = f"{len(self.arrays)} arrays; the file has "
        size += size_text(self.nbytes)
        yield Table("", self.arrays, "array shape dtype", caption=size)


@command(
    "info",
    "file",
    pattern={
        "help": "load the model, and report how far its kernels are from "
        "this pattern, such as 2:4"
    },
)
def _info(args):
    """Say what a file holds.

    It loads Keras only with --pattern. A file of this library is checked from
    end to end.

    examples:
      keras-weightmods info model.keras
      keras-weightmods info model.keras --pattern 2:4
    """
    if args.pattern is None:
        return reported(file_report(args.file))
    from keras_weightmods.cli.files import load_model

    return reported(kwm.sparsity_report(load_model(args.file), args.pattern))


def file_report(path) -> FileReport:
    """Return the `FileReport` of a file or preset."""
    kind, reader = file_kinds.kind_of(path)
    parts = [path]
    if kind == "a preset":
        with os.scandir(path) as files:
            parts = sorted(file.path for file in files if file.is_file())
        about, arrays = _in_preset(parts)
    elif kind == "an HDF5 file":
        with _named(path):
            about, arrays = {}, _in_hdf5(path)
    elif kind == "a .keras file" or path.endswith(".keras"):
        with _named(path):
            about, arrays = _in_keras(path)
    elif kind and "keras_weightmods" not in kind:
        read = f", which {reader} reads" if reader else ""
        raise ValueError(f"{path} is {kind}{read}: there is no more to say")
    else:
        about, arrays = _in_container(path)
    size = sum(map(os.path.getsize, parts))
    return FileReport(path, kind, reader, about, tuple(arrays), size)


@contextlib.contextmanager
def _named(path):
    try:
        yield
    # A damaged file fails in many ways.
    except Exception as error:
        raise ValueError(f"{path} cannot be read: {cut(error)}") from error


def _in_container(path):
    """Read a file of this library, all of it checked."""
    metadata = file_kinds.metadata_of(path)
    format = metadata.get("format", "keras_weightmods.model")
    version = metadata.get("version", "1")
    number = int(version) if re.fullmatch("[0-9]{1,9}", version) else 1
    with container.Reader(path, format, (number,)) as reader:
        about = {"version": number}
        for name in reader.entries:
            if name.endswith(".json") or name == "description":
                described = reader.read_json(name)
                if not isinstance(described, dict):
                    raise reader.error(name, "must be an object of JSON")
                about.update(_facts(described))
        return about, [(n, e.shape, e.dtype) for n, e in reader.entries.items()]


def _in_safetensors(path):
    import safetensors

    with safetensors.safe_open(path, framework="np") as file:
        for name in file.keys():  # noqa: SIM118
            part = file.get_slice(name)
            yield name, tuple(part.get_shape()), part.get_dtype()


def _in_keras(path):
    with zipfile.ZipFile(path) as archive:

        def read(name, most):
            size = archive.getinfo(name).file_size
            if size > most:
                raise ValueError(f"{name} has {size} bytes, more than {most}")
            return archive.read(name)

        about: dict[str, Any] = {}
        for name in ("config.json", "metadata.json"):
            about |= _facts(_object(read(name, file_kinds.MAX_HEADER)))
        name = "model.weights.h5"
        if archive.getinfo(name).compress_type == zipfile.ZIP_STORED:
            with archive.open(name) as file:
                return about, _in_hdf5(file)
        # Each step back in such a file would inflate all before it again.
        return about, _in_hdf5(io.BytesIO(read(name, _MAX_INFLATED)))


def _object(text):
    found = bounded_json.parse_json(text)
    if not isinstance(found, dict):
        raise ValueError("it has JSON that is no object")
    return found


def _in_hdf5(file):
    import h5py

    found, seen = [], set()
    with h5py.File(file) as opened:
        # Not by `visititems`, which walks from the root to each of its items.
        left = [(key, opened, key) for key in reversed([*opened])]
        while left:
            path, group, key = left.pop()
            # No link to another file is followed.
            if not isinstance(group.get(key, getlink=True), h5py.HardLink):
                continue
            item = group[key]
            place = h5py.h5o.get_info(item.id).addr
            if isinstance(item, h5py.Dataset):
                found.append((path, item.shape, item.dtype.name))
            elif isinstance(item, h5py.Group) and place not in seen:
                seen.add(place)
                left += [(f"{path}/{k}", item, k) for k in reversed([*item])]
    return found


def _in_preset(files):
    about, arrays = {}, []
    for path in files:
        name = os.path.basename(path)
        with _named(path):
            if name in ("metadata.json", "config.json", "task.json"):
                with open(path, "rb") as file:
                    about.update(_facts(_object(file.read())))
            elif name.endswith(".h5"):
                arrays += _in_hdf5(path)
            elif name.endswith(".safetensors"):
                arrays += _in_safetensors(path)
    return about, arrays


def _facts(described):
    """Return the strings and numbers in JSON, two levels deep."""
    found: dict[str, Any] = {}
    for key, value in described.items():
        inside = value if isinstance(value, dict) else {"": value}
        for inner, each in inside.items():
            name = cut(f"{key}.{inner}".rstrip("."), 200)
            if isinstance(each, str):
                found[name] = cut(each)
            elif isinstance(each, (int, float)):
                found[name] = each
    return found
