"""The numbers that pictures show; gallery.md draws all of them."""

import sys
import types

import keras
import numpy as np
import pytest

import keras_weightmods as kwm
from tests import references
from tests.models import mlp, normal

pyplot = pytest.importorskip("matplotlib.pyplot")

pytestmark = pytest.mark.one_backend


@pytest.fixture(autouse=True)
def close():
    yield
    pyplot.close("all")


def drawn_in(function, *args, **kwargs):
    """Return the axes, which must be those that were given."""
    ax = pyplot.subplots()[1]
    assert function(*args, ax=ax, **kwargs) is ax
    return ax


def test_kernel():
    weights = normal(4, 3, 8)
    projected = kwm.ops.nm_project(weights, "2:4", (0, 1))
    ax = drawn_in(kwm.plot.kernel, projected, axis=(0, 1), rows=8, columns=5)
    image = ax.images[0].get_array()
    matrix = np.asarray(projected).reshape(12, 8)[:8, :5]
    assert np.array_equal(image.filled(0), matrix)
    assert np.array_equal(np.ma.getmaskarray(image), matrix == 0)
    # A line between two groups of four.
    assert [line.get_ydata()[0] for line in ax.lines] == [3.5]
    assert "of 12 x 8, 50% zeros" in ax.get_title()


def test_distribution_takes_models():
    model = mlp()
    kernels = [w for w in model.get_weights() if w.ndim == 2]
    for weights in (
        model,
        kernels,
        np.concatenate([k.ravel() for k in kernels]),
    ):
        ax = drawn_in(kwm.plot.distribution, weights, bins=9)
        xy = ax.patches[0].get_xy()
        most = max(np.abs(k).max() for k in kernels)
        assert xy[:, 0].min() == pytest.approx(-most)
        assert xy[:, 0].max() == pytest.approx(most)
    ax = drawn_in(kwm.plot.distribution, kernels, [k / 2 for k in kernels])
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["before", "after"]


def test_density():
    model = mlp(8, 16, 6, 4)
    kwm.sparsify(model, "2:4", targets=[model.layers[0]], verbose=0)
    ax = drawn_in(kwm.plot.density, model, "2:4")
    assert [bar.get_width() for bar in ax.patches] == [0.5, 1, 1]
    (kept,) = ax.lines
    kernel = model.layers[1].kernel
    kernel = np.abs(keras.ops.convert_to_numpy(kernel))
    mask = references.nm_mask(kernel, 2, 4, (0,))
    share = kernel[mask].sum() / kernel.sum()
    # The third kernel does not divide into groups of four.
    assert kept.get_xdata()[:2] == pytest.approx([1, share])
    assert np.isnan(kept.get_xdata()[2])
    assert len(kwm.plot.density(model, None).lines) == 0


def test_bits():
    x = np.random.default_rng(0).normal(size=(64, 8)).astype("float32")
    report = kwm.quantize(mlp(8, 16, 6), x, 3.5, refine=None, verbose=0)
    ax = drawn_in(kwm.plot.bits, report)
    widths = [bar.get_width() for bar in ax.patches]
    assert widths == [row.bits for row in report.kernels]
    with pytest.raises(ValueError, match="`report` must be what `quantize`"):
        kwm.plot.bits(kwm.sparsify(mlp(8, 16, 4), "2:4", verbose=0))


def test_runs():
    logs = {"kept_share": [0.5, 1.0], "mask_flips": [0.25, 0.0]}
    history = types.SimpleNamespace(history=logs)
    ax = drawn_in(kwm.plot.sparsity_run, history)
    right = ax.figure.axes[1]
    assert list(ax.lines[0].get_ydata()) == logs["kept_share"]
    assert list(right.lines[0].get_ydata()) == logs["mask_flips"]
    refreshes = [
        types.SimpleNamespace(step=step, changed=changed)
        for step, changed in ((10, 0.25), (20, 0.5))
    ]
    ax = drawn_in(kwm.plot.mask_overlap, refreshes)
    points = ax.lines[0].get_xydata().tolist()
    assert points == [[10, 0.75], [20, 0.5]]


def test_scaling_draws_the_law():
    tokens = np.array([1e4, 2e4, 4e4, 8e4])
    law = kwm.ScalingLaw(2.0, 100.0, 0.5, {}, 0.95, 0.0)
    ax = drawn_in(kwm.plot.scaling, tokens, np.exp(2 + 100 / tokens**0.5), law)
    x, y = ax.lines[1].get_data()
    assert y == pytest.approx(np.exp(2 + 100 / x**0.5))
    assert x[0] < 1e4
    assert x[-1] > 8e4


def test_speed_groups_by_kind():
    rows = [
        {"name": "a", "perplexity": 1, "tokens_per_second": 9, "kind": "x"},
        {"name": "b", "perplexity": 2, "tokens_per_second": 8, "kind": "y"},
        {"name": "c", "perplexity": 3, "tokens_per_second": 7, "kind": "x"},
    ]
    ax = drawn_in(kwm.plot.speed, iter(rows))
    points = [dots.get_offsets().tolist() for dots in ax.collections]
    assert points == [[[1, 9], [3, 7]], [[2, 8]]]
    assert [text.get_text() for text in ax.texts] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: kwm.plot.kernel(normal(4, 4), "4:2"), "'n:m'"),
        (lambda: kwm.plot.kernel(normal(4, 4), rows=0), "`rows`"),
        (lambda: kwm.plot.sparsity_run({"loss": [1]}), "`SparsityMonitor`"),
        (lambda: kwm.plot.mask_overlap([]), "a refresh"),
        (lambda: kwm.plot.scaling([1, 2], [1]), "`tokens`"),
        (lambda: kwm.plot.speed([{"name": "a"}]), "`rows`"),
    ],
)
def test_errors(call, match):
    with pytest.raises(ValueError, match=match):
        call()
    assert not pyplot.get_fignums()


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        kwm.plot.kernel(normal(4, 4))
