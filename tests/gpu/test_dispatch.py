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
        assert unknown.companions == ("dense",)
        for rows in (1, 10_000):
            assert unknown.choose(rows, ("dense",)) == ("dense", -1)
            assert unknown.choose(rows) == ("dense", -1)
            assert unknown.why(rows).startswith("dense: ")


def test_near_shape_stands_for_others(plan):
    found = entries(dense=[9, 9, 9], decode=[1, 1, None])
    assert plan(found, shape=(4096, 6144)).choose(1)[0] == "decode"


def test_method_that_does_not_fit_is_left_out(plan):
    found = entries(dense=[9, 9, 9], decode=[1, 1, 1], cusparselt=[1, 1, 1])
    assert plan(found, shape=(4096, 4100)).companions == ("dense",)
    odd = plan(found, shape=(4097, 4096))
    assert odd.companions == ("dense",)
    assert odd.choose(1)[0] == "decode"


def test_decode_and_cusparselt(plan):
    times = {"decode": [4, 8, None], "cusparselt": [8, 7, 5]}
    both = plan(entries(dense=[9, 9, 9], **times))
    assert both.is_sparse
    assert both.companions == ("cusparselt",)
    compressed = ("cusparselt",)
    assert both.choose(1, compressed) == ("decode", -1)
    # As many rows as were measured, or the next number above.
    assert both.choose(2, compressed) == ("cusparselt", 3)
    assert both.choose(256, compressed) == ("cusparselt", 3)
    assert both.choose(4096, compressed) == ("cusparselt", -1)
    # Without the companion.
    assert both.choose(1) == ("decode", -1)
    assert both.choose(16) == ("decode", -1)
    assert both.choose(17) == ("dense", -1)
    assert "decode 2.25x, cusparselt 1.12x" in both.why(1)
    assert "measured on this GPU's model at 4096 x 4096" in both.why(1)


def test_each_companion_is_used_where_it_wins(plan):
    """On an H100 cuSPARSELt loses below some number of rows."""
    times = {"decode": [4, 12, None], "cusparselt": [9, 11, 5]}
    some = plan(entries(dense=[9, 9, 9], **times))
    both = some.companions
    assert both == ("dense", "cusparselt")
    assert some.choose(1, both) == ("decode", -1)
    assert some.choose(16, both) == ("dense", -1)
    assert some.choose(256, both) == ("cusparselt", 3)
    assert some.choose(257, both) == ("cusparselt", -1)
    assert some.choose(256, ("dense",)) == ("dense", -1)
    assert some.why(16).startswith("dense: over dense decode 0.75x")


def test_more_rows_than_the_decode_kernel_takes_are_dense(plan):
    only = plan(entries(dense=[9, 9, 9], decode=[4, 4, 4]))
    assert only.companions == ("dense",)
    assert only.choose(257, ("dense",)) == ("dense", -1)


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 16, 100])
def test_no_choice_is_slower_than_dense(rows):
    for decode in (1.0, 9.0, 20.0, None):
        for few in (1.0, 9.0, 20.0, None):
            for many in (1.0, 9.0, 20.0):
                times = {"dense": 10.0, "decode": decode, "cusparselt": few}
                times = {k: t for k, t in times.items() if t is not None}
                last = {"dense": 10.0, "cusparselt": many}
                plan = Plan((Measured(4, times), Measured(16, last)))
                method, _ = plan.choose(rows, plan.companions)
                assert (times if rows <= 4 else last)[method] <= 10.0
                assert method in ("decode", *plan.companions)


# By the least figures of the review, in rows: the first that gains, if any.
@pytest.mark.parametrize(
    ("device", "first"),
    [
        ("NVIDIA H100 PCIe", {"bfloat16": 512, "int8": 64}),
        ("NVIDIA H100 80GB HBM3", {"bfloat16": 512, "int8": 64}),
        ("NVIDIA A100-SXM4-80GB", {"bfloat16": 64}),
        ("NVIDIA L4", {}),
    ],
)
def test_published_figures(plan, device, first):
    for dtype in ("bfloat16", "int8", "float16", "float32"):
        found = plan([], device=device, dtype=dtype)
        assert found.is_sparse == found.is_published == (dtype in first)
        for rows in (1, 63, 64, 65, 256, 511, 512, 1024, 100_000):
            method, algorithm = found.choose(rows, found.companions)
            assert algorithm == -1
            expected = rows >= first.get(dtype, rows + 1)
            assert method == ("cusparselt" if expected else "dense")
            said = "not measured by this library" in found.why(rows)
            assert said == (dtype in first)


def test_dense_products_alone(plan, monkeypatch):
    plan([])
    monkeypatch.setenv(dispatch.TABLE_VARIABLE, "dense")
    dispatch.table.cache_clear()
    dispatch.plan.cache_clear()
    kind = "jax", "NVIDIA H100 PCIe", (4096, 4096), "bfloat16", "bfloat16"
    found = dispatch.plan(*kind)
    assert not found.is_sparse
    assert dispatch.TABLE_VARIABLE in found.why(4096)
    assert dispatch.table() == {}


def test_without_a_method(plan):
    times = {"decode": [4, 8, None], "cusparselt": [8, 7, 5]}
    some = plan(entries(dense=[9, 9, 9], **times))
    left = some.without("cusparselt", "it failed")
    assert left.companions == ("dense",)
    both = "dense", "cusparselt"
    assert left.choose(1, both) == ("decode", -1)
    assert left.choose(256, both) == ("dense", -1)
    assert left.choose(256, ("cusparselt",)) == ("dense", -1)
    assert "without cusparselt: it failed" in left.why(256)


def test_where_published_figures_say_nothing(plan):
    for elsewhere in (
        plan([], device="NVIDIA H100 PCIe", shape=(1024, 4096)),
        plan([], device="NVIDIA H100 PCIe", shape=(4096, 4100)),
        # What was measured on this card counts alone.
        plan(
            entries(dense=[9, 9, 9], decode=[1, 1, 1]),
            device="card",
            shape=(16384, 16384),
        ),
    ):
        assert not elsewhere.is_sparse
        assert elsewhere.companions == ("dense",)


def test_values_that_no_product_on_a_gpu_takes():
    kind = "torch", "NVIDIA H100 PCIe", (4096, 4096), "bfloat16"
    assert not dispatch.plan(*kind, "float64").is_sparse
    assert "float64" in dispatch.why(*kind, "float64", rows=512)
    rounded = *kind[:3], "int8"
    assert dispatch.plan(*rounded, "int8").is_sparse
    for value_dtype in ("float32", "bfloat16", "int4"):
        assert not dispatch.plan(*rounded, value_dtype).is_sparse


def test_decode_takes_any_shape():
    for x_dtype in ("float32", "bfloat16", "float16", "int8"):
        assert dispatch.fits("decode", (33, 5), x_dtype)


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
