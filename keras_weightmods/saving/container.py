"""A file of named arrays that is checked as a whole before it is used.

Models, deltas and signatures are kept in such files. The layout is that of
safetensors (https://github.com/huggingface/safetensors). The length of a JSON
header comes first, as eight bytes. The header has the dtype, shape and offsets
of each array, whose bytes follow. Its `__metadata__` records the format, the
version, and the SHA-256 of each array and of the header itself.

The safetensors library checks the layout of a file. Its functions take all
arrays at once to write, and map the file to read. A program does not survive if
a mapped file is cut meanwhile. So here arrays are written and read one at a
time. Nothing in a file is code.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import os
import threading
from typing import Any

import numpy as np
import safetensors

from keras_weightmods.saving.atomic_file import check_filepath, replacing
from keras_weightmods.saving.bounded_json import parse_json
from keras_weightmods.saving.file_kinds import MAX_HEADER, READERS, kind_of
from keras_weightmods.utils import checks, parallel
from keras_weightmods.utils.dtypes import numpy_dtype

# Keras' name of a dtype -> that of safetensors: all that an entry may have.
DTYPES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
    "uint32": "U32",
    "int32": "I32",
    "uint64": "U64",
    "int64": "I64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "bfloat16": "BF16",
    "float16": "F16",
    "float32": "F32",
    "float64": "F64",
}
_NAMES = {code: name for name, code in DTYPES.items()}
_MAX_RANK = 32
_CHUNK = 4 * 2**20
_NO_CHECKSUM = "0" * 64
_NAME_RULE = "a name of 1 to 1024 printable characters"


@dataclasses.dataclass(frozen=True)
class Entry:
    """The shape and dtype of one array.

    Attributes:
        shape: Tuple of ints.
        dtype: String, as Keras names it.
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def size(self):
        """Int, in bytes."""
        return math.prod(self.shape) * numpy_dtype(self.dtype).itemsize


def is_shape(value):
    """Return whether a value from a file is the shape of an array.

    Few axes first: the product of many takes long.
    """
    return (
        isinstance(value, list)
        and len(value) <= _MAX_RANK
        and all(type(n) is int and 0 <= n < 2**48 for n in value)
        and math.prod(n or 1 for n in value) < 2**59
    )


def write_arrays(filepath, format, version, arrays, overwrite=True):
    """Write a file of a dict of arrays; see `write`."""
    entries = {
        name: Entry(array.shape, array.dtype.name)
        for name, array in arrays.items()
    }
    write(filepath, format, version, entries, arrays.items(), overwrite)


def write(filepath, format, version, entries, arrays, overwrite=True):
    """Write a file of named arrays, which appears whole or not at all.

    Each array is written at its place in a file beside `filepath`, which
    replaces `filepath` once all are written. On an error nothing is left
    behind, and a file that was there stays.

    Args:
        filepath: String or path, of the file to write.
        format: String, what the file holds.
        version: Int, of that format.
        entries: Dict from name to `Entry`: all that will be written.
        arrays: Iterable of pairs of a name and its array, or an iterator of
            the arrays that are its parts, one after another. In any order.
        overwrite: Bool, whether to replace a file. Defaults to `True`.

    Raises:
        ValueError: If `filepath` is no place for a file, the entries have a
            name or dtype that a file cannot hold, or are too many, or the
            arrays are others than the entries.
        FileExistsError: If there is a file and `overwrite` is False.

    Example:

    ```python
    import os
    import tempfile
    import numpy as np
    from keras_weightmods.saving.container import Entry, Reader, write

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "numbers.safetensors")
        entries = {"one": Entry((2, 3), "float32")}
        arrays = [("one", np.ones((2, 3), "float32"))]
        write(path, "my numbers", 1, entries, arrays)
        with Reader(path, "my numbers", versions=(1,)) as reader:
            assert reader.read("one").sum() == 6
    ```
    """
    filepath = check_filepath(filepath, overwrite)
    for name, entry in entries.items():
        if not _is_name(name) or entry.dtype not in DTYPES:
            raise ValueError(
                f"An entry must have {_NAME_RULE} and one of the dtypes "
                f"{', '.join(DTYPES)}. Received: {name!r} of dtype "
                f"{entry.dtype}"
            )
    # The widest first, as safetensors does: each array is then aligned.
    width = {n: numpy_dtype(e.dtype).itemsize for n, e in entries.items()}
    order = sorted(entries, key=width.__getitem__, reverse=True)
    ends = [*itertools.accumulate(entries[name].size for name in order)]
    places = dict(zip(order, zip([0, *ends], ends)))
    checksums = dict.fromkeys(order, _NO_CHECKSUM)

    def header(checksum):
        metadata = {
            "format": format,
            "version": str(version),
            "sha256": json.dumps(checksums),
            "header_sha256": checksum,
        }
        fields: dict[str, Any] = {"__metadata__": metadata}
        for name, place in places.items():
            entry = entries[name]
            row = DTYPES[entry.dtype], entry.shape, place
            fields[name] = dict(zip(("dtype", "shape", "data_offsets"), row))
        text = json.dumps(fields).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    begin = len(header(_NO_CHECKSUM))
    if begin > MAX_HEADER:
        raise ValueError(
            f"A header may take {MAX_HEADER} bytes. Received: {len(order)} "
            f"entries, whose header takes {begin}"
        )
    with replacing(filepath) as temporary, open(temporary, "xb") as file:
        for name, array in arrays:
            if name not in places:
                raise ValueError(f"There is no entry for an array {name!r}")
            start, end = places[name]
            file.seek(begin + start)
            checksums[name] = _write_one(file, name, entries[name], array)
            if file.tell() != begin + end:
                raise ValueError(
                    f"Entry `{name}` must be given whole, {end - start} bytes. "
                    f"Received: {file.tell() - begin - start} bytes"
                )
        missing = [name for name in order if checksums[name] == _NO_CHECKSUM]
        if missing:
            raise ValueError(f"Not all is written. Missing: {missing[:5]}")
        checksum = hashlib.sha256(header(_NO_CHECKSUM)).hexdigest()
        file.seek(0)
        file.write(header(checksum))
        file.flush()
        os.fsync(file.fileno())


def _write_one(file, name, entry, array):
    """Write an array, or an iterator of its parts; return its checksum."""
    digest = hashlib.sha256()
    if hasattr(array, "dtype"):
        if Entry(array.shape, array.dtype.name) != entry:
            raise ValueError(
                f"Entry `{name}` must be an array of shape {entry.shape} and "
                f"dtype {entry.dtype}. Received: shape={array.shape}, "
                f"dtype={array.dtype}"
            )
        array = [array]
    for part in array:
        view = _bytes_of(np.ascontiguousarray(part))
        file.write(view)
        digest.update(view)
    return digest.hexdigest()


class Reader:
    """Read a file of named arrays, after all of it has been checked.

    A context manager. See `write` for an example.

    Args:
        filepath: String or path, of the file to read.
        format: String, what the file must hold.
        versions: Tuple of ints, the versions of that format to accept.
        see: Callable, called with the name of each entry that is checked, and
            the number of all. Defaults to none.
        checked: Names of the entries whose data are checked, where they are
            there; call `check_data()` before other data are used. Defaults to
            `None`, for all.

    Attributes:
        entries: Dict from name to `Entry`, in the order of the header.

    Raises:
        ValueError: If anything in the file is not as it should be: its
            size, the header, format and version, names, dtypes, shapes and
            offsets of the entries, checksums. The message has the path, and
            the entry where there is one.
        OSError: If the file cannot be read.
    """

    def __init__(
        self,
        filepath,
        format,
        versions,
        see=lambda name, count: None,
        checked=None,
    ):
        self.filepath = checks.check_path("filepath", filepath)
        self._format = format
        self._see = see
        # Held from a seek until what is there is read.
        self._reading = threading.Lock()
        kind, call = kind_of(filepath)
        if kind and kind != f"a file of {format!r}":
            raise self._other(f"{kind}, which {call} reads" if call else kind)
        self._file = open(filepath, "rb")  # noqa: SIM115
        try:
            self._expected = self._check_header(versions)
            self.check_data(
                checked and [name for name in checked if name in self.entries]
            )
        except BaseException:
            self._file.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def close(self):
        """Close the file."""
        self._file.close()

    def read(self, name):
        """Return the array of one entry, in memory of its own."""
        shape = self.entries[name].shape
        return self.read_part(name, 0, math.prod(shape)).reshape(shape)

    def read_part(self, name, start, stop):
        """Return the entries from `start` to `stop` of an array flattened."""
        array = np.empty(stop - start, numpy_dtype(self.entries[name].dtype))
        place = self._start + self._offsets[name] + start * array.itemsize
        self._read_into(_bytes_of(array), place, name)
        return array

    def read_json(self, name):
        """Return the value of an entry that holds JSON; see `json_array`."""
        if name not in self.entries:
            raise self.error(name, "is missing")
        if self.entries[name].dtype != "uint8":
            raise self.error(name, "must be JSON, of dtype U8")
        try:
            return parse_json(self.read(name).tobytes())
        except ValueError as error:
            raise self.error(name, f"must be JSON ({error})") from error

    def error(self, name, reason):
        """Return a `ValueError` to raise: what is wrong with an entry."""
        return self._error(f"Entry `{name}` {reason}")

    def _error(self, reason):
        return ValueError(
            f"{checks.cut(reason, 1200)}. The file is truncated, altered or of "
            "another kind: get or save it again. Received: "
            f"filepath={checks.shown(self.filepath)}"
        )

    def _other(self, kind):
        """Return a `ValueError` to raise: the file is of another kind."""
        reader = READERS.get(self._format, "this")
        return ValueError(
            f"A file of {self._format!r} was expected, for {reader}. "
            f"Received: filepath={checks.shown(self.filepath)}, {kind}"
        )

    def _check_header(self, versions):
        """Set the entries and return their checksums."""
        prefix, size = self._file.read(8), os.path.getsize(self.filepath)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(size - 8, MAX_HEADER):
            raise self._error(
                f"The header of {length} bytes must take at most {MAX_HEADER} "
                f"bytes, and lie within the {size} bytes of the file"
            )
        text = self._file.read(length)
        try:
            header = parse_json(text)
            # Compares the header with the file's size, and reads no array.
            with safetensors.safe_open(self.filepath, framework="np"):
                pass
        except (safetensors.SafetensorError, ValueError) as error:
            raise self._error(
                f"The header is not valid ({str(error)[:300]})"
            ) from error
        metadata = header.pop("__metadata__", None) or {}
        found, version = metadata.get("format"), metadata.get("version")
        if not {"sha256", "header_sha256"} <= metadata.keys():
            raise self._other("a safetensors file of another program")
        if found != self._format or version not in [*map(str, versions)]:
            raise self._error(
                f"The header does not state format {self._format!r} of a "
                f"version in {list(versions)}, but {checks.shown(found)}, "
                f"version {checks.shown(version)}: a later release of "
                "keras_weightmods may read it"
            )
        checksum = metadata["header_sha256"]
        if len(checksum) == len(_NO_CHECKSUM):
            text = text.replace(checksum.encode(), _NO_CHECKSUM.encode())
        if hashlib.sha256(prefix + text).hexdigest() != checksum:
            raise self._error("The checksum of the header does not match")
        self._start = 8 + length
        self.entries = {}
        self._offsets = {}
        for name, fields in header.items():
            if not _is_name(name):
                raise self.error(name[:80], f"must have {_NAME_RULE}")
            # The library is more lenient, and NumPy takes no larger shapes,
            # even where one of the sizes is 0.
            if not (
                isinstance(fields, dict)
                and isinstance(fields["dtype"], str)
                and fields["dtype"] in _NAMES
                and is_shape(fields["shape"])
            ):
                raise self.error(
                    name,
                    f"must have one of the dtypes {', '.join(_NAMES)}, and a "
                    f"shape of at most {_MAX_RANK} sizes below 2**48",
                )
            shape = tuple(fields["shape"])
            self.entries[name] = Entry(shape, _NAMES[fields["dtype"]])
            self._offsets[name] = fields["data_offsets"][0]
        try:
            checksums = parse_json(metadata["sha256"])
        except ValueError:
            checksums = None
        if not isinstance(checksums, dict) or set(checksums) != set(header):
            raise self._error(
                "The header must have one checksum for each entry"
            )
        return checksums

    def check_data(self, names=None):
        """Raise ValueError if the data of entries lack their checksums.

        Args:
            names: List of strings, the entries. Defaults to all.
        """
        names = list(self.entries if names is None else names)
        for _, name in zip(parallel.map_ahead(self._check, names), names):
            self._see(name, len(self.entries))

    def _check(self, name):
        """Raise ValueError if the data of an entry lack their checksum."""
        entry, digest = self.entries[name], hashlib.sha256()
        chunk = memoryview(bytearray(min(entry.size, _CHUNK)))
        place = self._start + self._offsets[name]
        end = place + entry.size
        while place < end:
            part = chunk[: min(end - place, _CHUNK)]
            self._read_into(part, place, name)
            digest.update(part)
            if entry.dtype == "bool" and np.max(part) > 1:
                raise self.error(name, "has values other than 0 and 1")
            place += len(part)
        if digest.hexdigest() != self._expected[name]:
            raise self._error(f"The checksum of `{name}` does not match")

    def _read_into(self, view, place, name):
        with self._reading:
            self._file.seek(place)
            if self._file.readinto(view) != len(view):
                raise self.error(name, "ends early")


def _is_name(name):
    return 0 < len(name) <= 1024 and name.isprintable()


def _bytes_of(array):
    return memoryview(array.reshape(-1).view("uint8"))
