"""check.cc, random cases against plain loops, where it finds most.

A few seconds each; KWM_CHECK_SECONDS=600 for longer.
"""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys

import pytest

from tests.native import native_core

pytestmark = pytest.mark.one_backend

SECONDS = float(os.environ.get("KWM_CHECK_SECONDS", "3"))
SANITIZE = [
    "-O1",
    "-g",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
]


def check(tmp_path, *flags, command=None, runner=()):
    program = native_core.build(
        tmp_path / "check",
        *flags,
        command=command,
        sources=[native_core.HERE / "check.cc"],
    )
    done = subprocess.run(
        [*runner, program, str(SECONDS), os.environ.get("KWM_CHECK_SEED", "1")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert int(done.stdout.split()[0]) > 0


@pytest.mark.skipif(native_core.compiler() is None, reason="no C++ compiler")
def test_clean_under_the_sanitizers(tmp_path):
    probe = tmp_path / "probe.cc"
    probe.write_text("int main() {}\n")
    linked = subprocess.run(
        [native_core.compiler(), *SANITIZE, probe, "-o", tmp_path / "probe"],
        capture_output=True,
    )
    if linked.returncode:
        pytest.skip("the compiler has no sanitizers")
    check(tmp_path, *SANITIZE)


@pytest.mark.skipif(native_core.compiler() is None, reason="no C++ compiler")
def test_threads_that_help_several_callers(tmp_path):
    program = tmp_path / "check_helpers"
    source = native_core.HERE / "check_helpers.cc"
    for flags in (["-O1", "-g", "-fsanitize=thread"], ["-O2"]):
        command = [native_core.compiler(), "-std=c++17", *flags, "-pthread"]
        command += [
            f"-I{native_core.SOURCES / 'include'}",
            source,
            "-o",
            program,
        ]
        built = subprocess.run(command, capture_output=True, text=True)
        if built.returncode:
            # This compiler may have no such sanitizer.
            continue
        done = subprocess.run(
            [program, str(SECONDS / 3)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        # Nor does it run where the kernel spreads memory too far.
        if "unexpected memory mapping" not in done.stdout:
            break
    assert built.returncode == 0, built.stderr
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(
    platform.machine() == "aarch64", reason="Arm is native here"
)
@pytest.mark.parametrize("cpu", ["max", "cortex-a53"])
def test_neon(tmp_path, cpu):
    """With the dot products of bytes, and without."""
    emulator = shutil.which("qemu-aarch64") or shutil.which(
        "qemu-aarch64-static"
    )
    if emulator is None:
        pytest.skip("no qemu-aarch64 (Debian: qemu-user)")
    if shutil.which("aarch64-linux-gnu-g++"):
        command = ["aarch64-linux-gnu-g++", "-static"]
    elif importlib.util.find_spec("ziglang"):
        zig = [sys.executable, "-m", "ziglang", "c++"]
        command = [*zig, "-target", "aarch64-linux-musl"]
    else:
        pytest.skip("no compiler for Arm (g++-aarch64-linux-gnu or ziglang)")
    check(tmp_path, "-O2", command=command, runner=[emulator, "-cpu", cpu])
