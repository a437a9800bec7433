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
    # The residual of a linear model of methods and seeds.
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
