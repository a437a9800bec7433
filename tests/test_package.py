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


def run(*lines):
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)


@pytest.mark.one_backend
def test_import_brings_no_keras_and_no_backend():
    run(
        "import sys; before = set(sys.modules)",
        "import keras_weightmods",
        "new = {name.split('.')[0] for name in set(sys.modules) - before}",
        "new -= set(sys.stdlib_module_names)",
        "assert new <= {'keras_weightmods'}, new",
    )


def test_names_bring_keras_and_its_backend_alone():
    run(
        "import sys, keras; before = set(sys.modules)",
        "import keras_weightmods",
        "assert 'CAST' in vars(keras_weightmods)",
        "new = {name.split('.')[0] for name in set(sys.modules) - before}",
        "allowed = {'keras_weightmods', 'safetensors'}",
        "assert new <= allowed, new",
    )


@pytest.mark.one_backend
def test_keras_finds_the_registered_classes_in_any_order():
    find = "keras.saving.get_registered_object('keras_weightmods>AdamS')"
    run(
        "import keras_weightmods",
        "import keras",
        f"assert {find} is keras_weightmods.AdamS",
    )
    # Where a module of the package is what imports Keras.
    run(
        "from keras_weightmods.native.packed import Packed",
        "import keras, keras_weightmods",
        "keras_weightmods.find_targets",
        f"assert {find} is keras_weightmods.AdamS",
    )


@pytest.mark.one_backend
def test_to_look_for_a_module_is_not_to_import_it():
    run(
        "import sys, importlib.util, keras_weightmods",
        "assert importlib.util.find_spec('keras')",
        "import keras",
        "assert 'CAST' in vars(keras_weightmods)",
        "finders = [type(finder).__name__ for finder in sys.meta_path]",
        "assert finders.count('_Waiting') <= 2, finders",
    )


@pytest.mark.one_backend
def test_names_that_are_not_there_load_nothing():
    run(
        "import sys, keras_weightmods",
        "assert not hasattr(keras_weightmods, '__wrapped__')",
        "assert 'keras' not in sys.modules",
        "from keras_weightmods import *",
        "assert CAST is keras_weightmods.CAST",
    )


def test_unknown_names():
    with pytest.raises(AttributeError, match="Nothing"):
        _ = kwm.Nothing
    assert {*PUBLIC} >= {"CAST", "pack", "ops.nm_mask"}
    assert "CAST" in dir(kwm)


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
