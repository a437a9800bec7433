import numpy as np
import pytest

from benchmarks import cast_budget as bench
from benchmarks import harness
from benchmarks.pages import budget

pytestmark = pytest.mark.one_backend

pytest.importorskip("scipy")


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "VOCABULARY", 16)
    monkeypatch.setattr(bench, "PATTERNS", ("2:4",))
    # Three rates are enough.
    monkeypatch.setattr(bench, "LEAST_RATE", 1)
    # One layer of width 8 has 832 weights; two steps of dense training.
    small = bench.Size(1, 2, 8, 4, 2.4, (0.3,), (0.3,), 1, False)
    monkeypatch.setattr(bench, "SIZES", {"832": small})
    random = np.random.default_rng(0)
    texts = {
        name: random.integers(16, size=(rows, bench.LENGTH + 1))
        for name, rows in (
            ("train", 200),
            ("documentation", 8),
            ("valid", 2),
            ("held_out", 2),
            ("news", 2),
        )
    }
    log = bench.Log(tmp_path / "log.json", "torch")
    return bench.Study("832", texts, log, tmp_path)


def test_a_study_of_a_few_hundred_weights(study):
    study.run(0)
    study.rival()
    log = harness.read_json(study.log.path)
    assert {row["kind"] for row in log["rows"]} == {
        *("dense", "rival", "start", "search", "control", "cast")
    }
    page = budget.cast_budget(log)
    assert "| 832 | smaller dense | 208 |" in page
    assert "| 2:4 from one-shot | 0.308 | 4 |" in page
    # Nothing is made anew.
    study.run(0)
    assert harness.read_json(study.log.path) == log
