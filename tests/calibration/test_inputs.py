import keras
import numpy as np
import pytest
from keras import ops

from keras_weightmods import find_targets, fold, sparsify
from keras_weightmods.calibration.inputs import input_norms
from keras_weightmods.core.layer_kinds import GENERATED
from keras_weightmods.core.watched import called_by
from keras_weightmods.sparsity.scaling import attach_scaling
from tests import models
from tests.backends import breadth
from tests.models import mlp, normal, numpy, sequential


def root_mean_square(x, kept):
    """Over all axes but `kept`, in float64, flattened in their order."""
    x = np.moveaxis(np.asarray(x, "float64"), kept, range(len(kept)))
    x = x.reshape(*x.shape[: len(kept)], -1)
    return np.sqrt((x**2).mean(axis=-1)).reshape(-1)


def norms_over(model, *batches):
    pairs = [(batch, None) for batch in batches]
    return input_norms(model, find_targets(model), pairs)


def assert_untouched(model):
    for layer in model._flatten_layers():
        assert "call" not in vars(layer)
        assert not hasattr(type(layer), GENERATED)


def test_dense_over_several_batches():
    dense = keras.layers.Dense(8, activation="relu"), keras.layers.Dense(2)
    model = sequential((None, 4), *dense)
    batches = [normal(2, 3, 4), normal(5, 3, 4, seed=1) * 3]
    x = np.concatenate(batches)
    before = models.weights_of(model)
    norms = norms_over(model, *batches)
    hidden = numpy(dense[0](x))
    for norm, inputs in zip(norms, (x, hidden), strict=True):
        expected = root_mean_square(inputs, [2])
        np.testing.assert_allclose(norm, expected, rtol=1e-5)
        assert norm.dtype == np.float32
    models.assert_same(models.weights_of(model), before)
    assert_untouched(model)


class Branches(keras.layers.Layer):
    """Calls a layer in a branch, as KerasHub's SAM does."""

    def __init__(self):
        super().__init__()
        self.one = keras.layers.Dense(4, name="one")
        self.other = keras.layers.Dense(4, name="other")

    def build(self, input_shape):
        self.one.build(input_shape)
        self.other.build(input_shape)

    def call(self, x):
        return ops.cond(
            ops.all(ops.isfinite(x)), lambda: self.one(x), lambda: self.other(x)
        )


def test_a_layer_in_a_branch_is_seen():
    model = sequential((4,), Branches(), keras.layers.Dense(2))
    x = normal(8, 4)
    norms = norms_over(model, x)
    by_path = dict(zip((t.path for t in find_targets(model)), norms))
    one, other = (
        next(path for path in by_path if f"/{name}/" in path)
        for name in ("one", "other")
    )
    np.testing.assert_allclose(by_path[one], root_mean_square(x, [1]), 1e-5)
    assert by_path[other] is None
    report = sparsify(model, "2:4", x, criterion="sparsegpt", verbose=0)
    notes = {kernel.path: kernel.note for kernel in report.kernels}
    assert [path for path, note in notes.items() if note] == [other]


@breadth(
    ("equation", "output_shape", "input_shape", "kept"),
    [
        ("ab,bc->ac", 6, (4,), [1]),
        ("...x,xy->...y", 6, (3, 4), [2]),
        ("ab...,bc->ac...", (6, 3, 5), (4, 3, 5), [1]),
        ("bquh,uhm->bqm", (3, 6), (3, 2, 4), [2, 3]),
        # The kernel's order of the contracted axes, not the input's.
        ("bhqu,uhm->bqm", (3, 6), (4, 3, 2), [3, 1]),
        ("btd,ndh->btnh", (3, 2, 5), (3, 4), [2]),
    ],
    4,
)
def test_einsum_dense(equation, output_shape, input_shape, kept):
    layer = keras.layers.EinsumDense(equation, output_shape)
    x = normal(7, *input_shape)
    (norms,) = norms_over(sequential(input_shape, layer), x[:4], x[4:])
    np.testing.assert_allclose(norms, root_mean_square(x, kept), rtol=1e-5)


def test_convolutions_in_groups():
    layer = keras.layers.Conv2D(8, 1, groups=2, data_format="channels_last")
    x = normal(2, 6, 6, 8)
    (norms,) = norms_over(sequential((6, 6, 8), layer), x)
    squares = root_mean_square(x, [3]).reshape(2, 4) ** 2
    np.testing.assert_allclose(norms, np.sqrt(squares.mean(axis=0)), rtol=1e-5)


def test_a_transposed_convolution_contracts_the_channels_of_a_pixel():
    layer = keras.layers.Conv2DTranspose(
        3, 2, strides=2, data_format="channels_last"
    )
    x = normal(2, 4, 4, 8)
    (norms,) = norms_over(sequential((4, 4, 8), layer), x)
    np.testing.assert_allclose(norms, root_mean_square(x, [3]), rtol=1e-5)


def test_a_cell_sees_all_steps():
    layer = keras.layers.SimpleRNN(6, return_sequences=True, unroll=True)
    model = sequential((5, 4), layer)
    x = normal(3, 5, 4)
    kernel, recurrent = norms_over(model, x)
    np.testing.assert_allclose(kernel, root_mean_square(x, [2]), rtol=1e-5)
    # The state begins with zeros.
    before = np.pad(numpy(model(x))[:, :-1], ((0, 0), (1, 0), (0, 0)))
    expected = root_mean_square(before, [2])
    np.testing.assert_allclose(recurrent, expected, rtol=1e-5)


def test_a_nested_model_with_and_without_scales():
    model = models.causal_lm(hidden_dim=8, intermediate_dim=12)
    backbone = model.backbone
    ids = np.arange(12, dtype="int32").reshape(2, 6)
    x = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    targets = find_targets(model)
    norms = norms_over(model, x)
    assert [v.shape for v in norms] == [(t.contraction_size,) for t in targets]
    layer = backbone.transformer_layers[0]
    embedded = backbone.token_embedding(ids)
    normed = layer._self_attention_layernorm(embedded)
    (query,) = (v for t, v in zip(targets, norms) if "query" in t.path)
    expected = root_mean_square(numpy(normed), [2])
    np.testing.assert_allclose(query, expected, rtol=1e-5)
    attach_scaling(model, targets=targets)
    for a, b in zip(norms, norms_over(model, x), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    assert_untouched(model)
    fold(model)
    assert_untouched(model)


class ByKeyword(keras.layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = keras.layers.Dense(3)

    def call(self, x):
        return self.dense(inputs=x)


def test_inputs_by_keyword():
    model = sequential((4,), ByKeyword())
    x = normal(5, 4)
    (norms,) = norms_over(model, x)
    np.testing.assert_allclose(norms, root_mean_square(x, [1]), rtol=1e-5)
    assert_untouched(model)


def test_positions_of_weight_zero_are_left_out():
    dense = keras.layers.Dense(8), keras.layers.Dense(2)
    model = sequential((3, 4), dense[0], keras.layers.Flatten(), dense[1])
    x = normal(4, 3, 4)
    weight = np.array([[1, 1, 0], [1, 0, 0], [2, 1, 1], [0, 0, 0]], "float32")
    padded = np.where(weight[..., None] != 0, x, np.nan)
    pairs = [(padded[:3], weight[:3]), (x[3:], weight[3:])]
    first, second = input_norms(model, find_targets(model), pairs)
    expected = root_mean_square(x[weight != 0], [1])
    np.testing.assert_allclose(first, expected, rtol=1e-5)
    # The last layer sees no time axis.
    assert np.isnan(second).any()

    rows = np.array([1, 0, 1, 0], "float32")
    norms = input_norms(model, find_targets(model), [(x, rows[:, None])])
    flat = numpy(dense[0](x)).reshape(4, -1)
    for norm, inputs in zip(norms, (x, flat), strict=True):
        expected = root_mean_square(inputs[rows != 0], [-1])
        np.testing.assert_allclose(norm, expected, rtol=1e-5)


def test_an_error_leaves_no_trace():
    model = mlp(4, 4, 4)

    def fail(x):
        raise RuntimeError("broken")

    model.layers[1].activation = fail
    with pytest.raises(RuntimeError, match="broken"):
        norms_over(model, normal(2, 4))
    assert_untouched(model)


def token_batches(*rows):
    ids = [np.arange(5 * n, dtype="int32").reshape(n, 5) % 20 for n in rows]
    return [{"token_ids": x, "padding_mask": np.ones_like(x)} for x in ids]


@pytest.mark.one_backend
@pytest.mark.parametrize("pass_", ["norms", "walk"])
def test_the_head_is_never_run(pass_):
    model = models.causal_lm(hidden_dim=8, intermediate_dim=12)
    batches = token_batches(2, 3)
    targets = find_targets(model)
    tied = model.backbone.token_embedding
    calls = []

    def call(plain, *args, **kwargs):
        calls.append(kwargs)
        return plain(*args, **kwargs)

    with called_by(tied, call):
        if pass_ == "norms":
            input_norms(model, targets, [(x, None) for x in batches])
        else:
            options = {"targets": targets, "verbose": 0}
            sparsify(model, "2:4", batches[1], criterion="wanda", **options)
    assert calls
    assert not [call for call in calls if call.get("reverse")]


def test_a_pass_ends_with_the_last_target():
    layer = keras.layers.Dense(8, name="shared")
    after = keras.layers.Dense(3)
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
    np.testing.assert_allclose(norm, root_mean_square(both, [1]), rtol=1e-5)


def test_a_target_in_the_head():
    model = models.token_net(mask_zero=False)
    x = np.arange(10).reshape(2, 5)
    norms = norms_over(model, x)
    hidden = numpy(model.layers[1](model.layers[0](x)))
    expected = root_mean_square(hidden, [2])
    np.testing.assert_allclose(norms[-1], expected, rtol=1e-5)


def test_without_batches():
    assert norms_over(mlp(4, 4)) == [None]
