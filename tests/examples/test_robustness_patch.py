import keras
import numpy as np
import pytest
import robust_nets
import robustness_patch
from corruptions import (
    CORRUPTIONS,
    SEVERITIES,
    corrupt,
    load_digits,
    load_mnist,
)
from rich.console import Console

from keras_weightmods import WeightSignature


def test_images():
    for load, count in ((load_mnist, 5000), (load_digits, 1797)):
        images, labels = load()
        assert images.shape == (count, 16, 16, 1)
        assert images.dtype == "float32"
        assert 0 == images.min() < images.max() <= 1
        assert np.bincount(labels).min() > 0.08 * count


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruptions(name):
    images = load_digits()[0][:50]
    distances = []
    for severity in SEVERITIES:
        got = corrupt(images, name, severity, seed=1)
        assert got.shape == images.shape
        assert got.dtype == "float32"
        assert 0 <= got.min() < got.max() <= 1
        np.testing.assert_array_equal(
            got, corrupt(images, name, severity, seed=1)
        )
        distances.append(np.abs(got - images).mean())
    assert distances == sorted(distances)
    assert distances[0] > 0.01
    mixed = corrupt(images, name, np.repeat(SEVERITIES, 10), seed=1)
    change = np.abs(mixed - images).reshape(5, -1).mean(axis=1)
    assert change[0] < change[-1]


def test_no_image_is_in_two_parts():
    data = robust_nets.load_data(seed=3)
    seen = [
        image.tobytes()
        for part in (
            data["pretrain"],
            *(data[s][p] for s in ("mnist", "digits") for p in data[s]),
        )
        for image in part[0]
    ]
    assert len(set(seen)) > 0.999 * len(seen)
    other = robust_nets.load_data(seed=4)
    np.testing.assert_array_equal(data["pretrain"][0], other["pretrain"][0])
    assert not np.array_equal(
        data["mnist"]["test"][0], other["mnist"]["test"][0]
    )


def test_nets_and_their_shallow_parts():
    found = {}
    for name, (make, shallow) in robust_nets.NETS.items():
        model = make()
        signature = WeightSignature.extract(
            None, model, model.get_weights(), **shallow
        )
        found[name] = {e.info.path.split("/")[0] for e in signature}
        assert signature.model_nbytes > 8 * signature.nbytes
    vgg, resnet = found["vgg_like"], found["resnet_like"]
    assert len(vgg) == 7
    assert "block3_conv3" in vgg
    assert {name.split("_")[0] for name in resnet} == {
        "stem",
        "stage1",
        "stage2",
    }


@pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="compiling takes the time"
)
def test_fine_tuning_starts_where_it_is_told():
    images, labels = load_digits()
    model = robust_nets.make_vgg()
    start = model.get_weights()
    arguments = (model, start, images[:64], labels[:64], 1)
    first = robust_nets.fine_tune(*arguments, "contrast", seed=0)
    again = robust_nets.fine_tune(*arguments, "contrast", seed=0)
    clean = robust_nets.fine_tune(*arguments, None, seed=0)
    np.testing.assert_array_equal(first[0], again[0])
    assert not np.array_equal(first[0], clean[0])
    tests = robust_nets.Tests(images[:20], labels[:20], ["contrast"], seed=0)
    assert tests.images["contrast"].shape == (100, 16, 16, 1)
    assert 0 <= tests.accuracy(model, first, "contrast") <= 1


def test_tables_and_plots(tmp_path):
    names = list(CORRUPTIONS)
    row = {
        "clean": 0.2,
        "robust": 0.8,
        "scales": {s: [0.9, s / 2] for s in robustness_patch.SCALES},
        "matrix": dict.fromkeys(names, 0.65),
        "statistics replaced": 0.7,
    }
    results = {
        "on_clean": 0.95,
        "bytes": {"model": 1000, "float32": 100, "8 bits": 25},
        "corruptions": dict.fromkeys(names, row),
        "similarity": np.eye(len(names)).tolist(),
    }
    console = Console(width=100)
    with console.capture() as capture:
        console.print(*robustness_patch.tables("resnet_like", results))
    for part in ("0.75", "65.0%", "70.0%", "40.0", "95.0%"):
        assert part in capture.get(), part
    robustness_patch.plot(results, names, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "corruption_by_signature.png",
        "scale.png",
        "similarity.png",
    ]
