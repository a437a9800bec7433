"""What the ten lines of README.md take, run as they stand.

    python -m benchmarks.readme

A process of its own runs them in an empty folder, with the file that they read.
Measured are its seconds, those of the processor, and the bytes of the file that
it writes. What it prints is shown.
"""

import importlib.metadata
import os
import pathlib
import re
import resource
import subprocess
import sys
import tempfile
import time

from benchmarks import harness
from examples.data import qwen_coder


def main():
    parser = harness.make_parser(__doc__)
    harness.add_backend(parser, "jax")
    harness.add_json(parser, "readme.json")
    args = parser.parse_args()
    report = {
        "machine": harness.machine(),
        "backend": args.backend,
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("keras", "keras-hub", args.backend)
        },
        **run(args.backend),
    }
    harness.write_json(args.json, report)
    print(report)


def run(backend):
    """Return what the code took and wrote, as a dict."""
    text = (harness.ROOT / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    source, written = re.findall(r'"(\S+\.(?:gguf|safetensors))"', code)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        (folder / source).parent.mkdir()
        (folder / source).symlink_to(qwen_coder.find_gguf())
        began = time.perf_counter()
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=folder,
            env={
                "TF_CPP_MIN_LOG_LEVEL": "3",
                "PYTHONPATH": str(harness.ROOT),
                **os.environ,
                "KERAS_BACKEND": backend,
            },
            check=True,
        )
        seconds = time.perf_counter() - began
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return {
            "seconds": seconds,
            "processor_seconds": used.ru_utime + used.ru_stime,
            "file_bytes": (folder / written).stat().st_size,
        }


if __name__ == "__main__":
    main()
