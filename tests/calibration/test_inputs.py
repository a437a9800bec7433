import keras
import numpy as np
import pytest
from keras import layers, ops

from keras_weightmods import find_targets, sparsify
from keras_weightmods.calibration.inputs import input_norms
from keras_weightmods.core.layer_kinds import GENERATED
from keras_weightmods.core.watched import called_by
from keras_weightmods.sparsity.scaling import attach_scaling
from tests import models
from tests.models import normal, numpy, sequential

one_backend = pytest.mark.one_backend


def root_mean_square(x, kept=(-1,)):
    """Over all axes but `kept`, in float64, flattened in their order."""
    x = np.moveaxis(np.asarray(x, "float64"), kept, range(len(kept)))
    x = x.reshape(*x.shape[: len(kept)], -1)
    return np.sqrt((x**2).mean(axis=-1)).reshape(-1)


def norms_over(model, *batches):
    pairs = [(batch, None) for batch in batches]
    return input_norms(model, find_targets(model), pairs)


def assert_close(norm, expected):
    np.testing.assert_allclose(norm, expected, rtol=1e-5)


def assert_untouched(model):
    for layer in model._flatten_layers():
        assert "call" not in vars(layer)
        assert not hasattr(type(layer), GENERATED)


@one_backend
def test_dense_over_several_batches():
    dense = layers.Dense(8, activation="relu"), layers.Dense(2)
    model = sequential((None, 4), *dense)
    batches = [normal(2, 3, 4), normal(5, 3, 4, seed=1) * 3]
    x = [batch.reshape(-1, 4) for batch in batches]
    x = np.concatenate(x)
    before = models.weights_of(model)
    norms = norms_over(model, *batches)
    for norm, inputs in zip(norms, (x, numpy(dense[0](x))), strict=True):
        assert_close(norm, root_mean_square(inputs))
        assert norm.dtype == np.float32
    models.assert_same(models.weights_of(model), before)
    assert_untouched(model)
    assert norms_over(model) == [None, None]


class Branches(layers.Layer):
    """Calls a layer in a branch, as KerasHub's SAM does."""

    def build(self, input_shape):
        self.one = layers.Dense(4, name="one")
        self.other = layers.Dense(4, name="other")
        self.one.build(input_shape)
        self.other.build(input_shape)

    def call(self, x):
        return ops.cond(
            ops.all(ops.isfinite(x)),
            lambda: self.one(inputs=x),
            lambda: self.other(x),
        )


def test_a_layer_in_a_branch_is_seen():
    model = sequential((4,), Branches(), layers.Dense(2))
    x = normal(8, 4)
    paths = [target.path for target in find_targets(model)]
    norms = dict(zip(paths, norms_over(model, x)))
    (one,), (other,) = (
        [path for path in paths if f"/{name}/" in path]
        for name in ("one", "other")
    )
    assert_close(norms[one], root_mean_square(x))
    assert norms[other] is None
    if keras.backend.backend() == "jax":  # which compiles for long
        return
    report = sparsify(model, "2:4", x, criterion="sparsegpt", verbose=0)
    notes = {kernel.path: kernel.note for kernel in report.kernels}
    assert [p for p, note in notes.items() if "reach" in note] == [other]


def einsum(equation, output_shape):
    return lambda: layers.EinsumDense(equation, output_shape)


@one_backend
@pytest.mark.parametrize(
    ("make", "shape", "kept"),
    [
        (einsum("ab,bc->ac", 6), (4,), [1]),
        (einsum("ab...,bc->ac...", (6, 3, 5)), (4, 3, 5), [1]),
        # The kernel's order of the contracted axes, not the input's.
        (einsum("bhqu,uhm->bqm", (3, 6)), (4, 3, 2), [3, 1]),
        (lambda: layers.Conv2DTranspose(3, 2, strides=2), (4, 4, 8), [3]),
    ],
)
def test_of_each_layer_what_it_contracts(make, shape, kept):
    x = normal(7, *shape)
    model = sequential(shape, make())
    (norms,) = norms_over(model, x[:4], x[4:])
    assert_close(norms, root_mean_square(x, kept))


@one_backend
def test_groups_of_a_convolution():
    layer = layers.Conv2D(8, 1, groups=2, data_format="channels_last")
    x = normal(2, 6, 6, 8)
    (norms,) = norms_over(sequential((6, 6, 8), layer), x)
    squares = root_mean_square(x).reshape(2, 4) ** 2
    assert_close(norms, np.sqrt(squares.mean(axis=0)))


@one_backend
def test_positions_of_weight_zero_are_left_out():
    dense = layers.Dense(8), layers.Dense(2)
    model = sequential((3, 4), dense[0], layers.Flatten(), dense[1])
    x = normal(4, 3, 4)
    weight = np.array([[1, 1, 0], [1, 0, 0], [2, 1, 1], [0, 0, 0]], "float32")
    padded = np.where(weight[..., None] != 0, x, np.nan)
    pairs = [(padded[:3], weight[:3]), (x[3:], weight[3:])]
    first, second = input_norms(model, find_targets(model), pairs)
    assert_close(first, root_mean_square(x[weight != 0]))
    # The last layer sees no time axis.
    assert np.isnan(second).any()

    rows = np.array([1, 0, 1, 0], "float32")
    norms = input_norms(model, find_targets(model), [(x, rows[:, None])])
    flat = numpy(dense[0](x)).reshape(4, -1)
    for norm, inputs in zip(norms, (x, flat), strict=True):
        assert_close(norm, root_mean_square(inputs[rows != 0]))


@one_backend
def test_the_head_of_a_nested_model_is_never_run_and_scales_do_not_matter():
    model = models.causal_lm(hidden_dim=8, intermediate_dim=12)
    ids = np.arange(15).reshape(3, 5)
    x = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    targets, calls = find_targets(model), []

    def call(plain, *args, **kwargs):
        calls.append(kwargs.get("reverse"))
        return plain(*args, **kwargs)

    with called_by(model.backbone.token_embedding, call):
        norms = input_norms(model, targets, [(x, None), (x, None)])
    assert calls
    assert not any(calls)
    assert [v.shape for v in norms] == [(t.contraction_size,) for t in targets]
    attach_scaling(model, targets=targets)
    for a, b in zip(norms, norms_over(model, x), strict=True):
        assert_close(a, b)
    assert_untouched(model)


@one_backend
def test_a_pass_ends_with_the_last_target():
    layer, after = layers.Dense(8, name="shared"), layers.Dense(3)
    model = sequential((8,), layer, layer, after)
    targets = find_targets(model, include="shared")
    x, calls = normal(6, 8), []

    def call(plain, *args, **kwargs):
        calls.append(1)
        return plain(*args, **kwargs)

    with called_by(after, call):
        (norm,) = input_norms(model, targets, [(x[:4], None), (x[4:], None)])
    # The first batch shows how often the target is called.
    assert len(calls) == 1
    both = np.concatenate([x, numpy(layer(x))])
    assert_close(norm, root_mean_square(both))
