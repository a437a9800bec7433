import pytest

from benchmarks import harness, lift_quality, results_page


def fake_run(method, rate, seed, solved):
    return {
        "method": method,
        "rate": rate,
        "seed": seed,
        "before": {
            "solved": 0.1,
            "tokens": 0.5,
            "loss": 2.0,
            "unrelated": 14.0,
        },
        # The lower rate is the better one on the validation problems.
        "valid": {"loss": 1.0 + rate},
        "test": {
            "solved": solved,
            "tokens": 0.9,
            "loss": 0.5,
            "unrelated": 15.0 + seed,
        },
        "trained": 10,
        "optimizer_bytes": 8e6,
        "peak_bytes": 1e9,
        "seconds_a_step": 0.5 + seed,
        "file_bytes": 2e6,
    }


@pytest.fixture
def report():
    runs = [
        fake_run(method, rate, seed, 0.2 + 0.01 * seed)
        for method in lift_quality.METHODS
        for rate, seeds in ((1e-4, (0, 1, 2)), (1e-3, (0,)))
        for seed in seeds
    ]
    for run in runs:
        if run["method"] == "LIFT" and run["rate"] == 1e-4:
            run["test"]["solved"] += 0.5
    setting = {"steps": 3, "batch": 2, "backend": "torch"}
    machine = harness.machine()
    return {"runs": runs, "setting": setting, "machine": machine}


def test_summary_is_of_the_best_rate(report):
    found = lift_quality.summary(report)
    full = found["full"]
    assert full["rate"] == 1e-4
    assert full["seeds"] == 3
    assert full["solved"] == pytest.approx([0.21, 0.01])
    assert full["seconds_a_step"] == 1.5
    differs = full["lift_differs"]
    assert differs["solved"]["difference"] == pytest.approx(0.5)
    assert differs["solved"]["exceeds_spread"]
    assert not differs["unrelated"]["exceeds_spread"]
    assert "lift_differs" not in found["LIFT"]


def test_report_has_a_row_for_each_method(report, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    report["summary"] = lift_quality.summary(report)
    lift_quality.print_report(report)
    printed = capsys.readouterr().out
    for method in ("before", *lift_quality.METHODS):
        assert method in printed
    assert "71.0% ± 1.0%" in printed


def test_page_has_the_spread_and_the_verdict(report):
    report["summary"] = lift_quality.summary(report)
    report["setting"]["held_out"] = 4
    page = results_page.lift_quality(report)
    assert "| LIFT | 0.0001 | 71.0% ± 1.0% |" in page
    assert "- full: solved +0.5000 (exceeds), loss +0.0000 (within)" in page
    del report["summary"]
    assert "benchmarks.lift_quality" in results_page.lift_quality(report)
