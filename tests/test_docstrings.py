"""Runs the example of every public docstring."""

import importlib
import inspect
import pathlib
import pkgutil
import re
import textwrap

import pytest

import keras_weightmods
from tests.test_package import PUBLIC


def examples():
    found = {}
    modules = [keras_weightmods] + [
        importlib.import_module(info.name)
        for info in pkgutil.walk_packages(
            keras_weightmods.__path__, "keras_weightmods."
        )
        # The native libraries look like modules.
        if ".backend." not in info.name and ".kwm_" not in info.name
    ]
    for module in modules:
        for name, value in vars(module).items():
            if name.startswith("_") or not (
                inspect.isclass(value) or inspect.isfunction(value)
            ):
                continue
            if value.__module__.startswith("keras_weightmods"):
                found[f"{value.__module__}.{value.__qualname__}"] = value
    return found


def code_blocks(text):
    return [
        textwrap.dedent(block)
        for block in re.findall(r"```python\n(.*?)```", text or "", re.DOTALL)
    ]


@pytest.mark.parametrize("name", sorted(examples()))
@pytest.mark.filterwarnings("ignore:AdamS. this schedule")
def test_example_runs(name):
    blocks = code_blocks(inspect.getdoc(examples()[name]))
    if not blocks:
        pytest.skip("no example in the docstring")
    for block in blocks:
        exec(compile(block, name, "exec"), {})


def test_public_names_have_examples():
    missing = [
        name
        for name, value in PUBLIC.items()
        if not code_blocks(inspect.getdoc(value))
    ]
    # What users receive, never make; and what `pack_bits` has in its example.
    received = ("Report", "Target", "Targets")
    missing = [name for name in missing if not name.endswith(received)]
    assert missing == ["ops.unpack_bits"]


def test_readme_examples_run(tmp_path, monkeypatch):
    readme = pathlib.Path(__file__).absolute().parent.parent / "README.md"
    monkeypatch.chdir(tmp_path)
    for block in code_blocks(readme.read_text()):
        exec(compile(block, "README.md", "exec"), {})
