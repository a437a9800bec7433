"""The public names: what an import brings, their table, their annotations."""

import inspect
import pathlib
import runpy

import pytest

import keras_weightmods as kwm
from tests.backends import run_python

DOCS = pathlib.Path(__file__).absolute().parent.parent / "docs"
API = runpy.run_path(str(DOCS / "api_table.py"))
PUBLIC = API["public_names"]()


def run(*lines):
    # Keras imports JAX in half of the time that torch takes.
    run_python("-c", "\n".join(lines), backend="jax")


@pytest.mark.one_backend
def test_import_brings_no_keras_and_no_backend():
    run(
        "import sys; before = set(sys.modules), list(sys.meta_path)",
        "import keras_weightmods",
        "new = {n.split('.')[0] for n in set(sys.modules) - before[0]}",
        "new -= set(sys.stdlib_module_names)",
        "assert new <= {'keras_weightmods'}, new",
        "assert sys.meta_path == before[1]",
        "assert not hasattr(keras_weightmods, '__wrapped__')",
        "assert 'CAST' in dir(keras_weightmods)",
        "assert 'keras' not in sys.modules",
        # A module of the package imports Keras; then a name registers all.
        "from keras_weightmods.native.packed import Packed",
        "keras_weightmods.find_targets",
        "import keras",
        "objects = keras.saving.get_custom_objects()",
        "assert 'keras_weightmods>AdamS' in objects",
    )


@pytest.mark.one_backend
def test_names_bring_keras_alone_and_register_all_classes():
    run(
        "import sys, keras; before = set(sys.modules)",
        "import keras_weightmods",
        "objects = {*keras.saving.get_custom_objects()}",
        "assert 'keras_weightmods>AdamS' in objects",
        "from keras_weightmods.core.reparameterization import KINDS",
        "kinds = {'compander', 'packed', 'scaling', 'weight_norm'}",
        "assert {*KINDS} == kinds, KINDS",
        "from keras_weightmods import *",
        "assert CAST and ops.nm_mask and plot.kernel and reports.Report",
        "new = {name.split('.')[0] for name in set(sys.modules) - before}",
        "allowed = {'keras_weightmods', 'safetensors'}",
        "assert new <= allowed, new",
        "import importlib, pkgutil",
        "for info in pkgutil.walk_packages(",
        "    keras_weightmods.__path__, 'keras_weightmods.'):",
        "    if not {'backend', 'native'} & {*info.name.split('.')}:",
        "        importlib.import_module(info.name)",
        "assert {*keras.saving.get_custom_objects()} == objects",
    )


@pytest.mark.one_backend
def test_what_an_error_tells_to_install_is_there_before_a_release():
    for file in pathlib.Path(kwm.__file__).parent.rglob("*.py"):
        assert "keras-weightmods[" not in file.read_text(), file


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("prune", "Did you mean: 'sparsify'"),
        ("find_target", "Did you mean: 'find_targets'"),
        ("PackReport", "in `keras_weightmods.reports`"),
        ("Nothing", "no attribute 'Nothing'$"),
        ("_pack", "no attribute '_pack'$"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(AttributeError, match=message):
        getattr(kwm, name)


def test_other_names():
    assert kwm.LIFT is kwm.PrincipalMaskCallback
    assert kwm.__version__.count(".") == 2
    assert {*PUBLIC} >= {"CAST", "pack", "ops.nm_mask", "reports.PackReport"}


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


def test_public_names_are_annotated():
    missing = [
        f"{name}: {function.__qualname__}({parameter.name})"
        for name, value in PUBLIC.items()
        for function in functions_of(value)
        for parameter in inspect.signature(function).parameters.values()
        if parameter.annotation is parameter.empty
        and parameter.name not in ("self", "cls")
    ]
    missing += [
        f"{name}: {function.__qualname__} returns"
        for name, value in PUBLIC.items()
        for function in functions_of(value)
        if function.__name__ != "__init__"
        and inspect.signature(function).return_annotation
        is inspect.Signature.empty
    ]
    assert not missing
