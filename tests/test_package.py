"""The public names: what an import brings, their table, their annotations."""

import inspect
import pathlib
import runpy
import subprocess
import sys

import pytest

import keras_weightmods as kwm

DOCS = pathlib.Path(__file__).absolute().parent.parent / "docs"
API = runpy.run_path(str(DOCS / "api_table.py"))
PUBLIC = API["public_names"]()


def test_import_brings_keras_and_its_backend_alone():
    code = (
        "import sys, keras; before = set(sys.modules)\n"
        "import keras_weightmods\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "assert new <= {'keras_weightmods', 'safetensors'}, new\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_version():
    assert kwm.__version__.count(".") == 2


def test_table_of_public_names_is_up_to_date():
    page = (DOCS / "api.md").read_text()
    assert page == API["make_page"](), "run `python docs/api_table.py`"


def functions_of(value):
    """A function, or the public methods and properties that a class defines."""
    if not inspect.isclass(value):
        yield value
        return
    for name, member in vars(value).items():
        if name.startswith("_") and name not in ("__init__", "__call__"):
            continue
        if isinstance(member, property):
            member = member.fget
        member = getattr(member, "__func__", member)
        if inspect.isfunction(member) and member.__module__.startswith(
            "keras_weightmods"
        ):
            yield member


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_are_annotated(name):
    for function in functions_of(PUBLIC[name]):
        signature = inspect.signature(function)
        missing = [
            parameter.name
            for parameter in signature.parameters.values()
            if parameter.annotation is parameter.empty
            and parameter.name not in ("self", "cls")
        ]
        empty = signature.return_annotation is signature.empty
        if empty and function.__name__ != "__init__":
            missing.append("return")
        assert not missing, f"{function.__qualname__}: {missing}"
