"""Two processes of JAX train one model, are interrupted, and go on.

    python -m tests.devices.processes

By `examples/several_devices.py`: a run that was interrupted must end with the
file of one that was not, byte for byte. The processes are forks of this one,
which has imported all there is and computed nothing. Not for Windows.
"""

import argparse
import contextlib
import os
import pathlib
import socket
import sys
import tempfile
import traceback

os.environ["KERAS_BACKEND"] = "jax"
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import keras_hub  # noqa: F401

import keras_weightmods as kwm
from examples import several_devices

PROCESSES = 2
LAYOUTS = {"data": (), "model": ("--model-parallel", "2")}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS
    )
    for name in parser.parse_args().layouts:
        layout = LAYOUTS[name]
        with tempfile.TemporaryDirectory() as folder:
            whole = run(f"{folder}/whole", *layout)
            finish(run(f"{folder}/run", *layout, "--die-after", "6"), False)
            assert os.listdir(f"{folder}/run")
            finish(run(f"{folder}/run", *layout))
            finish(whole)
            whole, resumed = (
                pathlib.Path(f"{folder}/{name}.safetensors").read_bytes()
                for name in ("whole", "run")
            )
            assert whole == resumed
            # One process reads what several wrote.
            finish([forked(read, f"{folder}/run.safetensors")])
        print(f"{name} parallel: resumed", flush=True)


def run(folder, *arguments):
    """Start the processes of a run; return their ids."""
    with socket.socket() as server:
        server.bind(("localhost", 0))
        address = f"localhost:{server.getsockname()[1]}"
    files = "--folder", folder, "--output", f"{folder}.safetensors"
    return [
        forked(train, address, number, [*files, *arguments])
        for number in range(PROCESSES)
    ]


def train(address, number, arguments):
    os.environ["KERAS_DISTRIBUTION_JOB_ADDRESSES"] = address
    os.environ["KERAS_DISTRIBUTION_NUM_PROCESSES"] = str(PROCESSES)
    os.environ["KERAS_DISTRIBUTION_PROCESS_ID"] = str(number)
    sys.argv = ["several_devices", *arguments]
    several_devices.main()


def read(path):
    kwm.assert_sparse(kwm.load_model(path), "2:4")


def forked(function, *args):
    """Call a function in a process of its own; return its id."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    with contextlib.suppress(BaseException):
        try:
            function(*args)
            code = 0
        except BaseException:
            traceback.print_exc()
            raise
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def finish(pids, is_well=True):
    codes = [os.waitpid(pid, 0)[1] for pid in pids]
    # One that loses the other may be ended by JAX.
    assert all((code == 0) == is_well for code in codes), codes


if __name__ == "__main__":
    main()
