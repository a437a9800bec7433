"""What a file holds, without Keras."""

import dataclasses
import json
import os
import zipfile
from collections.abc import Iterator
from typing import Any

import keras_weightmods as kwm
from keras_weightmods.cli.command import command, reported
from keras_weightmods.saving import container, file_kinds
from keras_weightmods.utils.report import Report, Table, size_text


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
        "help": "load the model, and report how far its kernels have this "
        "pattern, as 2:4"
    },
)
def _info(args):
    """Say what a file holds.

    It loads no Keras, but with --pattern. A file of this library is checked
    as a whole.

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
        about, arrays = {}, _in_hdf5(path)
    elif kind == "a .keras file" or path.endswith(".keras"):
        try:
            about, arrays = _in_keras(path)
        except (zipfile.BadZipFile, KeyError, OSError) as error:
            raise ValueError(f"Keras cannot load {path}: {error}") from error
    elif kind and "keras_weightmods" not in kind:
        read = f", which {reader} reads" if reader else ""
        raise ValueError(f"{path} is {kind}{read}: there is no more to say")
    else:
        about, arrays = _in_container(path)
    size = sum(map(os.path.getsize, parts))
    return FileReport(path, kind, reader, about, tuple(arrays), size)


def _in_container(path):
    """Read a file of this library, all of it checked."""
    metadata = file_kinds.metadata_of(path)
    format = metadata.get("format", "keras_weightmods.model")
    version = metadata.get("version", "1")
    versions = (int(version),) if version.isdigit() else (1,)
    with container.Reader(path, format, versions) as reader:
        about = {"version": int(version)}
        for name in reader.entries:
            if name.endswith(".json") or name == "description":
                about.update(_facts(reader.read_json(name)))
        return about, [(n, e.shape, e.dtype) for n, e in reader.entries.items()]


def _in_safetensors(path):
    import safetensors

    with safetensors.safe_open(path, framework="np") as file:
        for name in file.keys():  # noqa: SIM118
            part = file.get_slice(name)
            yield name, tuple(part.get_shape()), part.get_dtype()


def _in_keras(path):
    with zipfile.ZipFile(path) as archive:
        about = json.loads(archive.read("metadata.json"))
        about = {**_facts(json.loads(archive.read("config.json"))), **about}
        with archive.open("model.weights.h5") as file:
            return about, _in_hdf5(file)


def _in_hdf5(file):
    import h5py

    found = []

    def visit(name, item):
        if isinstance(item, h5py.Dataset):
            found.append((name, item.shape, item.dtype.name))

    with h5py.File(file) as opened:
        opened.visititems(visit)
    return found


def _in_preset(files):
    about, arrays = {}, []
    for path in files:
        name = os.path.basename(path)
        if name in ("metadata.json", "config.json", "task.json"):
            with open(path) as file:
                about.update(_facts(json.load(file)))
        elif name.endswith(".h5"):
            arrays += _in_hdf5(path)
        elif name.endswith(".safetensors"):
            arrays += _in_safetensors(path)
    return about, arrays


def _facts(described):
    """Return what is short in a JSON object, two levels deep."""
    found = {}
    for key, value in described.items():
        inside = value if isinstance(value, dict) else {"": value}
        for inner, each in inside.items():
            if isinstance(each, (str, int, float)):
                found[f"{key}.{inner}".rstrip(".")] = each
    return found
