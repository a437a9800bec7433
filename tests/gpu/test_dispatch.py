import json

import pytest

from keras_weightmods.native.gpu import dispatch
from keras_weightmods.native.gpu.dispatch import Measured, Plan

pytestmark = pytest.mark.one_backend


def entries(**times):
    """Entries of one product: for each method its times by rows."""
    sizes = {"framework": "jax", "k": 4096, "n": 4096, "algorithm": 3}
    dtypes = {"x_dtype": "bfloat16", "value_dtype": "bfloat16"}
    found = []
    for i, rows in enumerate((1, 16, 256)):
        measured = {k: t[i] for k, t in times.items() if t[i] is not None}
        own = {"rows": rows, "microseconds": measured}
        found.append({**sizes, **dtypes, **own})
    return found


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """Plans by a table that holds the entries for the device "card"."""

    def make(found, shape=(4096, 4096), device="card", dtype="bfloat16"):
        path = tmp_path / "table.json"
        path.write_text(json.dumps({"devices": {"card": found}}))
        monkeypatch.setenv(dispatch.TABLE_VARIABLE, str(path))
        dispatch.table.cache_clear()
        dispatch.plan.cache_clear()
        return dispatch.plan("jax", device, shape, dtype, dtype)

    yield make
    dispatch.table.cache_clear()
    dispatch.plan.cache_clear()


def test_table_of_the_package_is_valid():
    package = dispatch.pathlib.Path(dispatch.__file__)
    dispatch.read_table(package.with_name("dispatch.json"))


def test_unmeasured_is_dense(plan):
    found = entries(dense=[9, 9, 9], decode=[1, 1, 1], cusparselt=[1, 1, 1])
    for unknown in (
        plan([]),
        plan(found, device="another card"),
        plan(found, device=None),
        plan(found, shape=(4096, 1024)),
        plan(found, shape=(0, 4096)),
        plan(found, dtype="float16"),
    ):
        assert not unknown.is_sparse
        assert unknown.companion == "dense"
        assert unknown.choose(1) == ("dense", -1)


def test_near_shape_stands_for_others(plan):
    found = entries(dense=[9, 9, 9], decode=[1, 1, None])
    assert plan(found, shape=(4096, 6144)).choose(1)[0] == "decode"


def test_method_that_does_not_fit_is_left_out(plan):
    found = entries(dense=[9, 9, 9], decode=[1, 1, 1], cusparselt=[1, 1, 1])
    assert plan(found, shape=(4096, 4100)).companion == "dense"
    assert plan(found, shape=(4097, 4096)).choose(1)[0] == "dense"


def test_decode_and_cusparselt(plan):
    times = {"decode": [4, 8, None], "cusparselt": [8, 7, 5]}
    both = plan(entries(dense=[9, 9, 9], **times))
    assert both.is_sparse
    assert both.companion == "cusparselt"
    assert both.choose(1, "cusparselt") == ("decode", -1)
    # As many rows as were measured, or the next number above.
    assert both.choose(2, "cusparselt") == ("cusparselt", 3)
    assert both.choose(256, "cusparselt") == ("cusparselt", 3)
    assert both.choose(4096, "cusparselt") == ("cusparselt", -1)
    # Without the companion.
    assert both.choose(1) == ("decode", -1)
    assert both.choose(16) == ("decode", -1)
    assert both.choose(17) == ("dense", -1)


def test_companion_is_dense_where_cusparselt_would_lose_somewhere(plan):
    times = {"decode": [4, 12, None], "cusparselt": [9, 11, 5]}
    some = plan(entries(dense=[9, 9, 9], **times))
    assert some.is_sparse
    assert some.companion == "dense"
    assert some.choose(1, "dense") == ("decode", -1)
    assert some.choose(16, "dense") == ("dense", -1)
    assert some.choose(256, "dense") == ("dense", -1)


@pytest.mark.parametrize("companion", ["dense", "cusparselt"])
def test_no_choice_is_slower_than_dense(companion):
    for decode in (1.0, 9.0, 20.0, None):
        for cusparselt in (1.0, 9.0, 20.0, None):
            times = {"dense": 10.0, "decode": decode, "cusparselt": cusparselt}
            times = {k: t for k, t in times.items() if t is not None}
            plan = Plan((Measured(4, times),))
            if plan.companion == companion:
                method, _ = plan.choose(3, companion)
                assert times[method] <= 10.0


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}"]
    + [f'{{"devices": {x}}}' for x in ("[]", '{"card": [{}]}', '{"card": 3}')],
)
def test_not_a_table(tmp_path, text):
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"is no table of GPU timings"):
        dispatch.read_table(path)


@pytest.mark.parametrize(
    "change",
    [
        {"microseconds": {"decode": 1.0}},
        {"microseconds": {"dense": 0}},
        {"microseconds": {"dense": 1.0, "magic": 1.0}},
        {"rows": 0},
        {"rows": "1"},
        {"algorithm": None},
    ],
)
def test_not_an_entry(tmp_path, change):
    entry = {**entries(dense=[9, 9, 9])[0], **change}
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"devices": {"card": [entry]}}))
    with pytest.raises(ValueError, match="an entry must have"):
        dispatch.read_table(path)
