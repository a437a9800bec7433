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
    """Return the code in docstrings of functions, classes and methods."""
    found = {}
    for info in pkgutil.walk_packages(
        keras_weightmods.__path__, "keras_weightmods."
    ):
        # The native libraries look like modules.
        if ".backend." in info.name or ".kwm_" in info.name:
            continue
        for value in vars(importlib.import_module(info.name)).values():
            if getattr(value, "__module__", None) != info.name:
                continue
            methods = vars(value).values() if inspect.isclass(value) else ()
            for part in (value, *methods):
                part = getattr(part, "__func__", part)
                if blocks := code_blocks(getattr(part, "__doc__", None)):
                    found[f"{info.name}.{part.__qualname__}"] = blocks
    return found


def code_blocks(text):
    return [
        textwrap.dedent(block)
        for block in re.findall(
            r"^ *```python\n(.*?)^ *```", text or "", re.DOTALL | re.MULTILINE
        )
    ]


EXAMPLES = examples()


@pytest.mark.parametrize("name", sorted(EXAMPLES))
@pytest.mark.filterwarnings("ignore:AdamS. this schedule")
def test_example_runs(name):
    for block in EXAMPLES[name]:
        exec(compile(block, name, "exec"), {})


def test_public_names_have_examples():
    missing = [
        name for name, value in PUBLIC.items() if not code_blocks(value.__doc__)
    ]
    # What users receive, never make; and what `pack_bits` has in its example.
    received = ("Report", "Target", "Targets")
    missing = [name for name in missing if not name.endswith(received)]
    assert missing == ["ops.unpack_bits"]


@pytest.mark.parametrize("page", ["README.md", "docs/ship.md"])
@pytest.mark.filterwarnings("ignore:.*exported in dense form")
def test_examples_of_pages_run(page, tmp_path, monkeypatch):
    root = pathlib.Path(__file__).absolute().parent.parent
    monkeypatch.chdir(tmp_path)
    for block in code_blocks((root / page).read_text()):
        exec(compile(block, page, "exec"), {})
