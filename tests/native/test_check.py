"""Random cases in C++ against plain loops, under sanitizers and on Arm.

A few seconds each; KWM_CHECK_SECONDS=600 for longer.
"""

import importlib.util
import os
import pathlib
import platform
import shutil
import subprocess
import sys

import pytest

from keras_weightmods import native

HERE = pathlib.Path(__file__).parent
SOURCES = pathlib.Path(native.__file__).parent
SECONDS = float(os.environ.get("KWM_CHECK_SECONDS", "3"))
COMPILER = next(filter(None, map(shutil.which, ["c++", "g++", "clang++"])), "")
pytestmark = [
    pytest.mark.one_backend,
    pytest.mark.skipif(not COMPILER, reason="no C++ compiler"),
]


def build(target, *flags, sources, command=()):
    """Compile a program; return what the compiler said, empty if it did."""
    command = [*(command or [COMPILER]), "-std=c++17", "-Wall", "-Wextra"]
    command += ["-Werror", f"-I{SOURCES / 'include'}", *flags, *sources]
    done = subprocess.run(
        [*command, "-o", target, "-pthread"], capture_output=True, text=True
    )
    return done.stderr if done.returncode else ""


def run(*command):
    """Run a program; return its output and whether it succeeded."""
    done = subprocess.run(
        [*map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.stdout, done.returncode == 0


def check(tmp_path, *flags, command=(), runner=()):
    program = tmp_path / "check"
    sources = [HERE / "check.cc", *SOURCES.glob("*.cc")]
    sources += [*SOURCES.glob("x86/*.cc"), *SOURCES.glob("arm/*.cc")]
    sources.remove(SOURCES / "xla_handlers.cc")
    assert not build(program, *flags, sources=sources, command=command)
    seed = os.environ.get("KWM_CHECK_SEED", "1")
    output, succeeded = run(*runner, program, SECONDS, seed)
    assert succeeded, output
    assert int(output.split()[0]) > 0


@pytest.mark.heavy
def test_clean_under_the_sanitizers(tmp_path):
    flags = ["-O1", "-g", "-fsanitize=address,undefined"]
    flags.append("-fno-sanitize-recover=all")
    probe = tmp_path / "probe.cc"
    probe.write_text("int main() {}\n")
    if build(tmp_path / "probe", *flags, sources=[probe]):
        pytest.skip("the compiler has no sanitizers")
    check(tmp_path, *flags)


def test_threads_that_help_several_callers(tmp_path):
    program, sources = tmp_path / "helpers", [HERE / "check_helpers.cc"]
    for flags in (["-O1", "-g", "-fsanitize=thread"], ["-O2"]):
        # This compiler may have no such sanitizer.
        if failure := build(program, *flags, sources=sources):
            continue
        output, succeeded = run(program, SECONDS / 10)
        # Nor does it run where the kernel spreads memory too far.
        if "unexpected memory mapping" not in output:
            break
    assert not failure
    assert succeeded, output


@pytest.mark.heavy
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
