"""The public names: what an import brings, their table, their annotations."""

import pathlib
import runpy
import subprocess
import sys

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
