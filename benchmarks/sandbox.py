"""Runs Python that a language model wrote, in a process of its own.

The process has limits of processor time, wall time and memory. An audit hook
refuses sockets, other processes, and changes of files. If Linux lets `unshare`
make a network namespace, there is no network either. This contains accidents,
but not code that wants to break out.
"""

import functools
import shutil
import subprocess
import sys
import tempfile

# No code has a reason to end with this status.
_PASSED = 86
_CHILD = """
import os, resource, sys

seconds, size, passed = map(int, sys.argv[1:])
source = sys.stdin.buffer.read()
report, null = os.dup(2), os.open(os.devnull, os.O_RDWR)
for number in range(3):
    os.dup2(null, number)
for name, limit in (
    ("CPU", seconds), ("AS", size), ("FSIZE", 0), ("CORE", 0)
):
    resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

def refuse(event, args):
    kind, _, name = event.partition(".")
    if (
        kind in ("shutil", "socket", "subprocess")
        # But for what imports do.
        or kind == "os"
        and name not in ("listdir", "scandir", "putenv", "unsetenv")
        or event == "open"
        and args[2] & writes
    ):
        raise PermissionError(f"{event} is refused")

try:
    code = compile(source, "answer", "exec")
    sys.addaudithook(refuse)
    exec(code, {"__name__": "answer"})
except BaseException as error:
    os.write(report, f"{type(error).__name__}: {error}".encode()[:200])
    os._exit(1)
os._exit(passed)
"""


def run(code, seconds=10, size=2**30, wall=60):
    """Run code, and say how it ended.

    Args:
        code: String, a Python program.
        seconds: Int, processor time.
        size: Int, bytes of address space.
        wall: Number, seconds of wall time.

    Returns:
        String, `"passed"` if it ended without an error, else the reason.
    """
    # -I: nothing of this process's environment; -B: it can write no files.
    command = [sys.executable, "-I", "-B", "-c", _CHILD]
    limits = map(str, (seconds, size, _PASSED))
    with tempfile.TemporaryDirectory() as folder:
        try:
            ended = subprocess.run(
                [*without_network(), *command, *limits],
                input=code.encode(errors="replace"),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                cwd=folder,
                env={"OMP_NUM_THREADS": "1"},
                timeout=wall,
            )
        except subprocess.TimeoutExpired:
            return "out of time"
    if ended.returncode == _PASSED:
        return "passed"
    if ended.returncode < 0:
        return f"killed by signal {-ended.returncode}"
    return ended.stderr.decode(errors="replace") or "ended itself"


@functools.cache
def without_network():
    """Return the start of a command line that takes the network away.

    Empty where that cannot be done: the audit hook refuses sockets alone.
    """
    command = ["unshare", "--map-root-user", "--net"]
    if shutil.which(command[0]):
        tried = subprocess.run([*command, "true"], capture_output=True)
        if tried.returncode == 0:
            return command
    return []
