import os
import pathlib
import re
import shutil
import subprocess

import pytest

from keras_weightmods import native
from tests.backends import run_python

pytestmark = pytest.mark.one_backend

FOLDER = pathlib.Path(native.__file__).parent / "lib"
NAME = "kwm_native.dll" if os.name == "nt" else "kwm_native.so"


def reason_in(folder, **environment):
    """What a copy of the module, with the library in `folder`, says."""
    shutil.copy(native.__file__, folder.parent / "native_copy.py")
    code = (
        "import native_copy as native\n"
        "assert native.is_available() == (native.library() is not None)\n"
        "assert native.is_available() == (not native.reason_unavailable())\n"
        "print(native.reason_unavailable())\n"
    )
    return run_python("-c", code, cwd=folder.parent, **environment).strip()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "lib").mkdir()
    return tmp_path / "lib"


@pytest.mark.skipif(not native.is_available(), reason="no library")
def test_available_and_switched_off(folder):
    shutil.copy(FOLDER / NAME, folder)
    assert reason_in(folder) == ""
    reason = reason_in(folder, KERAS_WEIGHTMODS_NATIVE="0")
    assert "KERAS_WEIGHTMODS_NATIVE is 0" in reason


def test_missing(folder):
    # What lies beside it, and belongs to other systems, is no library.
    for other in {"kwm_native.lib", "kwm_native.so", "kwm_native.dll"} - {NAME}:
        (folder / other).touch()
    reason = reason_in(folder)
    assert "no C++ compiler" in reason
    assert "pip install" in reason


def test_not_a_library(folder):
    (folder / NAME).write_text("no library")
    assert "cannot be loaded" in reason_in(folder)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ('extern "C" int kwm_abi_version() { return 99; }', "version 99"),
        ("int other;", "cannot be loaded: .*kwm_abi_version"),
    ],
)
def test_of_another_release(folder, source, reason):
    (folder / "other.cc").write_text(source)
    subprocess.run(
        ["g++", "-shared", "-fPIC", "other.cc", "-o", NAME],
        cwd=folder,
        check=True,
    )
    assert re.search(reason, reason_in(folder))
