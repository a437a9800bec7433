import os
import signal

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


def test_rights_are_those_of_a_new_file_or_stay(tmp_path, path):
    write(path)
    (tmp_path / "other").write_text("")
    assert os.stat(path).st_mode == os.stat(tmp_path / "other").st_mode
    path.chmod(0o640)
    write(path)
    assert os.stat(path).st_mode & 0o777 == 0o640


def test_no_pipe_is_replaced_or_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="must be a regular file"):
        write(tmp_path / "pipe")
    assert os.listdir(tmp_path) == ["pipe"]


def test_a_name_as_long_as_the_file_system_allows(tmp_path):
    write(tmp_path / ("n" * 243 + ".safetensors"))


def test_an_error_leaves_the_file_of_before(tmp_path, path):
    path.write_text("before")
    with pytest.raises(KeyboardInterrupt):
        with atomic_file.replacing(path) as temporary:
            with open(temporary, "w") as file:
                file.write("half of it")
            raise KeyboardInterrupt
    assert os.listdir(tmp_path) == ["file"]
    assert path.read_text() == "before"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a fork")
def test_what_killed_processes_left_goes_and_no_more(tmp_path, path):
    process = os.fork()
    if not process:
        with atomic_file.unfinished(tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(process, 0)
    (left,) = tmp_path.iterdir()
    with atomic_file.unfinished(tmp_path) as used:
        write(path)  # it may be another process that has just begun
        assert {p.name for p in tmp_path.iterdir()} == {
            *(left.name, os.path.basename(used), "file")
        }
        for each in (left, used):
            os.utime(each, (0, 0))
        write(path)
        assert os.path.isdir(used)
        assert not left.exists()
    assert os.listdir(tmp_path) == ["file"]


def test_a_link_stays_one(tmp_path, path):
    (tmp_path / "link").symlink_to(path)
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert path.read_text() == "new"
