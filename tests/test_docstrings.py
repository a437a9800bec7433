"""Runs the examples of all public docstrings, and of the pages."""

import importlib
import inspect
import pathlib
import pkgutil
import re
import sys
import textwrap

import keras
import pytest

import keras_weightmods
from keras_weightmods.utils import progress
from tests.exporting import test_load_gguf as gguf_files
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


@pytest.fixture(autouse=True)
def close_pictures():
    yield
    if pyplot := sys.modules.get("matplotlib.pyplot"):
        pyplot.close("all")


@pytest.mark.one_backend
@pytest.mark.parametrize("name", sorted(EXAMPLES))
@pytest.mark.filterwarnings("ignore:AdamS. this schedule")
def test_example_runs(name):
    for block in EXAMPLES[name]:
        exec(compile(block, name, "exec"), {})


@pytest.mark.one_backend
def test_public_names_have_examples():
    missing = [
        name for name, value in PUBLIC.items() if not code_blocks(value.__doc__)
    ]
    # What users receive, never make; and what `pack_bits` has in its example.
    received = ("Report", "Target", "Targets")
    missing = [name for name in missing if not name.endswith(received)]
    assert missing == ["ops.unpack_bits"]


ROOT = pathlib.Path(__file__).absolute().parent.parent
# A block of code, and the block of text behind it: what it prints.
STEP = re.compile(
    r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?",
    re.DOTALL | re.MULTILINE,
)
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
# Their blocks share what they have named.
TUTORIALS = ROOT / "docs" / "tutorials"
# They train for longer than a test should take.
LONG = "finetune", "train_jax", "vision"
FRAMEWORK = re.compile("^import (jax|torch)$", re.MULTILINE)


def cases():
    """Pages with the steps that are run: what imports a framework, on it."""
    for page in PAGES:
        text = page.read_text()
        steps, is_tutorial = STEP.findall(text), page.parent == TUTORIALS
        needs = [
            (found := FRAMEWORK.search(text if is_tutorial else code))
            and found[1]
            for code, _ in steps
        ]
        for name in sorted({*needs}, key=str):
            # They use what the docstrings' examples do.
            marks = [pytest.mark.one_backend]
            if name is not None:
                other = keras.backend.backend() != name
                marks = [pytest.mark.skipif(other, reason=f"runs on {name}")]
            if page.stem in LONG:
                marks.append(pytest.mark.heavy)
            own = [s for s, need in zip(steps, needs) if need == name]
            case = f"{page.stem}-{name}" if name else page.stem
            yield pytest.param(page, own, id=case, marks=marks)


def words(text, number):
    """Return the words of a text, what `number` makes of decimals for them."""
    return [
        number(word) if re.fullmatch(r"\d+\.\d+", word) else word
        for word in text.split()
    ]


def measured(word):
    # It differs from processor to processor.
    return pytest.approx(float(word), rel=0.2, abs=0.02)


def write_stand_in(text, folder):
    """Write a tiny model, with bytes as tokens, to the file README.md reads."""
    bytes_ = [*range(33, 127), *range(161, 173), *range(174, 256)]
    tokens = [chr(i) for i in (*bytes_, *range(256, 512 - len(bytes_)))]
    tokens += ["th", *gguf_files.SPECIAL]
    sizes = {"vocabulary_size": len(tokens), "num_layers": 1, "hidden_dim": 32}
    sizes |= {"num_query_heads": 2, "num_key_value_heads": 1}
    _, file = gguf_files.exported(folder, "qwen, tied", **sizes)
    count = len(gguf_files.SPECIAL)
    fields = {
        "tokens": tokens,
        "token_type": [1] * (len(tokens) - count) + [3] * count,
        "merges": ["t h"],
        "eos_token_id": len(tokens) - 1,
    }
    fields = {f"tokenizer.ggml.{key}": fields[key] for key in fields}
    gguf_files.rewritten(file, gguf_files.byte_pairs(**fields))
    path = folder / re.search(r'"(\S+\.gguf)"', text)[1]
    path.parent.mkdir()
    file.rename(path)


@pytest.mark.filterwarnings("ignore:.*exported in dense form")
@pytest.mark.parametrize(("page", "steps"), [*cases()])
def test_examples_of_pages_run(page, steps, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # No bar, which a busy machine would be slow enough for.
    monkeypatch.setattr(progress, "DELAY", 1e6)
    if page.stem == "README":
        write_stand_in(page.read_text(), tmp_path)
    names, is_tutorial = {}, page.parent == TUTORIALS
    for code, expected in steps:
        if not is_tutorial:
            names = {}
            keras.utils.clear_session()  # layers are named from the start
        exec(compile(code, page.name, "exec"), names)
        printed = capsys.readouterr().out
        if expected:
            read, near = (float, measured) if is_tutorial else (str, str)
            assert words(printed, read) == words(expected, near), printed
