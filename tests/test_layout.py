import pathlib

import pytest

import keras_weightmods
from tests import layout

pytestmark = pytest.mark.one_backend

ROOT = pathlib.Path(keras_weightmods.__file__).parent


def test_a_file_imports_only_from_floors_below_its_own():
    assert layout.problems(ROOT, {"keras_weightmods.version"}) == []


def test_every_folder_has_a_floor():
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert folders == {name for row in layout.FLOORS for name in row} - {""}


def test_a_long_file_says_why():
    assert layout.too_long(ROOT) == []


def test_long_files_are_found(tmp_path):
    def reports(head):
        lines = "\n" * (layout.MAX_LINES - head.count("\n"))
        (tmp_path / "long.py").write_text(f"{head}{lines}")
        short = layout.too_long(tmp_path)
        (tmp_path / "long.py").write_text(f"{head}{lines}x = 1")
        return short, layout.too_long(tmp_path)

    found = f"long.py has {layout.MAX_LINES + 1} lines"
    assert reports("") == ([], [found])
    assert reports('"""Two.\n\nLonger than others."""\n') == ([], [found])
    why = layout.REASON.replace(" this", "\nthis")
    assert reports(f'"""Two.\n\nTables{why}"""\n') == ([], [])


TREE = {
    "__init__.py": "from kwm.lift.mask import mask",
    "utils/checks.py": "",
    "native/packed.py": "from kwm.utils import checks",
    "backend/jax/order.py": "from kwm.native import packed",
    "ops/order.py": "import importlib\n"
    "def order(name):\n"
    "    return importlib.import_module(f'kwm.backend.{name}.order')",
    "core/targets.py": "from kwm.core.rules import rule",
    "core/rules.py": "from .. import native\nfrom ..native.packed import pack",
    "lift/mask.py": "import kwm.core.targets",
    "packing/pack.py": "from kwm.core import targets, rules",
}


def tree(folder, **changes):
    root = folder / "kwm"
    for name, text in (TREE | changes).items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        (file.parent / "__init__.py").touch()
    return root


def test_the_checker_reads_all_forms_of_imports(tmp_path):
    root = tree(tmp_path)
    assert layout.problems(root) == []
    arrows = layout.imports(root)
    assert arrows["kwm.ops.order"] == {"kwm.backend.jax.order"}
    used = {"kwm.native", "kwm.native.packed"}
    assert arrows["kwm.core.rules"] == used
    both = {"kwm.core.targets", "kwm.core.rules"}
    assert arrows["kwm.packing.pack"] == both


CIRCLE = "circle: kwm.core.targets > kwm.core.rules > kwm.core.targets"


@pytest.mark.parametrize(
    ("file", "text", "problem"),
    [
        ("core/rules.py", "from kwm.lift import mask", "not below"),
        ("core/rules.py", "def f():\n    import kwm.lift.mask", "not below"),
        ("native/packed.py", "x = 'kwm.backend.jax.order'", "not below"),
        ("utils/checks.py", "x = f'kwm.backend.{name}.order'", "not below"),
        ("lift/mask.py", "from kwm import packing", "not below"),
        ("lift/mask.py", "import kwm", "whole package"),
        ("lift/mask.py", "from .. import Name", "whole package"),
        ("core/rules.py", "def f():\n    import kwm.core.targets", CIRCLE),
    ],
)
def test_the_checker_finds_wrong_arrows(file, text, problem, tmp_path):
    found = layout.problems(tree(tmp_path, **{file: text}))
    assert problem in " ".join(found)
