import os

import numpy as np
import pytest

from keras_weightmods.saving import container, file_kinds

pytestmark = pytest.mark.one_backend


@pytest.mark.parametrize(
    ("name", "content", "kind"),
    [
        ("model.h5", b"\x89HDF\r\n\x1a\n", "`model.load_weights`"),
        ("model.gguf", b"GGUF", "load_gguf"),
        ("array.npy", b"\x93NUMPY", "`numpy.load`"),
        ("arrays.npz", b"PK\x03\x04", r"an \.npz file, which `numpy"),
        ("other.pt2", b"PK\x03\x04", "a ZIP archive"),
        ("task.json", None, "a preset, which `from_preset`"),
        ("pipe", None, "no regular file|not that of a regular file"),
        ("patch", None, "'keras_weightmods.patch', which .*Patch.load`"),
    ],
)
def test_files_of_other_kinds_are_named(name, content, kind, tmp_path):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content + bytes(99))
    elif name == "task.json":
        path.touch()
        path = tmp_path
    elif name == "pipe":
        os.mkfifo(path)  # To open it would wait for its other end.
        assert file_kinds.kind_of(path) == ("no regular file", "")
    else:
        arrays = {"x": np.ones(2)}
        container.write_arrays(path, "keras_weightmods.patch", 1, arrays)
    with pytest.raises(ValueError, match=kind) as caught:
        container.Reader(path, "keras_weightmods.model", (1,))
    assert "header of" not in str(caught.value)


def test_the_length_of_a_header_is_no_magic_number(tmp_path):
    path = tmp_path / "model"
    path.write_bytes(int.from_bytes(b"PK", "little").to_bytes(8, "little"))
    assert file_kinds.kind_of(path) == ("", "")
