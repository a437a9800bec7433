"""What a file or folder is, and what reads it."""

import os

import safetensors

from keras_weightmods.saving.bounded_json import check_json

# What reads the files of this package, by format.
READERS = {
    "keras_weightmods.model": "`keras_weightmods.load_model`",
    "keras_weightmods.patch": "`keras_weightmods.Patch.load`",
}
# No header of MAX_HEADER has this length.
_ZIP = b"PK\x03\x04"
# What files of other kinds are, and what reads them, by how they begin or, for
# ZIP archives, by how they are named.
_OTHERS = (
    (b"\x89HDF\r\n\x1a\n", "", "an HDF5 file", "`model.load_weights`"),
    (_ZIP, ".keras", "a .keras file", "`keras.models.load_model`"),
    (_ZIP, ".npz", "an .npz file", "`numpy.load`"),
    (_ZIP, "", "a ZIP archive", ""),
    (b"\x93NUMPY", "", "a .npy file", "`numpy.load`"),
    (b"GGUF", "", "a GGUF file", "`keras_weightmods.load_gguf`"),
)
# Bytes of a header that are read: about 40,000 entries fit.
MAX_HEADER = 16 * 2**20


def kind_of(filepath):
    """Return what a file or folder is, and what reads it.

    Returns:
        Pair of strings: the kind, with an article, and the call. Empty where
        they are not known.
    """
    if os.path.isdir(filepath):
        if {"task.json", "config.json"}.isdisjoint(os.listdir(filepath)):
            return "a folder", ""
        return "a preset", "`from_preset` of KerasHub"
    if os.path.exists(filepath) and not os.path.isfile(filepath):
        # To open a pipe would wait for its other end.
        return "no regular file", ""
    with open(filepath, "rb") as file:
        start = file.read(16)
    for magic, ending, kind, reader in _OTHERS:
        if start.startswith(magic) and os.fspath(filepath).lower().endswith(
            ending
        ):
            return kind, reader
    format = metadata_of(filepath).get("format")
    if format in READERS:
        return f"a file of {format!r}", READERS[format]
    return "", ""


def metadata_of(filepath):
    """Return the metadata of a safetensors file; empty for other files."""
    try:
        with open(filepath, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            # What the length is of is not parsed if it is too long.
            if length > min(os.path.getsize(filepath), MAX_HEADER):
                return {}
            check_json(file.read(length))
        with safetensors.safe_open(filepath, framework="np") as file:
            return file.metadata() or {}
    except (safetensors.SafetensorError, OSError, ValueError):
        return {}
