"""What `make gpu` does, in one command and at most nine minutes.

    python3 benchmarks/gpu.py
    python3 benchmarks/gpu.py --dry-run --frameworks torch --results /tmp/gpu

1. Installs what this Python lacks, into build/gpu/packages, and builds the
   library for the jaxlib that is there.
2. Runs tests/gpu/test_on_gpu.py under JAX and torch.
3. Measures: benchmarks/sparse_matmul_gpu.py.
4. Both again for float16, with which cuSPARSELt has ended the process on some
   cards: nothing comes after it.
5. Writes the dispatcher's table, and a page.

Each part is a process of its own with a limit of time, and writes as it goes
on. What was measured is not measured again: the same command continues. A test
that fails does not stop the rest, but the status at the end tells of it.

It needs no package itself. It has not yet run on a GPU: `--dry-run`, for
machines without one, goes all the way but for float16, with tiny products, and
writes to the folder `--results` alone.
"""

import argparse
import importlib.util
import json
import math
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "gpu"
PACKAGES = BUILD / "packages"
NATIVE = ROOT / "keras_weightmods" / "native"
# By the name of the module.
REQUIREMENTS = {
    "absl": "absl-py",
    "h5py": "h5py",
    "iniconfig": "iniconfig",
    "keras": "keras>=3.15",
    "markdown_it": "markdown-it-py",
    "mdurl": "mdurl",
    "ml_dtypes": "ml-dtypes",
    "namex": "namex",
    "numpy": "numpy",
    "optree": "optree",
    "packaging": "packaging",
    "pluggy": "pluggy",
    "pygments": "pygments",
    "pytest": "pytest>=8",
    "rich": "rich>=13",
    "safetensors": "safetensors>=0.5",
}
SECONDS = 510  # in all, without what is installed
GRACE_SECONDS = 20  # of a product that does not end
TEST_SECONDS = 100  # of one backend
FLOAT16_SECONDS = 90


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--frameworks", default="jax,torch")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument(
        "--results",
        type=pathlib.Path,
        default=ROOT / "benchmarks" / "results",
        help="the folder of sparse_matmul_gpu.json and .md",
    )
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()

    install_missing()
    # Without a GPU no time is measured, and none may run out.
    seconds = math.inf if args.dry_run else args.seconds
    deadline = time.monotonic() + seconds
    if not args.dry_run:
        build()
    frameworks = args.frameworks.split(",")
    outcomes = {}
    passes = [
        (("bfloat16", "int8", "float32"), deadline - FLOAT16_SECONDS),
        (("float16",), deadline),
    ]
    for dtypes, until in passes[:1] if args.dry_run else passes:
        for backend in frameworks:
            name = f"{backend}, {' '.join(dtypes)}"
            outcomes[name] = test(backend, dtypes, until)
            print(f"== tests of {name}: {outcomes[name]}", flush=True)
        measure(args, dtypes, until)
    failed = [name for name, text in outcomes.items() if "passed" not in text]
    write_outcomes(args.results / "sparse_matmul_gpu.json", outcomes)
    run("-m", "benchmarks.sparse_matmul_gpu", "--page", *options(args))
    if args.dry_run:
        failed = [name for name in failed if "skipped" not in outcomes[name]]
    sys.exit(f"Tests failed: {'; '.join(failed)}" if failed else 0)


def missing():
    """Return the requirements that this Python lacks."""
    importlib.invalidate_caches()
    return [
        requirement
        for module, requirement in REQUIREMENTS.items()
        if importlib.util.find_spec(module) is None
    ]


def install_missing():
    """Install what is missing beside what is there, which stays as it is."""
    if PACKAGES.exists():
        sys.path.insert(0, os.fspath(PACKAGES))
    if wanted := missing():
        install(wanted)
    if left := missing():
        raise SystemExit(f"pip did not install {', '.join(left)}.")


def install(wanted):
    print(f"== installing {', '.join(wanted)}", flush=True)
    # Without what they depend on: that is among them, or big and there.
    run("-m", "pip", "install", "--quiet", "--no-deps", "--target", PACKAGES,
        *wanted, check=True)  # fmt: skip
    if os.fspath(PACKAGES) not in sys.path:
        sys.path.insert(0, os.fspath(PACKAGES))


def environment():
    """The variables of each part: PYTHONPATH and PATH keep what they hold."""
    paths = [ROOT, PACKAGES, os.environ.get("PYTHONPATH")]
    programs = [PACKAGES / "bin", pathlib.Path(sys.executable).parent]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(os.fspath(p) for p in paths if p),
        "PATH": os.pathsep.join(
            [*map(os.fspath, programs), os.environ.get("PATH", os.defpath)]
        ),
        # The tests on a CPU set it for their speed.
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",
        "JAX_ENABLE_COMPILATION_CACHE": "0",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }


def run(*arguments, check=False, timeout=None, **variables):
    """Run this Python; return the status, None if the time was up."""
    command = [sys.executable, *map(os.fspath, arguments)]
    variables = {**environment(), **variables}
    process = subprocess.Popen(
        command, cwd=ROOT, env=variables, start_new_session=True
    )
    try:
        status = process.wait(timeout)
    except subprocess.TimeoutExpired:
        status = None
    finally:
        if process.poll() is None:
            # And what it has started, which would keep the GPU.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if check and status:
        raise subprocess.CalledProcessError(status, command)
    return status


def build():
    """Build the library with the headers of the jaxlib that is there."""
    libraries = [NATIVE / "lib" / f"{n}.so" for n in ("kwm_native", "kwm_gpu")]
    sources = [ROOT / "cmake" / "CMakeLists.txt"]
    for pattern in ("*.cc", "*.h", "gpu/*.cc", "gpu/*.h", "gpu/*.cmake"):
        sources += NATIVE.glob(pattern)
    # Another jaxlib, or an older one, may have built what is there.
    stamp = BUILD / "built.json"
    spec = importlib.util.find_spec("jaxlib")
    about = {
        "python": sys.executable,
        "jaxlib": spec and spec.origin,
        "newest": max(source.stat().st_mtime for source in sources),
    }
    known = json.loads(stamp.read_text()) if stamp.exists() else None
    if known == about and all(library.exists() for library in libraries):
        return
    path = environment()["PATH"]
    if shutil.which("cmake", path=path) is None:
        install(["cmake"])
    cmake = shutil.which("cmake", path=path)
    for command in (
        [cmake, "-S", "cmake", "-B", BUILD, "-DKWM_XLA_ANY_VERSION=ON",
         f"-DPython_EXECUTABLE={sys.executable}"],
        [cmake, "--build", BUILD, "--parallel"],
    ):  # fmt: skip
        subprocess.run(command, cwd=ROOT, env=environment(), check=True)
    stamp.write_text(json.dumps(about))


def test(backend, dtypes, until):
    """Run the tests of some types under a backend; return their outcome."""
    left = until - time.monotonic()
    timeout = None if left == math.inf else min(TEST_SECONDS, left)
    if left <= 0:
        return "no time left"
    status = run(
        *("-m", "pytest", "tests/gpu/test_on_gpu.py", "-q", "-rs"),
        timeout=timeout,
        KERAS_BACKEND=backend,
        KERAS_WEIGHTMODS_GPU_TYPES=",".join(dtypes),
    )
    # pytest: 5 is for no test, as where the module was skipped.
    outcomes = {0: "passed", 5: "skipped", None: "not done in time"}
    return outcomes.get(status, f"failed with status {status}")


def measure(args, dtypes, until):
    seconds = until - time.monotonic()
    if seconds <= 0:
        return
    # It ends by itself, but for a product that never does.
    run(
        *("-m", "benchmarks.sparse_matmul_gpu", *options(args)),
        *("--types", ",".join(dtypes), "--seconds", str(seconds)),
        *("--frameworks", args.frameworks),
        timeout=None if seconds == math.inf else seconds + GRACE_SECONDS,
    )


def options(args):
    """Where a part reads and writes, as arguments."""
    found = ["--json", args.results / "sparse_matmul_gpu.json"]
    found += ["--markdown", args.results / "sparse_matmul_gpu.md"]
    if args.dry_run:
        found += ["--dry-run", "--table", args.results / "dispatch.json"]
    return found


def write_outcomes(path, outcomes):
    report = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**report, "tests": outcomes}, indent=1) + "\n")


if __name__ == "__main__":
    main()
