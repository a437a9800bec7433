"""The package is installed with the compiled library, or without it."""

import importlib.util
import pathlib
import shutil
import zipfile

import pytest

from tests.backends import run_python

ROOT = pathlib.Path(__file__).parent.parent

pytestmark = [
    pytest.mark.one_backend,
    pytest.mark.skipif(
        importlib.util.find_spec("scikit_build_core") is None
        or not (ROOT / "cmake").exists(),
        reason="needs scikit-build-core and the source tree",
    ),
]


def wheel_files(folder, **environment):
    """Names of the files in a wheel built with these variables set."""
    source = folder / "source"
    shutil.copytree(
        ROOT / "keras_weightmods",
        source / "keras_weightmods",
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
    )
    (source / "cmake").mkdir()
    for name in ("cmake/CMakeLists.txt", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source / name)
    shutil.copy(ROOT / "LICENSE", source)
    code = (
        "import sys, scikit_build_core.build as backend\n"
        "backend.build_wheel(sys.argv[1])"
    )
    run_python("-c", code, folder, cwd=source, **environment)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return wheel.name, set(archive.namelist())


def test_without_a_compiler(tmp_path):
    name, files = wheel_files(tmp_path, CXX="/nonexistent/c++")
    assert "-py3-none-" in name
    assert "keras_weightmods/py.typed" in files
    # Where the public names are read from.
    assert "keras_weightmods/__init__.pyi" in files
    assert "keras_weightmods/native/__init__.py" in files
    assert not [file for file in files if file.endswith(".so")]


@pytest.mark.heavy
@pytest.mark.skipif(
    not any(map(shutil.which, ["c++", "g++", "clang++"])),
    reason="no C++ compiler",
)
def test_with_a_compiler(tmp_path):
    # Unoptimized: only what is in the wheel matters here.
    name, files = wheel_files(tmp_path, SKBUILD_CMAKE_BUILD_TYPE="Debug")
    assert "-py3-none-any" not in name
    assert "keras_weightmods/native/lib/kwm_native.so" in files
    assert not [file for file in files if file.endswith((".cc", ".h"))]
