import argparse

import numpy as np
import pytest

from benchmarks import harness, lift_quality

pytestmark = pytest.mark.one_backend

pytest.importorskip("scipy")


def final(method, seed, solved, forgotten, rate=1e-3):
    return {
        "method": method,
        "rate": rate,
        "seed": seed,
        "kind": "final",
        "solved": solved,
        "unseen": 0.01,
        "loss": 0.5 + 0.01 * seed,
        "unseen_loss": 1.5,
        # The text of each seed begins elsewhere.
        "reference": 2.0 + seed + forgotten,
        "news": 3.0 + seed + 3 * forgotten,
        "trained": 800_000,
        "stored": 800_000,
        "optimizer_bytes": 8e6,
        "peak_bytes": 1e9,
        "step": 0.5 + seed,
        "file_bytes": 2e6,
    }


SOLVED = {
    "full": (0.20, 0.24, 0.22),
    "LoRA": (0.21, 0.23, 0.22),
    "LIFT 5 %": (0.30, 0.35, 0.31),
}


@pytest.fixture
def report():
    forgotten = {"full": 0.1, "LoRA": 0.2, "LIFT 5 %": 0.1}
    runs = [final("before", seed, 0.0, 0.0, 0.0) for seed in range(3)]
    runs += [
        final(method, seed, value, forgotten[method] + 0.001 * seed)
        for method, values in SOLVED.items()
        for seed, value in enumerate(values)
    ]
    runs += [
        {"method": method, "seed": 100, "kind": "search"}
        | {"valid": 0.4 + (rate - 1e-3) ** 2, "rate": rate}
        for method in SOLVED
        for rate in (5e-4, 1e-3, 2e-3)
    ]
    setting = dict.fromkeys(lift_quality.SETTING, 3)
    machine = harness.machine()
    return {"runs": runs, "setting": setting, "machine": machine}


def test_summary_has_what_each_seed_forgot(report):
    found = lift_quality.summary(report)
    assert found["before"]["forgotten"] == [0.0, 0.0, 0.0]
    full = found["full"]
    assert full["forgotten"] == pytest.approx([0.2, 0.202, 0.204])
    assert full["solved"] == list(SOLVED["full"])
    assert full["step"] == 1.5
    assert full["tried"] == 3
    assert "random 5 %" not in found


def test_noise_of_all_methods_or_of_the_pair(report):
    found = lift_quality.summary(report)
    table = np.array(list(SOLVED.values()))
    # As a linear model of methods and seeds leaves it.
    design = [
        [*(i == m for m in range(3)), *(j == s for s in (1, 2))]
        for i in range(3)
        for j in range(3)
    ]
    rest = np.linalg.lstsq(np.array(design, float), table.ravel())[1][0] / 4
    # Student's t for four degrees of freedom and 95 %, from a table.
    half = 2.776445 * np.sqrt(2 * rest / 3)
    effects = lift_quality.effects(found, "full", "solved")
    assert set(effects) == {"LoRA", "LIFT 5 %"}
    assert effects["LIFT 5 %"] == pytest.approx((0.1, 0.1 - half, 0.1 + half))
    effects = lift_quality.effects(found, "LoRA", "forgotten")
    assert effects["full"] == pytest.approx((-0.2, -0.2, -0.2))


def test_differences_where_some_seeds_are_missing(report):
    del report["runs"][9]  # the first of LIFT's
    found = lift_quality.summary(report)
    effects = lift_quality.effects(found, "LoRA", "forgotten")
    assert effects["LIFT 5 %"] == pytest.approx((-0.2, -0.2, -0.2))
    # By hand: LIFT's seeds, less those of the others, which say how much
    # easier these two are, and all of full's.
    effects = lift_quality.effects(found, "full", "solved")
    assert effects["LoRA"][0] == pytest.approx(0.0)
    assert effects["LIFT 5 %"][0] == pytest.approx(0.33 - 0.2275)
    lengths = {name: high - low for name, (_, low, high) in effects.items()}
    # Variances, in those of one number: 11 / 12, and 2 / 3.
    ratio = lengths["LIFT 5 %"] / lengths["LoRA"]
    assert ratio == pytest.approx(np.sqrt(11 / 8))
    del report["runs"][9]
    found = lift_quality.summary(report)
    effects = lift_quality.effects(found, "full", "loss")
    assert set(effects) == {"LoRA"}  # two seeds are needed


def test_front_and_sentences(report):
    found = lift_quality.summary(report)
    assert lift_quality.front(found) == ["LIFT 5 %"]
    found["LoRA"]["forgotten"] = [0.1, 0.1, 0.1]
    assert lift_quality.front(found) == ["LoRA", "LIFT 5 %"]
    lines = lift_quality.verdicts(lift_quality.summary(report))
    assert (
        "Beside LoRA, beyond the spread: full, LIFT 5 % forget less." in lines
    )
    assert "Beside full, beyond the spread: LIFT 5 % solve more." in lines
    assert "Beside full, beyond the spread: no method differs in loss." in lines


def test_a_run_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    asked = []

    def run_worker(backend, worker):
        name, rate, seed, kind = worker.removeprefix("--worker=").split(",")
        asked.append((name, float(rate), int(seed), kind))
        if len(asked) == 4:
            raise KeyboardInterrupt
        # The best is twice where the search begins, but half of it solves
        # more, on all seeds, and a quarter on the first.
        solved = {3.2e-3: [0.3, 0.5], 1.6e-3: [0.4, 0.3]}.get(float(rate))
        solved = solved[int(seed)] if solved and kind == "final" else 0.2
        return {"valid": abs(float(rate) - 6.4e-3), "solved": solved}

    monkeypatch.setattr(harness, "run_worker", run_worker)
    args = argparse.Namespace(
        **dict.fromkeys(lift_quality.SETTING, 3),
        methods=["LoRA"],
        seeds=2,
        json=tmp_path / "log.json",
    )
    with pytest.raises(KeyboardInterrupt):
        lift_quality.run(args)
    report = lift_quality.run(args)
    assert harness.read_json(args.json)["runs"] == report["runs"]
    del asked[3]
    assert len(set(asked)) == len(asked) == len(report["runs"])
    assert asked[:2] == [("before", 0.0, seed, "final") for seed in (0, 1)]
    assert asked[-6:] == [
        ("LoRA", rate, seed, "final")
        for rate in (6.4e-3, 3.2e-3, 1.6e-3)
        for seed in (0, 1)
    ]
    assert sorted(rate for _, rate, _, kind in asked if kind == "search") == [
        1.6e-3,
        3.2e-3,
        6.4e-3,
        12.8e-3,
    ]
    args.steps = 4
    with pytest.raises(SystemExit, match="another setting"):
        lift_quality.run(args)
