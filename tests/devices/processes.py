"""Two processes of JAX train one model, are interrupted, and go on.

    python -m tests.devices.processes

By `examples/several_devices.py`, as a user would start it: a run that was
interrupted must end with the file of one that was not, byte for byte.
"""

import os
import pathlib
import socket
import subprocess
import sys
import tempfile

PROCESSES = 2
LAYOUTS = ((), ("--model-parallel", "2"))


def main():
    for layout in LAYOUTS:
        with tempfile.TemporaryDirectory() as folder:
            whole = run(f"{folder}/whole", *layout)
            finish(run(f"{folder}/run", *layout, "--die-after", "3"), False)
            assert os.listdir(f"{folder}/run")
            finish(run(f"{folder}/run", *layout))
            finish(whole)
            whole, resumed = (
                pathlib.Path(f"{folder}/{name}.safetensors").read_bytes()
                for name in ("whole", "run")
            )
            assert whole == resumed
            # One process reads what several wrote.
            check_sparse(f"{folder}/run.safetensors")
        print(f"{' '.join(layout) or 'data parallel'}: resumed", flush=True)


def run(folder, *arguments):
    """Start the processes of a run."""
    with socket.socket() as server:
        server.bind(("localhost", 0))
        address = f"localhost:{server.getsockname()[1]}"
    return [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "examples.several_devices"),
                *("--folder", folder, "--output", f"{folder}.safetensors"),
                *arguments,
            ],
            env={
                **os.environ,
                "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
                "KERAS_DISTRIBUTION_JOB_ADDRESSES": address,
                "KERAS_DISTRIBUTION_NUM_PROCESSES": str(PROCESSES),
                "KERAS_DISTRIBUTION_PROCESS_ID": str(number),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(PROCESSES)
    ]


def finish(processes, is_well=True):
    for process in processes:
        _, errors = process.communicate()
        # One that loses the other may be ended by JAX.
        assert (process.returncode == 0) == is_well, errors[-3000:]


def check_sparse(path):
    import keras_weightmods as kwm

    kwm.assert_sparse(kwm.load_model(path), "2:4")


if __name__ == "__main__":
    main()
