"""A few kills of each method; many more are in `make faults`."""

import json
import os
import subprocess
import sys

import keras
import pytest


# Compiling takes too long on the others: see `make faults`.
@pytest.mark.one_backend
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_trainings_end_as_if_nothing_had_happened():
    # In a process that has computed nothing yet: it is forked.
    command = [sys.executable, "-m", "tests.faults.kills", "--kills", "2"]
    done = subprocess.run(
        command,
        env={**os.environ, "KERAS_BACKEND": keras.backend.backend()},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert results
    for result in results:
        assert result["kills"] == 2
        assert result["equal"]
