"""What a file or folder is, and what reads it."""

import os
import zipfile

import safetensors

from keras_weightmods.saving.bounded_json import check_json

# What reads the files of this package, by format.
READERS = {
    "keras_weightmods.model": "`keras_weightmods.load_model`",
    "keras_weightmods.patch": "`keras_weightmods.Patch.load`",
}
# How files of other kinds begin, what they are, and what reads them.
_OTHERS = (
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", "`model.load_weights`"),
    (b"GGUF", "a GGUF file", "llama.cpp"),
    (b"\x93NUMPY", "a .npy file", "`numpy.load`"),
)
# The same for ZIP archives, by a file that is in them.
_ARCHIVES = (
    ("model.weights.h5", "a .keras file", "`keras.models.load_model`"),
    ("archive_format", "a .pt2 file", "`torch.export.load`"),
    ("data.pkl", "a file of torch", "`torch.load`"),
    (".npy", "an .npz file", "`numpy.load`"),
)
# And for folders.
_FOLDERS = (
    ("saved_model.pb", "a SavedModel", "`tf.saved_model.load`"),
    ("task.json", "a preset", "`from_preset` of KerasHub"),
    ("config.json", "a preset", "`from_preset` of KerasHub"),
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
        names = os.listdir(filepath)
        for name, kind, reader in _FOLDERS:
            if name in names:
                return kind, reader
        return "a folder", ""
    if os.path.exists(filepath) and not os.path.isfile(filepath):
        # To open a pipe would wait for its other end.
        return "no regular file", ""
    with open(filepath, "rb") as file:
        start = file.read(16)
    for magic, kind, reader in _OTHERS:
        if start.startswith(magic):
            return kind, reader
    if start.startswith(b"PK"):
        return _kind_of_archive(filepath)
    format = metadata_of(filepath).get("format")
    if format in READERS:
        return f"a file of {format!r}", READERS[format]
    return "", ""


def _kind_of_archive(filepath):
    try:
        with zipfile.ZipFile(filepath) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError):
        return "a damaged ZIP archive", ""
    for end, kind, reader in _ARCHIVES:
        if any(name.endswith(end) for name in names):
            return kind, reader
    return "a ZIP archive", ""


def other_kind(filepath):
    """Return what `kind_of` does, in words; None if it is not known."""
    kind, reader = kind_of(filepath)
    return f"{kind}, which {reader} reads" if reader else kind or None


def metadata_of(filepath):
    """Return the metadata of a safetensors file; empty for other files."""
    # Opening a pipe would wait for its other end.
    if not os.path.isfile(filepath):
        return {}
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
