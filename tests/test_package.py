import subprocess
import sys

import keras_weightmods as kwm


def test_import_brings_keras_and_its_backend_alone():
    code = (
        "import sys, keras; before = set(sys.modules)\n"
        "import keras_weightmods\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "assert new == {'keras_weightmods', 'safetensors'}, new\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_version():
    assert kwm.__version__.count(".") == 2
