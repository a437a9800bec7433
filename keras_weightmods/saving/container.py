"""A file of named arrays that is checked fully before anything is used.

The layout is that of safetensors (https://github.com/huggingface/safetensors):
the length of a JSON header as eight bytes, the header with the dtype, shape
and place of each array, the bytes of the arrays. So its readers open these
files. The header's `__metadata__` tells beside the format and its version the
SHA-256 of each array and of the header.

Arrays are written and read one at a time. Nothing in a file is code.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
import secrets

import ml_dtypes
import numpy as np

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
# JSON becomes some thirty times larger in memory. About 40,000 entries fit.
_MAX_HEADER = 16 * 2**20
_MAX_RANK = 32
_CHUNK = 4 * 2**20
_NO_HASH = "0" * 64
_HASH = re.compile("[0-9a-f]{64}")
_NAME_RULE = "must have a name of 1 to 1024 printable characters"
_METADATA_KEYS = {"format", "version", "sha256", "header_sha256"}


@dataclasses.dataclass(frozen=True)
class Entry:
    """What a file says of one array.

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


def numpy_dtype(name):
    """The NumPy dtype that Keras calls `name`, `"bfloat16"` among them."""
    return np.dtype(getattr(ml_dtypes, name, name))


class Writer:
    """Writes a file of named arrays; the file appears whole or not at all.

    A context manager. The arrays are written in any order, each at its place,
    to a file beside `path`, which replaces `path` when all are written. On an
    error nothing is left behind, and a file that was there stays.

    Args:
        path: String or path, of the file to write.
        format: String, what the file holds.
        version: Int, of that format.
        entries: Dict from name to `Entry`: all that will be written.

    Example:

    ```python
    import os
    import tempfile
    import numpy as np
    from keras_weightmods.saving.container import Entry, Reader, Writer

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "numbers.safetensors")
        entries = {"one": Entry((2, 3), "float32")}
        with Writer(path, "my numbers", 1, entries) as writer:
            writer.write("one", np.ones((2, 3), "float32"))
        with Reader(path, "my numbers", versions=(1,)) as reader:
            assert reader.read("one").sum() == 6
    ```
    """

    def __init__(self, path, format, version, entries):
        # Not the link itself, should it be one.
        self.path = os.path.realpath(path)
        self.entries = dict(entries)
        # The widest first, as safetensors does: each array is then aligned.
        order = sorted(
            self.entries,
            key=lambda name: -numpy_dtype(self.entries[name].dtype).itemsize,
        )
        self._offsets = {}
        offset = 0
        for name in order:
            if not _is_name(name):
                raise ValueError(f"An entry {_NAME_RULE}. Received: {name!r}")
            self._offsets[name] = offset
            offset += self.entries[name].size
        self._size = offset
        self._hashes = dict.fromkeys(order, _NO_HASH)
        self._missing = set(order)
        self._metadata = {"format": format, "version": str(version)}
        self._start = len(self._header(_NO_HASH))
        if self._start > _MAX_HEADER:
            raise ValueError(
                f"A header may take {_MAX_HEADER} bytes. Received: "
                f"{len(order)} entries, whose header takes {self._start}"
            )

    def __enter__(self):
        folder, name = os.path.split(self.path)
        # Not by `tempfile`, which makes files that only their owner may read.
        self._temporary = os.path.join(
            folder, f".{name}.{secrets.token_hex(8)}.tmp"
        )
        self._file = open(self._temporary, "xb")
        try:
            self._file.truncate(self._start + self._size)
        except BaseException:
            self._discard()
            raise
        return self

    def write(self, name, array):
        """Writes the array of one entry, once."""
        entry = self.entries[name]
        array = np.asarray(array)
        if (array.shape, array.dtype) != (
            entry.shape,
            numpy_dtype(entry.dtype),
        ):
            raise ValueError(
                f"Entry {name!r} must be an array of shape {entry.shape} and "
                f"dtype {entry.dtype}. Received: shape={array.shape}, "
                f"dtype={array.dtype}"
            )
        view = _bytes_of(np.ascontiguousarray(array))
        self._file.seek(self._start + self._offsets[name])
        self._file.write(view)
        self._hashes[name] = hashlib.sha256(view).hexdigest()
        self._missing.remove(name)

    def __exit__(self, kind, error, traceback):
        try:
            if kind is None:
                if self._missing:
                    raise ValueError(
                        "Every entry must be written. Missing: "
                        f"{sorted(self._missing)}"
                    )
                checksum = hashlib.sha256(self._header(_NO_HASH)).hexdigest()
                self._file.seek(0)
                self._file.write(self._header(checksum))
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                os.replace(self._temporary, self.path)
        finally:
            self._discard()

    def _discard(self):
        self._file.close()
        if os.path.exists(self._temporary):
            os.remove(self._temporary)

    def _header(self, checksum):
        metadata = {
            **self._metadata,
            "sha256": json.dumps(self._hashes),
            "header_sha256": checksum,
        }
        header = {"__metadata__": metadata}
        for name, offset in self._offsets.items():
            entry = self.entries[name]
            header[name] = {
                "dtype": DTYPES[entry.dtype],
                "shape": entry.shape,
                "data_offsets": [offset, offset + entry.size],
            }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


class Reader:
    """Reads a file of named arrays, after all of it has been checked.

    A context manager. See `Writer` for an example.

    Args:
        path: String or path, of the file to read.
        format: String, what the file must hold.
        versions: Tuple of ints, the versions of that format to accept.

    Attributes:
        entries: Dict from name to `Entry`, in the order of the header.

    Raises:
        ValueError: If anything in the file is not as it should be: its
            sizes, the header, format and version, names, dtypes, shapes and
            places of the entries, gaps, overlaps and trailing bytes, hashes.
            The message names the entry.
        OSError: If the file cannot be read.
    """

    def __init__(self, path, format, versions):
        self.path = os.fspath(path)
        self._file = open(path, "rb")  # noqa: SIM115
        try:
            self._read_header(format, versions)
            self._check_hashes()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    def read(self, name):
        """Returns the array of one entry, in memory of its own."""
        entry = self.entries[name]
        array = np.empty(entry.shape, numpy_dtype(entry.dtype))
        view = _bytes_of(array)
        self._file.seek(self._start + self._offsets[name])
        if self._file.readinto(view) != len(view):
            raise self.error(name, "ends early: the file was changed meanwhile")
        return array

    def read_json(self, name):
        """Returns what an entry of bytes holds as JSON."""
        if self.entries[name].dtype != "uint8":
            raise self.error(name, "must be bytes, dtype U8")
        try:
            return _parse_json(self.read(name).tobytes())
        except ValueError as error:
            raise self.error(name, f"must be JSON ({error})") from error

    def error(self, name, reason):
        """A `ValueError` to raise: what is wrong with an entry."""
        return self._error(f"Entry {name!r} {reason}")

    def _error(self, reason):
        return ValueError(
            f"{reason}. The file is truncated, altered or of another kind: "
            f"get or save it again. Received: path={self.path!r}"
        )

    def _header_error(self, reason):
        return self._error(f"The header {reason}")

    def _read_header(self, format, versions):
        file_size = os.fstat(self._file.fileno()).st_size
        prefix = self._file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(file_size - 8, _MAX_HEADER):
            raise self._header_error(
                f"must take at most {_MAX_HEADER} bytes and lie in the file "
                f"of {file_size} bytes, and would take {length}"
            )
        text = self._file.read(length)
        try:
            header = _parse_json(text)
        except ValueError as error:
            raise self._header_error(f"must be JSON ({error})") from error
        if not isinstance(header, dict):
            raise self._header_error("must be a JSON object")
        metadata = header.pop("__metadata__", None)
        self._check_metadata(metadata, format, versions)
        self._start = 8 + length
        self._set_entries(header, file_size - self._start)
        self._set_hashes(metadata)
        checksum = metadata["header_sha256"]
        plain = text
        if _HASH.fullmatch(checksum):
            plain = text.replace(checksum.encode(), _NO_HASH.encode())
        if hashlib.sha256(prefix + plain).hexdigest() != checksum:
            raise self._header_error("does not have the SHA-256 that it tells")

    def _check_metadata(self, metadata, format, versions):
        if not isinstance(metadata, dict) or metadata.get("format") != format:
            raise self._header_error(
                f"must tell the format {format!r} in its metadata"
            )
        version = metadata.get("version")
        if version not in [str(each) for each in versions]:
            raise self._header_error(
                f"must tell a version of {list(versions)}, and tells "
                f"{version!r}: a later release of keras_weightmods may read it"
            )
        if set(metadata) != _METADATA_KEYS or not all(
            isinstance(value, str) for value in metadata.values()
        ):
            raise self._header_error(
                f"must have strings for {sorted(_METADATA_KEYS)} as metadata"
            )

    def _set_entries(self, header, data_size):
        self.entries = {}
        self._offsets = {}
        ends = []
        for name, tells in header.items():
            if not _is_name(name):
                raise self.error(name[:80], _NAME_RULE)
            try:
                entry, begin, end = _parse_entry(tells)
                if end > data_size:
                    raise ValueError(
                        f"ends at byte {end} of {data_size}, so the file is "
                        "too short"
                    )
            except ValueError as error:
                raise self.error(name, str(error)) from error
            self.entries[name] = entry
            self._offsets[name] = begin
            ends.append((begin, end, name))
        expected = 0
        for begin, end, name in sorted(ends):
            if begin != expected:
                raise self.error(
                    name,
                    f"must begin at byte {expected}, where the one before "
                    f"ends, and begins at {begin}",
                )
            expected = end
        if expected != data_size:
            raise self._error(
                f"The last entry ends at byte {expected}, and "
                f"{data_size - expected} bytes follow that belong to none"
            )

    def _set_hashes(self, metadata):
        try:
            hashes = _parse_json(metadata["sha256"])
        except ValueError as error:
            raise self._header_error(
                f"must tell the SHA-256 as JSON ({error})"
            ) from error
        valid = isinstance(hashes, dict) and all(
            isinstance(each, str) and _HASH.fullmatch(each)
            for each in hashes.values()
        )
        if not valid or set(hashes) != set(self.entries):
            raise self._header_error("must tell one SHA-256 for each entry")
        self._hashes = hashes

    def _check_hashes(self):
        chunk = memoryview(bytearray(_CHUNK))
        for name, entry in self.entries.items():
            self._file.seek(self._start + self._offsets[name])
            digest = hashlib.sha256()
            rest = entry.size
            while rest:
                part = chunk[: min(rest, _CHUNK)]
                if self._file.readinto(part) != len(part):
                    raise self.error(name, "ends early")
                digest.update(part)
                if entry.dtype == "bool" and np.max(part) > 1:
                    raise self.error(name, "has other values than 0 and 1")
                rest -= len(part)
            if digest.hexdigest() != self._hashes[name]:
                raise self.error(
                    name, "does not have the SHA-256 that the header tells"
                )


def _is_name(name):
    return 0 < len(name) <= 1024 and name.isprintable()


def _parse_entry(tells):
    """Triple of `Entry`, begin and end, from what a header tells of it."""
    keys = {"dtype", "shape", "data_offsets"}
    if not isinstance(tells, dict) or set(tells) != keys:
        raise ValueError(f"must tell {sorted(keys)}")
    dtype = tells["dtype"]
    if not isinstance(dtype, str) or dtype not in _NAMES:
        raise ValueError(f"has the unknown dtype {str(dtype)[:40]!r}")
    shape = tells["shape"]
    if not _are_sizes(shape) or len(shape) > _MAX_RANK:
        raise ValueError(
            f"must have a shape of at most {_MAX_RANK} ints from 0"
        )
    offsets = tells["data_offsets"]
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError("must tell two offsets, ints from 0")
    entry = Entry(tuple(shape), _NAMES[dtype])
    begin, end = offsets
    if end - begin != entry.size:
        raise ValueError(
            f"must take {entry.size} bytes, being of shape {shape} and dtype "
            f"{dtype}, and takes {end - begin}"
        )
    return entry, begin, end


def _are_sizes(value):
    # Below 2**63 even where one of them is 0: NumPy takes no larger shapes.
    return (
        isinstance(value, list)
        and all(type(each) is int and each >= 0 for each in value)
        and math.prod(each or 1 for each in value) < 2**59
    )


def _bytes_of(array):
    return memoryview(array.reshape(-1).view("uint8"))


def _parse_json(text):
    def unique(pairs):
        once = dict(pairs)
        if len(once) != len(pairs):
            raise ValueError("a key appears twice in an object")
        return once

    if isinstance(text, bytes):
        text = text.decode()
    try:
        return json.loads(text, object_pairs_hook=unique)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
