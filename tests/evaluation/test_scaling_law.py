import sys

import numpy as np
import pytest

import keras_weightmods as kwm

pytestmark = pytest.mark.one_backend

pytest.importorskip("scipy")

TOKENS = np.array([3.2e3, 6.4e3, 1.28e4, 2.56e4, 5.12e4, 1.024e5])
TRUTH = {"L_inf": 3.0, "B": 40.0, "beta": 0.35}


def truth(tokens):
    return TRUTH["L_inf"] + TRUTH["B"] * tokens ** -TRUTH["beta"]


def reference_fit(tokens, losses):
    """Every exponent of a fine grid, with the normal equations of the rest."""
    best = (np.inf,)
    for beta in np.arange(1e-3, 2, 1e-4):
        power = tokens**-beta
        a = np.array([[len(tokens), power.sum()], [power.sum(), power @ power]])
        floor, size = np.linalg.solve(a, [losses.sum(), power @ losses])
        error = ((losses - floor - size * power) ** 2).sum()
        if floor >= 0 and size >= 0 and error < best[0]:
            best = error, floor, size, beta
    return best


@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_recovers_an_exact_law(scale):
    tokens = TOKENS * scale
    losses = truth(tokens)
    law = kwm.fit_scaling_law(tokens, losses)
    for name, value in TRUTH.items():
        assert getattr(law, name) == pytest.approx(value, rel=1e-4)
        low, high = law.intervals[name]
        assert low <= getattr(law, name) <= high
        assert high - low < 1e-3 * value
    wanted = np.array([[1e5, 1e6], [1e7, 1e9]])
    prediction = law.predict(wanted)
    np.testing.assert_allclose(prediction.loss, truth(wanted), rtol=1e-5)
    assert prediction.low.shape == (2, 2)
    assert isinstance(law.predict(1e6).high, float)


@pytest.mark.parametrize("seed", range(2))
def test_noisy_fit_is_the_least_squares_of_a_slow_reference(seed):
    random = np.random.default_rng(seed)
    losses = truth(TOKENS) + random.normal(0, 0.02, len(TOKENS))
    error, floor, size, beta = reference_fit(TOKENS, losses)
    law = kwm.fit_scaling_law(TOKENS, losses)
    ours = ((losses - law.predict(TOKENS).loss) ** 2).sum()
    assert ours <= error * (1 + 1e-6)
    assert law.beta == pytest.approx(beta, abs=2e-3)
    assert law.L_inf == pytest.approx(floor, abs=2e-2)
    assert pytest.approx(size, rel=2e-2) == law.B
    assert law.residual == pytest.approx(np.sqrt(ours / 3))


def test_intervals_hold_the_truth_as_often_as_they_say():
    random = np.random.default_rng(0)
    tokens = np.repeat(TOKENS, 3)
    new = 2e5
    hits = dict.fromkeys([*TRUTH, "prediction"], 0)
    trials = 60
    for _ in range(trials):
        losses = truth(tokens) + random.normal(0, 0.01, len(tokens))
        law = kwm.fit_scaling_law(tokens, losses, confidence=0.9)
        for name, value in TRUTH.items():
            low, high = law.intervals[name]
            hits[name] += low <= value <= high
        _, low, high = law.predict(new)
        hits["prediction"] += low <= truth(new) + random.normal(0, 0.01) <= high
    # Three standard deviations of a binomial are 0.12.
    for name, count in hits.items():
        assert 0.78 <= count / trials <= 1.0, (name, count)


def test_no_floor_is_a_fit_on_the_edge():
    # Losses that fall faster than any power law with a floor.
    losses = [4.441, 4.291, 4.188, 4.110]
    law = kwm.fit_scaling_law([3072, 6144, 9216, 12800], losses)
    assert law.L_inf == 0.0
    assert law.intervals["L_inf"][0] == 0.0
    law = kwm.fit_scaling_law(TOKENS, 40 * TOKENS**-0.2)
    assert law.beta == pytest.approx(0.2, rel=1e-2)
    assert law.L_inf == pytest.approx(0.0, abs=0.2)


def test_wrong_arguments(monkeypatch):
    for tokens, losses, message in (
        (TOKENS[:3], [3.0, 2.0, 1.5], "4 different budgets"),
        (TOKENS, [5, 4, 3], "one length"),
        (TOKENS, [5, 4, 3, 2, 1, np.nan], "`losses` must be positive, finite"),
        (-TOKENS, [6, 5, 4, 3, 2, 1], "`tokens` must be positive, finite"),
        ([], [], "`tokens` must be positive, finite"),
        (TOKENS, [1, 2, 3, 4, 5, 6], "must fall"),
        (TOKENS, [2.0] * 6, "must fall"),
    ):
        with pytest.raises(ValueError, match=message):
            kwm.fit_scaling_law(tokens, losses)
    for confidence in (0.0, 1.0, "0.9"):
        with pytest.raises(ValueError, match="`confidence`"):
            kwm.fit_scaling_law(TOKENS, truth(TOKENS), confidence)
    with pytest.raises(ValueError, match="`tokens` must be positive"):
        kwm.fit_scaling_law(TOKENS, truth(TOKENS)).predict([1e5, 0])
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ImportError, match="pip install scipy"):
        kwm.fit_scaling_law(TOKENS, truth(TOKENS))
