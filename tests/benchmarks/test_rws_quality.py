import argparse

import keras
import pytest

from benchmarks import harness, rws_quality
from benchmarks.pages import tuning
from examples.data import robust_nets
from examples.data.digits import load_digits

pytestmark = pytest.mark.one_backend

pytest.importorskip("scipy")


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
