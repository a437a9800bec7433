"""What `make gpu` does, as far as a machine without a GPU goes."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import gpu

pytestmark = pytest.mark.one_backend


@pytest.mark.heavy
def test_dry_run(tmp_path):
    path = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run"]
    command += ["--frameworks", "torch", "--json", os.fspath(path)]
    subprocess.run(command, check=True, cwd=gpu.ROOT)
    report = json.loads(path.read_text())
    kinds = [kind for types in gpu.PASSES for kind in types.split(",")]
    assert [*report["times"]] == [f"torch, {kind}, 64 x 32" for kind in kinds]
    page = path.with_suffix(".md").read_text()
    assert "| | 1 | 16 |" in page
    assert page.count("| torch, ") == len(kinds)


def test_what_was_measured_is_not_measured_again(tmp_path, monkeypatch):
    path = tmp_path / "gpu.json"
    known = {"times": {"torch, int8, 64 x 32": "cuSPARSELt failed"}}
    path.write_text(json.dumps(known))
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    monkeypatch.setattr(
        sys,
        "argv",
        ["gpu", "--worker", "--dry-run", f"--json={path}", "--types=int8,x"],
    )
    gpu.main()
    times = json.loads(path.read_text())["times"]
    assert times["torch, int8, 64 x 32"] == "cuSPARSELt failed"
    assert len(times["torch, x, 64 x 32"]) == 2
    assert "| torch, int8, 64 x 32 | cuSPARSELt failed |" in gpu.table(
        {"times": times}
    )
