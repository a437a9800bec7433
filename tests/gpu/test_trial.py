"""The choice between both products, by fake products and a fake clock."""

import numpy as np
import pytest

from keras_weightmods.native.gpu import trial as trials
from keras_weightmods.native.gpu.trial import Plan, Tried

pytestmark = pytest.mark.one_backend

KERNEL = np.float32([[1, 2], [0, 3], [4, 0], [0, 0]])


@pytest.fixture
def run(monkeypatch):
    """Try with a clock on which cuSPARSELt gains so much, by rows."""

    def run(sparse, gains):
        def seconds(multiply, weights, x, wait):
            gain = gains[len(x)] if multiply is sparse else 1
            return 2e-6 * len(x) / gain

        def dense(x, kernel):
            return x @ kernel

        monkeypatch.setattr(trials, "seconds", seconds)
        x = np.ones((64, 4), "float32")
        return trials.trial(x, (dense, KERNEL), (sparse, KERNEL), None)

    return run


def test_the_faster_product_by_rows(run):
    plan = run(np.matmul, {1: 0.2, 16: 1.02, 64: 1.5})
    # 1.02 may be noise.
    assert [t.method for t in plan.tried] == ["dense", "dense", "cusparselt"]
    assert plan.companions == ("dense", "cusparselt")
    assert plan.is_sparse
    # The times stand for fewer rows, and the last ones for more.
    for rows, method in ((1, "dense"), (17, "cusparselt"), (999, "cusparselt")):
        assert plan.method(rows) == method
        assert plan.why(rows).startswith(f"{method}: with ")
    assert plan.why(30) == (
        "cusparselt: with 64 rows cuSPARSELt took 85.3 us on this GPU, the "
        "dense product 128.0 us"
    )
    assert Tried(1, 2.0, 2.0).method == "dense"
    # One companion where one product is always faster.
    plan = run(np.matmul, {1: 0.5, 16: 0.5, 64: 0.5})
    assert plan.companions == ("dense",)
    assert not plan.is_sparse
    # Rounding to 16 bits is no failure.
    plan = run(lambda x, w: x @ w * (1 + 2**-8), {1: 2, 16: 2, 64: 2})
    assert plan.companions == ("cusparselt",)


def raises(x, kernel):
    raise RuntimeError("an error of cuSPARSELt")


@pytest.mark.parametrize(
    ("sparse", "reason"),
    [
        (lambda x, kernel: x @ kernel + 0.6, "Error: a result is off"),
        (lambda x, kernel: x @ kernel * np.nan, "off by nan"),
        (lambda x, kernel: (x @ kernel)[:, :1] + 9, "off by"),
        (raises, "RuntimeError: an error of cuSPARSELt"),
    ],
)
def test_a_product_that_fails_is_dense_and_warned_of(run, sparse, reason):
    with pytest.warns(UserWarning, match=f"with 1 rows.*{reason}"):
        plan = run(sparse, {1: 9, 16: 9, 64: 9})
    assert plan.companions == ("dense",)
    assert plan.method(64) == "dense"
    assert plan.why(64).startswith("dense: cuSPARSELt failed: ")


def test_nothing_is_tried_without_need(monkeypatch):
    reason = trials.reason_for_dense
    assert reason((64, 32), "bfloat16") == ""
    assert "does not multiply float32" in reason((64, 32), "float32")
    assert "does not multiply int8" in reason((64, 32), "int8")
    assert "not multiples of 16" in reason((64, 24), "bfloat16")
    assert "not multiples" in reason((0, 32), "bfloat16")
    monkeypatch.setenv(trials.VARIABLE, "dense")
    plan = trials.plan((64, 32), "bfloat16", None, None)
    assert plan == Plan((), trials.reason_for_dense((64, 32), "bfloat16"))
    assert plan.why(1).startswith("dense: the environment variable")
    assert plan.companions == ("dense",)


def test_the_clock_goes_through_all_weights_and_waits():
    seen, waited = [], []

    def multiply(x, weight):
        seen.append(weight)

    seconds = trials.seconds(multiply, [*range(12)], None, waited.append)
    assert seconds >= 0
    assert seen == [*range(12)] * 4
    assert len(waited) == 4


def test_sample_is_sparse_and_exact():
    x, kernel = trials.sample(20, (64, 300))
    assert (x.shape, kernel.shape) == ((20, 64), (64, 300))
    assert (np.count_nonzero(kernel.reshape(16, 4, 300), axis=1) == 2).all()
    assert np.abs(x).max() == 1
    assert len(np.unique(kernel[:, :3], axis=1).T) == 3
    np.testing.assert_array_equal(x @ kernel, x.astype("float64") @ kernel)
