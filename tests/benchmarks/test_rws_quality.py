import argparse

import keras
import pytest

from benchmarks import harness, rws_quality
from benchmarks.pages import tuning
from examples.data import robust_nets
from examples.data.digits import load_digits

pytestmark = pytest.mark.one_backend

pytest.importorskip("scipy")


@pytest.fixture
def log():
    accuracies = {
        "clean": (0.9, 0.4),
        "robust": (0.85, 0.8),
        "patched": (0.88, 0.7),
        "continued": (0.92, 0.5),
        "continued, patched": (0.91, 0.65),
    }
    rows = [
        {
            "net": "vgg_like",
            "seed": seed,
            "data": "mnist",
            "corruption": corruption,
            "model": model,
            "on_clean": on_clean,
            # The second seed's patch closes 0.1 more.
            "corrupted": corrupted + 0.04 * seed * (model == "patched"),
        }
        for seed in (0, 1)
        for corruption in ("contrast", "pixelate")
        for model, (on_clean, corrupted) in accuracies.items()
    ]
    # Where robust training gains next to nothing, no share is large.
    pixelate = {"clean": 0.4, "robust": 0.41, "patched": 0.39}
    for row in rows:
        if row["corruption"] == "pixelate":
            row["corrupted"] = pixelate.get(row["model"], 0.4)
    matrix = [[0.8, 0.1], [0.3, 0.2]]
    return {
        "rows": rows,
        "cosines": [
            {"net": "vgg_like", "seed": seed, "matrix": matrix}
            for seed in (0, 1)
        ],
        "bytes": {"vgg_like": {"model": 100, "patched": 10}},
        "epochs": 1,
        "test_images": 10,
        "statistics": "average",
        "backend": "torch",
        "machine": "one",
    }


def test_shares_of_the_gap_by_seed(log):
    found = rws_quality.by_seed(log["rows"])
    patched = found["vgg_like", "patched"]
    assert patched["share"] == pytest.approx([0.29 / 0.41, 0.33 / 0.41])
    assert patched["corrupted"] == pytest.approx([0.545, 0.565])
    assert patched["on_clean"] == pytest.approx([-0.02, -0.02])
    # Of what was trained on, the gap begins where it is.
    later = found["vgg_like", "continued, patched"]
    assert later["share"] == pytest.approx([0.15 / 0.31] * 2)
    assert later["on_clean"] == pytest.approx([-0.01, -0.01])


def test_cosines_and_the_nearest(log):
    found = rws_quality.cosine_rows(log["cosines"])["vgg_like"]
    assert found["own"] == pytest.approx([0.5, 0.5])
    assert found["other"] == pytest.approx([0.2, 0.2])
    assert found["found"] == pytest.approx([0.5, 0.5])


def test_interval_over_seeds():
    # Student's t for two degrees of freedom and 95 %, from a table.
    half = 4.302653 * 0.1 / 3**0.5
    low, high = 0.5 - half, 0.5 + half
    expected = f"0.50 ({low:.2f} to {high:.2f})"
    assert rws_quality.cell([0.4, 0.5, 0.6]) == expected
    assert rws_quality.cell([0.4]) == "0.40"


def tiny():
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((16, 16, 1)),
            layers.Conv2D(4, 3, strides=4, name="stem"),
            layers.BatchNormalization(name="stem_norm"),
            layers.Flatten(),
            layers.Dense(10, name="head"),
        ]
    )


def test_a_study_of_few_images(tmp_path, monkeypatch):
    few = dict.fromkeys(rws_quality.SOURCES, (load_digits, 64, 64, 10))
    monkeypatch.setattr(robust_nets, "SOURCES", few)
    monkeypatch.setattr(robust_nets, "NETS", {"tiny": (tiny, {"depth": 1})})
    parts = {"7 layers": {"depth": 2}}
    monkeypatch.setitem(rws_quality.DEPTHS, "tiny", parts)
    file = tmp_path / "log.json"
    args = argparse.Namespace(
        nets=["tiny"],
        corruptions=["contrast", "shot noise"],
        seeds="0",
        pretrain_epochs=1,
        epochs=1,
        test_images=8,
        backend=keras.backend.backend(),
        fresh=False,
        json=file,
    )
    log = rws_quality.run(args)
    assert harness.read_json(file)["rows"] == log["rows"]
    page = tuning.rws_quality(log)
    others = {name for net in robust_nets.DEPTHS.values() for name in net}
    for _, names in rws_quality.CLAIMS:
        for name in {*names} - (others - {*parts}) - {"statistics: average"}:
            assert f"| {name} | " in page
    # Nothing is made anew.
    assert rws_quality.run(args)["rows"] == log["rows"]
    args.test_images = 9
    with pytest.raises(SystemExit, match="another setting"):
        rws_quality.run(args)
