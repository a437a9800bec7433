"""The bits of each kernel, under a budget."""

import itertools

import keras
import numpy as np
import pytest

import keras_weightmods as kwm
from keras_weightmods.quantization import budget
from keras_weightmods.utils.dtypes import bytes_of
from tests import models, references
from tests.models import numpy
from tests.quantization.test_head import SIZES, TOKENS, make
from tests.quantization.test_quantize import data, kernels_of, quantize

one_backend = pytest.mark.one_backend


@one_backend
def test_a_choice_is_within_a_step_of_the_best():
    rng = np.random.default_rng(0)
    for _ in range(50):
        sizes = np.cumsum(rng.integers(1, 9, (4, 4)), axis=1)
        losses = -np.sort(-rng.exponential(size=(4, 4)), axis=1)
        total = rng.integers(sizes[:, 0].sum(), sizes[:, -1].sum() + 1)
        chosen = budget.choose(sizes.tolist(), losses.tolist(), total)
        found = [
            (sizes[range(4), each].sum(), losses[range(4), each].sum())
            for each in itertools.product(range(4), repeat=4)
        ]
        size, loss = (x[range(4), chosen].sum() for x in (sizes, losses))
        assert size <= total
        step = (sizes[:, -1] - sizes[:, 0]).max()
        within = [lost for s, lost in found if s <= total - step]
        assert loss <= min(within, default=np.inf) + 1e-9


# JAX compiles for 9 seconds.
@one_backend
def test_losses_of_a_language_model_are_by_its_fisher_information(monkeypatch):
    """Against the mean over all tokens, not one that is drawn."""
    model, table = make("dense")
    table.assign(0.1 * table)
    dense = model.get_layer("dense")
    tokens = np.random.default_rng(1).integers(40, size=(256, 12))
    monkeypatch.setattr(budget, "_POSITIONS", 10**6)
    embedding = model.get_layer("embedding").embeddings
    x = numpy(embedding).astype("float64")[models.split(tokens)[0]]
    x = x.reshape(-1, x.shape[-1])
    hidden = np.tanh(x @ numpy(dense.kernel) + numpy(dense.bias))
    logits = hidden * SIZES @ numpy(table)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    expected = {}
    # The mean over y of (e_y - p)^2 at each position, and through the head.
    variance = p * (1 - p)
    fisher = (hidden * SIZES).T ** 2 @ variance / len(x)
    w = numpy(table).astype("float64")
    change = [references.nearest(w, b) - w for b in (2, 4)]
    expected["head"] = [np.sum(fisher * d**2) / 2 for d in change]
    mean = p @ w.T
    spread = p @ (w.T**2) - mean**2
    spread = spread * (SIZES * (1 - hidden**2)) ** 2
    fisher = (x**2).T @ spread / len(x)
    kernel = numpy(dense.kernel)
    change = [references.nearest(kernel, b) - kernel for b in (2, 4)]
    expected["dense"] = [np.sum(fisher * d**2) / 2 for d in change]
    seen = []

    def choose(sizes, losses, total):
        seen.extend(losses)
        raise KeyboardInterrupt

    monkeypatch.setattr(budget, "choose", choose)
    before = models.weights_of(model)
    with pytest.raises(KeyboardInterrupt):
        kwm.quantize(model, tokens, 3.0, refine=None, verbose=0)
    models.assert_same(models.weights_of(model), before)
    # The head comes first.
    for name, losses in zip(("head", "dense"), seen, strict=True):
        received = [losses[budget.WIDTHS.index(b)] for b in (2, 4)]
        np.testing.assert_allclose(received, expected[name], rtol=0.15)


@one_backend
def test_losses_of_other_models_are_by_the_squared_error(monkeypatch):
    model = models.randomize(models.sequential((72,), keras.layers.Dense(8)))
    x, (kernel,) = data(2048), kernels_of(model)
    fit = models.split(x)[0].astype("float64")
    y = fit @ kernel + numpy(model.layers[0].bias)
    energy = np.sum(y**2, axis=-1)
    curvature = np.mean(fit**2 / energy[:, None], axis=0)[:, None]
    monkeypatch.setattr(budget, "choose", lambda s, losses, _: seen(losses))

    def seen(losses):
        change = references.nearest(kernel, 3) - kernel
        error = np.sum(curvature * change**2)
        assert losses[0][1] == pytest.approx(error, rel=0.15)
        return [1]

    monkeypatch.setattr(budget, "_POSITIONS", 10**6)
    assert quantize(model, x, bits=4.0).bits == 3


@one_backend
@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("tied", (5_000, "0.006MB", "8 kB")),
        ("untied", (20_500, 21_500, 23_000)),
    ],
)
def test_a_model_fits_into_its_size(kind, sizes):
    """The bytes are those that packing gives; more bytes lose less."""
    losses = []
    for size in sizes:
        model, _ = make(kind)
        report = kwm.quantize(model, TOKENS, size=size, refine=None, verbose=0)
        bits = {row.bits for row in report.kernels}
        assert report.size <= budget.bytes_in(size)
        assert min(bits) <= report.bits <= max(bits)
        after = models.weights_of(model)
        packed = kwm.pack(model, activations="int8", verbose=0)
        assert bytes_of(model.weights) == report.size
        assert not any(each.rounding_error for each in packed.weights)
        kwm.unpack(model)
        models.assert_same(models.weights_of(model), after)
        losses.append(report.held_out[1])
    assert losses[0] > losses[1] > losses[2]
    assert "MB once packed" in str(report)


@one_backend
def test_what_packing_leaves_in_floats_counts_as_such():
    layers = keras.layers.LSTM(64), keras.layers.Dense(64)
    model = models.randomize(models.sequential((5, 64), *layers))
    with pytest.raises(ValueError, match="`size` must be at least"):
        quantize(model, data(5 * 64, 64).reshape(64, 5, 64), size="100kB")
    report = quantize(model, data(320, 64).reshape(64, 5, 64), size="135kB")
    kwm.pack(model, verbose=0)
    assert bytes_of(model.weights) == report.size <= 135_000


@one_backend
@pytest.mark.parametrize("why", ["weights", "float16"])
def test_gradients_that_say_nothing_are_no_budget(why, monkeypatch):
    monkeypatch.setattr(budget, "_POSITIONS", 12)
    model, _ = make("dense")
    weights = np.ones(TOKENS.shape)
    if why == "weights":
        weights[:8] = 0
    else:
        for layer in model.layers:
            layer.dtype_policy = "mixed_float16"
    x, before = (TOKENS, TOKENS, weights), models.weights_of(model)
    with pytest.raises(ValueError, match="Pass `bits` as an int"):
        kwm.quantize(model, x, 3.0, refine=None, verbose=0, batch_size=4)
    models.assert_same(models.weights_of(model), before)


@one_backend
def test_a_kernel_that_hardly_matters_gets_the_fewest():
    inputs = keras.Input((64,))
    first, second = (keras.layers.Dense(64, name=n)(inputs) for n in "ab")
    model = models.randomize(keras.Model(inputs, first + 1e-3 * second))
    report = quantize(model, data(256, 64), bits=4.0)
    bits = {row.path[0]: row.bits for row in report.kernels}
    assert bits == {"a": 6, "b": 2}


@one_backend
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "60 bytes"}, '`size` must be a number of bytes.*"60MB"'),
        ({"size": "12 kB", "bits": 4}, "`bits` must be None where `size`"),
        (
            {"size": "1 kB"},
            "`size` must be at least [0-9,]+ bytes",
        ),
        ({"bits": 1.5}, "`bits` must be a finite float >= 2"),
        ({"bits": 7}, "`bits` must be"),
    ],
)
def test_budgets_that_cannot_be_kept(options, message):
    model, _ = make()
    before = models.weights_of(model)
    with pytest.raises(ValueError, match=message):
        kwm.quantize(model, TOKENS, verbose=0, **options)
    models.assert_same(models.weights_of(model), before)


def test_sizes():
    for size, expected in {
        "60MB": 60_000_000,
        "1.5 GiB": 1_610_612_736,
        "512B": 512,
        "3kB": 3000,
        77: 77,
    }.items():
        assert budget.bytes_in(size) == expected
