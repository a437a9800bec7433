"""Runs the first code of the guide to packing where one extra is installed.

    python -m tests.releases.readme jax

Run by `make extras`, with the Python of a new environment.
"""

import os
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).absolute().parents[2]
GUIDE = ROOT / "docs" / "guides" / "pack.md"
BACKENDS = ("jax", "tensorflow", "torch")


def commands():
    """Return the lines of README.md that install and choose a backend."""
    text = (ROOT / "README.md").read_text("utf-8")
    return re.search(r"^pip install .*\nexport .*$", text, re.M)[0].splitlines()


def main():
    (backend,) = sys.argv[1:]
    for line in commands():
        assert all(each in line for each in BACKENDS), line
    code, printed = re.search(
        r"```python\n(.*?)```\n\n```text\n(.*?)```",
        GUIDE.read_text("utf-8"),
        re.DOTALL,
    ).groups()
    program = pathlib.Path(sys.executable).with_name("keras-weightmods")
    with tempfile.TemporaryDirectory() as folder:

        def run(*words):
            found = subprocess.run(
                words,
                cwd=folder,
                env={**os.environ, "KERAS_BACKEND": backend},
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            ).stdout
            print(found, flush=True)
            return found

        # After a progress bar, where it takes two seconds.
        assert run(sys.executable, "-c", code).endswith(printed)
        assert "layers/dense" in run(str(program), "info", "packed.safetensors")


if __name__ == "__main__":
    main()
