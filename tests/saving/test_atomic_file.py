import os

import pytest

from keras_weightmods.saving import atomic_file

pytestmark = pytest.mark.one_backend


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file"


def write(path):
    with atomic_file.replacing(path) as temporary:
        with open(temporary, "x") as file:
            file.write("new")


def test_the_file_has_the_rights_of_any_new_file(tmp_path, path):
    write(path)
    (tmp_path / "other").write_text("")
    modes = {os.stat(tmp_path / name).st_mode for name in ("file", "other")}
    assert len(modes) == 1


def test_the_rights_of_a_file_stay(path):
    path.write_text("before")
    path.chmod(0o640)
    write(path)
    assert os.stat(path).st_mode & 0o777 == 0o640


def test_no_pipe_is_replaced_or_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="must be a regular file"):
        write(tmp_path / "pipe")
    assert os.listdir(tmp_path) == ["pipe"]


def test_a_name_as_long_as_the_file_system_allows(tmp_path):
    path = tmp_path / ("n" * 243 + ".safetensors")
    write(path)
    assert path.read_text() == "new"


def test_an_error_leaves_the_file_of_before(tmp_path, path):
    path.write_text("before")
    with pytest.raises(KeyboardInterrupt):
        with atomic_file.replacing(path) as temporary:
            with open(temporary, "w") as file:
                file.write("half of it")
            raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["file"]
    assert path.read_text() == "before"


def test_a_link_stays_one(tmp_path, path):
    (tmp_path / "link").symlink_to(path)
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert path.read_text() == "new"
