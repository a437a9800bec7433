"""What the benchmarks share: worker processes, the machine, result files."""

import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile


def run_worker(script, backend, *arguments, environment=None):
    """Runs a benchmark script for one backend, in a process of its own.

    Args:
        script: The script's `__file__`. Given `--json=FILE`, it writes its
            result there.
        backend: String, a backend of Keras.
        *arguments: Strings, for the command line.
        environment: Dict of variables to set in the process, if any.

    Returns:
        The result.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "result.json"
        subprocess.run(
            [sys.executable, script, *arguments, f"--json={file}"],
            env={
                "TF_CPP_MIN_LOG_LEVEL": "3",
                **os.environ,
                "KERAS_BACKEND": backend,
                **(environment or {}),
            },
            check=True,
        )
        return json.loads(file.read_text())


def write_report(path, report):
    """Writes a report to a file, and makes its folder."""
    file = pathlib.Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=1) + "\n")


def machine():
    """What the times depend on, as a dict."""
    return {
        "cpu": cpu(),
        "cores": os.cpu_count(),
        "cores_used": len(os.sched_getaffinity(0)),
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "load": os.getloadavg(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def cpu():
    """The name of the processor."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
