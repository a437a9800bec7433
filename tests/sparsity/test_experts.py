"""The sparsity methods on mixtures of experts."""

import warnings

import numpy as np
import pytest

import keras_weightmods as kwm
from keras_weightmods.calibration import inputs
from keras_weightmods.core import data
from keras_weightmods.ops import sparsegpt
from tests import models

pytest.importorskip("keras_hub")
pytestmark = pytest.mark.one_backend
IDS = np.random.default_rng(0).integers(1, 20, (4, 8))
X = {"token_ids": IDS, "padding_mask": np.ones_like(IDS)}


def stacks_of(model):
    return [t for t in kwm.find_targets(model) if t.stack_axes]


@pytest.mark.parametrize("family", models.MIXTURES)
def test_each_expert_sees_its_own_tokens(family):
    model = models.randomize(models.backbone(family), scale=1.0)
    targets = stacks_of(model)
    layer = targets[0].layer
    # What an expert gives counts for a token exactly if it is routed to it.
    tokens = models.normal(32, 16)
    routed = inputs.router_of(model, layer)(tokens)
    assert (routed.sum(axis=1) == 2).all()
    block = next(
        part
        for part in model._flatten_layers()
        if layer in part._flatten_layers(False, False)
    )

    def run():
        out = block(tokens[None])
        return models.numpy(out[0] if isinstance(out, tuple) else out)[0]

    before = run()
    last = targets[-1].variable
    for expert in range(4):
        kernel = models.numpy(last)
        changed = kernel.copy()
        changed[expert] += 1
        last.assign(changed)
        moved = np.abs(run() - before).max(axis=1) > 1e-6
        last.assign(kernel)
        np.testing.assert_array_equal(moved, routed[:, expert])


@pytest.mark.parametrize(
    ("family", "method"),
    [("gpt_oss", "wanda"), *((each, "sparsegpt") for each in models.MIXTURES)],
)
def test_one_shot_by_each_experts_own_inputs(family, method):
    model = models.randomize(models.backbone(family))
    stacks = stacks_of(model)
    first = stacks[0]
    before = models.numpy(first.variable)
    seen = []

    def see(place, rows):
        seen.append(models.numpy(rows.tensor)[:, 0])

    # Only the experts, so that their inputs stay the same.
    ((fitted, _),), _ = data.held_out([(X, None)])
    with inputs.rows_seen(model, [first], see):
        model(fitted)
    (tokens,) = seen
    report = kwm.sparsify(
        model, "2:4", X, criterion=method, targets=stacks, verbose=0
    )
    assert [k.criterion for k in report.kernels] == [method] * len(stacks)
    kwm.assert_sparse(model, "2:4", targets=stacks)
    after = models.numpy(first.variable)
    routed = inputs.router_of(model, first.layer)(tokens)
    for expert in range(4):
        rows = tokens[routed[:, expert]].astype("float64")
        moment = rows.T @ rows
        if method == "wanda":
            norms = np.sqrt(np.diagonal(moment)).astype("float32")
            pruned = sparsegpt.wanda(before[expert], norms)
        else:
            moment = moment / len(tokens)
            factor = sparsegpt.inverse_factor(moment, 0.01)
            pruned = sparsegpt.sparsegpt(before[expert], factor)
        pruned = models.numpy(pruned)
        np.testing.assert_allclose(after[expert], pruned, rtol=1e-3, atol=1e-4)


def test_padding_is_left_out():
    model = models.randomize(models.backbone("qwen3_moe"))
    weights = np.ones(IDS.shape, "float32")
    weights[:, 5:] = 0
    targets = stacks_of(model)
    short = {key: value[:, :5] for key, value in X.items()}
    norms, expected = (
        inputs.input_norms(model, targets, [batch])
        for batch in ((X, weights), (short, None))
    )
    for pair in zip(norms, expected):
        np.testing.assert_allclose(*pair, rtol=1e-4)


def test_an_expert_without_tokens_goes_by_magnitude():
    model = models.randomize(models.backbone("gpt_oss"))
    bias = next(w for w in model.weights if w.path.endswith("dense/bias"))
    # The router never chooses expert 2.
    bias.assign([0, 0, -1e3, 0])
    up = stacks_of(model)[0]
    before = models.numpy(up.variable)
    for method in ("wanda", "sparsegpt"):
        up.variable.assign(before)
        report = kwm.sparsify(
            model, "2:4", X, criterion=method, targets=[up], verbose=0
        )
        assert "1 of its 4 matrices" in report.kernels[0].note
        magnitude = kwm.ops.nm_project(before[2], "2:4")
        after = models.numpy(up.variable)
        models.assert_same(after[2], models.numpy(magnitude))
        other = models.numpy(kwm.ops.nm_project(before[0], "2:4"))
        assert not np.array_equal(after[0] != 0, other != 0)


@pytest.mark.parametrize("family", models.MIXTURES)
def test_adam_s_and_cast(family):
    model = models.causal_lm(family)
    cast = kwm.CAST(model)
    cast.compile()
    with warnings.catch_warnings():
        # Kernels whose inputs cannot be read.
        warnings.filterwarnings("error", "CAST ranks the weights")
        y = np.roll(IDS, -1, axis=1)
        cast.fit(X, y, batch_size=4, epochs=2, verbose=0)
    cast.finalize()
    kwm.assert_sparse(model, "2:4")


def test_gemma4_routes_by_an_argument():
    model = models.randomize(models.backbone("gemma4_moe"))
    x = {**X, "position_ids": np.broadcast_to(np.arange(8), IDS.shape)}
    stacks = stacks_of(model)
    assert len(stacks) == 3
    dense = models.outputs(model, x)
    report = kwm.sparsify(model, "2:4", x, criterion="wanda", verbose=0)
    methods = {k.criterion for k in report.kernels if "expert_bank" in k.path}
    assert methods == {"wanda"}
    sparse = models.outputs(model, x)
    assert not np.allclose(sparse, dense)
    kwm.pack(model)
    np.testing.assert_allclose(models.outputs(model, x), sparse, atol=1e-3)
