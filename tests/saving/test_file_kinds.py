import os

import numpy as np
import pytest

from keras_weightmods.saving import container, file_kinds
from keras_weightmods.saving.container import Reader

pytestmark = pytest.mark.one_backend


def read(path):
    with Reader(path, "test.numbers", versions=(1,)):
        pass


@pytest.mark.parametrize(
    ("name", "content", "reader"),
    [
        ("model.h5", b"\x89HDF\r\n\x1a\n" + bytes(99), "`model.load_weights`"),
        ("model.gguf", b"GGUF" + bytes(99), "llama.cpp"),
        ("array.npy", b"\x93NUMPY" + bytes(99), "`numpy.load`"),
    ],
)
def test_files_of_other_kinds_are_named(name, content, reader, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"Received: .* {reader}") as caught:
        read(tmp_path / name)
    assert "header of" not in str(caught.value)


def test_archives_and_folders_are_named(tmp_path):
    np.savez(tmp_path / "arrays.npz", x=np.ones(2))
    with pytest.raises(ValueError, match=r"an \.npz file, which `numpy"):
        read(tmp_path / "arrays.npz")
    (tmp_path / "other.pt2").write_bytes(b"PK\x03\x04" + bytes(99))
    with pytest.raises(ValueError, match="a ZIP archive"):
        read(tmp_path / "other.pt2")
    (tmp_path / "task.json").touch()
    with pytest.raises(ValueError, match="a preset, which `from_preset`"):
        read(tmp_path)


def test_another_format_of_ours_is_named_with_its_reader(tmp_path):
    path = tmp_path / "file"
    container.write_arrays(path, "keras_weightmods.patch", 1, {"x": np.ones(2)})
    expected = "'keras_weightmods.patch', which `keras_weightmods.Patch.load`"
    with pytest.raises(ValueError, match=expected):
        Reader(path, "keras_weightmods.model", (1,))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_the_kind_of_a_pipe_is_told_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert file_kinds.kind_of(tmp_path / "pipe") == ("no regular file", "")
