"""A few kills of each method; many more are in `make faults`."""

import json
import os
import subprocess
import sys

import keras
import pytest

# Compiling takes the time elsewhere.
METHODS = {"torch": ["plain", "cast", "lift"]}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    "method", METHODS.get(keras.backend.backend(), ["plain"])
)
def test_killed_trainings_end_as_if_nothing_had_happened(method):
    # In a process that has computed nothing yet: it is forked.
    command = [sys.executable, "-m", "tests.faults.kills", "--method", method]
    environment = {**os.environ, "KERAS_BACKEND": keras.backend.backend()}
    done = subprocess.run(
        [*command, "--kills", "2"],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    result = json.loads(done.stdout)
    assert result["kills"] == 2
    assert result["equal"]
