"""The choice between both products, by fake products and a fake clock."""

import numpy as np
import pytest

from keras_weightmods.native.gpu import trial as trials
from keras_weightmods.native.gpu.trial import Plan, Product

pytestmark = pytest.mark.one_backend

KERNEL = np.float32([[1, 2], [0, 3], [4, 0], [0, 0]])


def inputs(rows):
    return np.ones((rows, 4), "float32")


def run(sparse, gains, rows=(1, 16, 64)):
    """Try with a clock on which cuSPARSELt gains so much, by rows."""
    clock = {
        "dense": lambda count: 2e-6 * count,
        "sparse": lambda count: 2e-6 * count / gains[count],
    }
    dense = Product(np.matmul, [KERNEL])
    sparse = Product(sparse, [KERNEL])

    def seconds(product, x):
        return clock["dense" if product is dense else "sparse"](len(x))

    return trials.trial(inputs, dense, sparse, seconds, rows)


def test_the_faster_product_by_rows():
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


def raises(x, kernel):
    raise RuntimeError("an error of cuSPARSELt")


@pytest.mark.parametrize(
    ("sparse", "reason"),
    [
        (
            lambda x, kernel: x @ kernel + 0.6,
            "ArithmeticError: a result is off",
        ),
        (lambda x, kernel: x @ kernel * np.nan, "off by nan"),
        (lambda x, kernel: (x @ kernel)[:, :1] + 9, "off by"),
        (raises, "RuntimeError: an error of cuSPARSELt"),
    ],
)
def test_a_product_that_fails_is_dense_and_warned_of(sparse, reason):
    with pytest.warns(UserWarning, match=f"with 1 rows.*{reason}"):
        plan = run(sparse, {1: 9, 16: 9, 64: 9})
    assert plan.companions == ("dense",)
    assert plan.method(64) == "dense"
    assert plan.why(64).startswith("dense: cuSPARSELt failed: ")


def test_nothing_is_tried_without_need(monkeypatch):
    reason = trials.reason_for_dense
    assert reason((64, 32), "bfloat16", "int4") == ""
    assert reason((64, 32), "int8", "int8") == ""
    assert "int8 values alone" in reason((64, 32), "int8", "int4")
    assert "does not multiply float32" in reason((64, 32), "float32", "int8")
    assert "not multiples of 16" in reason((64, 24), "bfloat16", "int8")
    assert "not multiples of 32" in reason((48, 32), "int8", "int8")
    assert "not multiples" in reason((0, 32), "bfloat16", "int8")
    monkeypatch.setenv(trials.VARIABLE, "dense")
    assert "environment variable" in reason((64, 32), "bfloat16", "int4")
    plan = Plan((), "there is a reason")
    assert plan.why(1) == "dense: there is a reason"
    assert plan.companions == ("dense",)


def test_the_clock_goes_through_all_weights_and_waits():
    seen, waited = [], []
    product = Product(lambda x, weight: seen.append(weight), [*range(12)])
    seconds = trials.seconds_by(waited.append)
    assert seconds(product, None) >= 0
    assert seen == [*range(12)] * 4
    assert len(waited) == 4
    # As many as are larger than the cache, by the bytes that are read.
    assert trials.copies(32 * 2**20) == 7
    assert (trials.copies(2**40), trials.copies(1)) == (2, 24)


def test_sample_is_sparse_and_exact():
    x, steps, scale = trials.sample(20, (64, 300))
    assert (x.shape, steps.shape, scale.shape) == ((20, 64), (64, 300), (300,))
    assert (np.count_nonzero(steps.reshape(16, 4, 300), axis=1) == 2).all()
    assert np.abs(x).max() == 1
    assert len(np.unique(steps[:, :3], axis=1).T) == 3
    y = x @ (steps * scale)
    np.testing.assert_array_equal(y, x.astype("float64") @ (steps * scale))
