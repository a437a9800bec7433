"""Runs every check on several devices, made of this CPU; `make devices`.

Each program of this folder says in lines what it found; they are kept in a
file, from which docs/every_model.md has its table. An error ends it.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).absolute().parent.parent.parent
RESULTS = ROOT / "build" / "matrix" / "devices.json"
# By the devices: the backend, the program and its own environment.
PROGRAMS = {
    "8 devices of JAX": (
        "jax",
        "mesh",
        "--xla_force_host_platform_device_count=8 --xla_dump_hlo_as_text "
        "--xla_dump_hlo_module_re=.*_step.* --xla_dump_to=",
    ),
    "2 processes of JAX": ("jax", "processes", ""),
    "2 processes of torch": ("torch", "torch_ranks", ""),
    "2 devices of TensorFlow": ("tensorflow", "mirrored", ""),
}
# Not what backends and the examples write to the same stream.
LINE = re.compile(r"[\w., ()-]+: [^\[]+")


def main():
    found = {name: run(*program) for name, program in PROGRAMS.items()}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")


def run(backend, program, flags):
    """Return the lines of a program, which are also shown."""
    with tempfile.TemporaryDirectory() as folder:
        own = {"KERAS_BACKEND": backend, "OMP_NUM_THREADS": "1"}
        arguments = []
        if flags:
            own["XLA_FLAGS"] = flags + folder
            arguments = ["--dumps", folder]
        command = [sys.executable, "-m", f"tests.devices.{program}", *arguments]
        environment = {**os.environ, **own, "PYTHONUNBUFFERED": "1"}
        lines = []
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, text=True
        ) as running:
            for line in running.stdout:
                print(line, end="", flush=True)
                lines.append(line.rstrip("\n"))
    if running.returncode:
        sys.exit(f"tests.devices.{program} ended with {running.returncode}")
    return [line for line in lines if LINE.fullmatch(line)]


if __name__ == "__main__":
    main()
