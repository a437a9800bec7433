"""Runs the walk with SmolLM2 of docs/walks.md, as one who reads it would.

    python -m tests.releases.walk

Run by `make walk`, with the Python of an environment that has the wheel, in a
folder that has the examples: the first block on torch, the second on JAX.
"""

import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

PAGE = pathlib.Path("docs/walks.md").absolute()
HEADING = "### The same with SmolLM2\n"


def main():
    section = PAGE.read_text("utf-8").split(HEADING)[1].split("\n#")[0]
    blocks = re.findall(r"```py\n(.*?)```", section, re.DOTALL)
    values = {}
    with tempfile.TemporaryDirectory() as folder:
        for backend, code in zip(("torch", "jax"), blocks, strict=True):
            start = time.perf_counter()
            printed = subprocess.run(
                [sys.executable, "-c", code],
                cwd=folder,
                env={
                    **os.environ,
                    "KERAS_BACKEND": backend,
                    "PYTHONPATH": os.getcwd(),
                },
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            ).stdout
            print(f"{backend}, {time.perf_counter() - start:.0f} s", printed)
            found = re.findall(r"^(.+): perplexity (\S+)$", printed, re.M)
            values |= {name: float(value) for name, value in found}
        size = os.path.getsize(pathlib.Path(folder) / "smollm2.safetensors")
    print(f"{size / 1e6:.1f} MB")
    # 2:4 of few rows is worse, and no other model; loaded, it is the same.
    assert 1 < values["2:4"] / values["dense"] < 10, values
    assert abs(values["loaded"] / values["2:4"] - 1) < 0.01, values


if __name__ == "__main__":
    main()
