import zipfile

import keras
import keras_hub
import numpy as np
import pytest

import keras_weightmods as kwm
from keras_weightmods.core.reparameterization import slots
from tests import models
from tests.backends import breadth
from tests.models import assert_same, mlp, numpy, weights_of
from tests.sparsity import casts
from tests.sparsity.casts import compiled, fit, make_data, make_mlp, started

LENGTH = 10

# Most runs here are too short for the published pull, and say so.
pytestmark = pytest.mark.filterwarnings("ignore:AdamS. this schedule")


def make_tokens():
    """Inputs, labels and weights as a KerasHub preprocessor gives them."""
    rng = np.random.default_rng(2)
    ids = rng.integers(1, 20, size=(8, LENGTH + 1)).astype("int32")
    mask = np.arange(LENGTH) < rng.integers(4, LENGTH + 1, size=(8, 1))
    x = {"token_ids": ids[:, :-1], "padding_mask": mask.astype("int32")}
    return x, ids[:, 1:], mask.astype("float32")


def steps_of(cast):
    return int(numpy(cast.adam_s.iterations.value))


# The main job, on each family of KerasHub


FAMILIES = [("llama", "2:4"), ("gemma", "2:4"), ("gpt2", "1:4")]


@breadth(("family", "pattern"), FAMILIES)
def test_a_causal_lm_becomes_sparse(family, pattern, tmp_path):
    dtype = "mixed_bfloat16" if family == "gemma" else None
    model = models.causal_lm(family, dtype=dtype)
    x, y, weight = make_tokens()
    start = numpy(model(x))
    classes = [type(layer) for layer in model._flatten_layers()]
    shapes = [tuple(v.shape) for v in model.weights]

    teacher_dtype = "bfloat16" if dtype is None else None
    cast = kwm.CAST(model, pattern, teacher_dtype=teacher_dtype)
    np.testing.assert_array_equal(numpy(model(x)), start)
    perplexity = keras_hub.metrics.Perplexity(from_logits=True, mask_token_id=0)
    cast.compile(weighted_metrics=[perplexity])
    options = {"sample_weight": weight, "callbacks": [kwm.SparsityMonitor()]}
    if family == "llama":
        options["validation_data"] = (x, y, weight)
    history = fit(cast, (x, y), epochs=8, **options)
    assert {"loss", "perplexity", "kept_share"} <= set(history)
    assert ("val_perplexity" in history) == (family == "llama")
    assert cast.adam_s.total_steps == 16
    assert history["kept_share"][-1] == pytest.approx(1.0, abs=1e-3)
    before = numpy(model(x))

    assert cast.finalize() is model
    kwm.assert_sparse(model, pattern)
    assert cast.report.totals["exact"] == len(cast.targets)
    assert cast.report.skipped == cast.targets.skipped
    assert [type(layer) for layer in model._flatten_layers()] == classes
    assert [tuple(v.shape) for v in model.weights] == shapes
    after = numpy(model(x))
    np.testing.assert_allclose(after, before, atol=0.05 if dtype else 1e-5)

    path = tmp_path / "sparse.keras"
    model.save(path)
    with zipfile.ZipFile(path) as archive:
        assert b"keras_weightmods" not in archive.read("config.json")
    loaded = keras.saving.load_model(path)
    np.testing.assert_array_equal(numpy(loaded(x)), after)


@pytest.mark.one_backend
def test_raw_strings():
    import tensorflow as tf

    texts = ["abcdef", "fedcba abc", "a b c d", "hgfedcba"]
    preprocessor = models.gpt2_preprocessor(LENGTH)
    cast = kwm.CAST(models.causal_lm("gpt2", preprocessor), teacher=None)
    cast.compile()
    dataset = tf.data.Dataset.from_tensor_slices(texts).batch(2)
    history = fit(cast, (dataset, None), None, validation_data=texts, epochs=2)
    assert cast.adam_s.total_steps == 4
    assert "distillation_loss" not in history

    with pytest.warns(UserWarning, match="the run of 4 steps .* is over"):
        history = fit(cast, (texts, None), 2, validation_data=dataset)
    assert history["loss"][0] > 0
    x, y, w = keras.tree.map_structure(np.asarray, preprocessor(texts))
    losses = [cast.evaluate(x, y, 2, sample_weight=w, verbose=0)]
    for data in (texts, np.array(texts), np.array(texts, dtype=object)):
        losses.append(cast.evaluate(data, batch_size=2, verbose=0))
    assert losses == pytest.approx(history["val_loss"] * 4, rel=1e-6)
    logits = cast.predict(x, verbose=0)
    for data in (texts, np.array(texts), dataset):
        np.testing.assert_array_equal(cast.predict(data, verbose=0), logits)

    with pytest.raises(ValueError, match="preprocessor"):
        compiled().fit(texts)


# What fit takes


@pytest.mark.one_backend
def test_rows_of_tokens_are_their_own_labels():
    x, y, weight = make_tokens()
    rows = np.concatenate([x["token_ids"], y[:, -1:]], axis=1)
    lists = [row[: 1 + int(w.sum())].tolist() for row, w in zip(rows, weight)]
    full = {**x, "padding_mask": np.ones_like(x["padding_mask"])}
    # They are padded to the longest alone.
    width = max(map(len, lists)) - 1
    short = {name: value[:, :width] for name, value in x.items()}
    weights = {"sample_weight": weight[:, :width]}
    for data, again, options in (
        ((rows, None), (full, y), {}),
        ((lists, None), (short, y[:, :width]), weights),
    ):
        ends = []
        for pair, more in ((data, {}), (again, options)):
            model = models.randomize(models.causal_lm("gpt2"), scale=0.1)
            cast = kwm.CAST(model, teacher=None)
            cast.compile()
            fit(cast, pair, epochs=2, **more)
            ends.append(weights_of(cast.finalize()))
        for a, b in zip(*ends, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["tf.data", "PyDataset", "generator", "split"])
def test_the_length_of_the_run_and_the_importance(kind):
    x, y = make_data(24)
    steps, expected = started(compiled(), x, y, batch_size=4, epochs=3)
    assert steps == 18
    cast, batches, options = compiled(), casts.Batches(x, y, 4), {}
    data = (batches,)
    if kind == "tf.data":
        import tensorflow as tf

        data = (tf.data.Dataset.from_tensor_slices((x, y)).batch(4),)
    elif kind == "generator":
        data = ((batches[i] for i in range(6)),)
        with pytest.raises(ValueError, match="steps_per_epoch"):
            cast.fit(*data, epochs=3)
        options, steps = {"steps_per_epoch": 2}, 6
    elif kind == "split":
        data = x, y
        options, steps = {"batch_size": 4, "validation_split": 0.5}, 9
    found, importance = started(cast, *data, epochs=3, **options)
    assert found == steps
    for a, b in zip(importance, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "steps"),
    [({"gradient_accumulation_steps": 2}, 9), ({"total_steps": 7}, 7)],
)
def test_total_steps_counts_updates(options, steps):
    cast = compiled(kwm.AdamS(criterion="wanda", **options))
    assert started(cast, *make_data(24), batch_size=4, epochs=3)[0] == steps


@breadth("init", ["dense", "wanda"], 1)
def test_no_batch_of_a_generator_is_lost(init):
    data = casts.Batches(*make_data(24), 4)
    finals = []
    for x in (data, (data[i] for i in range(6))):
        cast = compiled(init=init)
        fit(cast, (x, None), None, epochs=3, steps_per_epoch=2)
        assert steps_of(cast) == 6
        finals.append(weights_of(cast.finalize()))
    assert_same(*finals)


def test_a_fit_that_failed_is_planned_anew():
    x, y = make_data()
    cast = compiled()
    with pytest.raises(ValueError, match="Input 0"):
        fit(cast, (x[:, :7], y))
    assert cast.adam_s.total_steps == 4
    fit(cast, epochs=2)
    assert cast.adam_s.total_steps == 8
    rate = cast.adam_s.get_config()["learning_rate"]["config"]
    assert rate["total_steps"] == 8
    assert steps_of(cast) == 8
    kwm.assert_sparse(cast.finalize(), "2:4")


# One-shot starts


@breadth("init", ["magnitude", "wanda", "sparsegpt"], 2)
def test_a_start_is_sparsify_on_the_first_rows(init):
    x, y = make_data(40)
    expected = make_mlp()
    kwm.sparsify(
        expected, "2:4", x[:20], criterion=init, batch_size=4, verbose=0
    )
    model = make_mlp()
    dense = numpy(model(x))
    cast = compiled(model=model, teacher="self", init=init, init_rows=18)
    assert cast.init_report is None
    started(cast, x, y, batch_size=4)
    sparse = [numpy(target.variable) for target in cast.targets]
    for target, w in zip(kwm.find_targets(expected), sparse, strict=True):
        np.testing.assert_allclose(w, numpy(target.variable), rtol=1e-5)
    np.testing.assert_array_equal(numpy(cast.teacher(x)), dense)
    assert [k.criterion for k in cast.init_report.kernels] == [init] * 2

    # Not made again by another fit, whatever its data.
    started(cast, x[20:], y[20:], batch_size=4)
    assert_same([numpy(t.variable) for t in cast.targets], sparse)

    fit(cast, (x, y), epochs=2)
    kernels = [w for w in weights_of(cast.finalize()) if w.ndim == 2]
    kwm.assert_sparse(model, "2:4")
    for before, after in zip(sparse, kernels, strict=True):
        np.testing.assert_array_equal(after != 0, before != 0)
        assert np.abs(after - before)[before != 0].min() > 0


def test_a_start_whose_mask_goes_on_changing():
    x, y = make_data(40)
    adam_s = kwm.AdamS(3e-2, decay="relative", ramp=0.5, criterion="wanda")
    cast = compiled(adam_s, init="sparsegpt", scaling_groups=0)
    _, importance = started(cast, x, y, batch_size=4, epochs=4)
    # Of the sparse model's inputs, where the first layer sees the data.
    expected = np.sqrt((x[:32] ** 2).mean(axis=0))
    np.testing.assert_allclose(importance[0], expected, rtol=1e-5)
    before = [numpy(t.variable) != 0 for t in cast.targets]
    fit(cast, (x, y), epochs=4)
    sparse = cast.finalize()
    kwm.assert_sparse(sparse, "2:4")
    after = [w != 0 for w in weights_of(sparse) if w.ndim == 2]
    assert any((a != b).any() for a, b in zip(after, before, strict=True))


def test_a_start_is_refined():
    x, y = make_data(40)
    options = {"init": "magnitude", "init_refine": "blocks", "init_rows": 16}
    cast = compiled(model=make_mlp(), teacher="self", **options)
    dense = numpy(cast.teacher(x))
    started(cast, x, y, batch_size=4)
    blocks = cast.init_report.blocks
    assert len(blocks) == 2
    assert all(block.after < block.before for block in blocks)
    np.testing.assert_array_equal(numpy(cast.teacher(x)), dense)
    fit(cast, (x, y))
    kwm.assert_sparse(cast.finalize(), "2:4")
    with pytest.raises(ValueError, match="`init_refine` must"):
        kwm.CAST(make_mlp(), init="wanda", init_refine="all")
    with pytest.raises(ValueError, match="init_refine"):
        kwm.CAST(make_mlp(), init_refine="blocks")


def test_a_start_is_in_the_checkpoint(tmp_path):
    path = tmp_path / "start.weights.h5"
    cast = compiled(init="sparsegpt")
    started(cast, *make_data(), batch_size=4, epochs=2)
    cast.save_weights(path)
    fit(cast, epochs=2)
    resumed = compiled(init="sparsegpt")
    resumed.load_weights(path)
    fit(resumed, epochs=2)
    assert_same(weights_of(resumed), weights_of(cast))
    assert resumed.init_report is None


def test_a_start_that_fails_leaves_the_model_alone():
    x, y = make_data()
    cast = compiled(init="sparsegpt")
    before = weights_of(cast.student)
    with pytest.raises(ValueError, match="finite"):
        fit(cast, (np.full_like(x, np.nan), y))
    assert_same(weights_of(cast.student), before)
    fit(cast)
    kwm.assert_sparse(cast.finalize(), "2:4")


# Wrong use


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pattern": "4:2"}, "pattern"),
        ({"pattern": "2:5"}, "no kernel that fits"),
        ({"init": "random"}, "`init`"),
        ({"init_rows": 0}, "`init_rows`"),
        *(({"teacher": each}, "`teacher`") for each in ("other", np.ones(3))),
        ({"teacher": None, "teacher_dtype": "bfloat16"}, "`teacher_dtype`"),
        ({"teacher_dtype": "int8"}, "`teacher_dtype`"),
        ({"distillation_weight": 1.5}, "`distillation_weight`"),
        ({"distillation_weight": "much"}, "`distillation_weight`"),
        *(({"temperature": each}, "`temperature`") for each in (0, None)),
        *(({"scaling_groups": each}, "`scaling_groups`") for each in (-1, 1.0)),
    ],
)
def test_wrong_arguments_leave_the_model_alone(arguments, message):
    model = make_mlp()
    before = weights_of(model)
    classes = [type(layer) for layer in model._flatten_layers()]
    with pytest.raises(ValueError, match=message):
        kwm.CAST(model, **arguments)
    assert_same(weights_of(model), before)
    assert [type(layer) for layer in model._flatten_layers()] == classes


def test_wrong_models():
    model, other = make_mlp(), models.mlp(8, 5)
    with pytest.raises(ValueError, match="frozen copy"):
        kwm.CAST(model, teacher=model)
    for unbuilt in (models.Subclassed(), "model"):
        with pytest.raises(ValueError, match="built"):
            kwm.CAST(unbuilt)
    unbuilt = keras.Sequential([keras.layers.Dense(4)])
    with pytest.raises(ValueError, match="`teacher` must be a built"):
        kwm.CAST(model, teacher=unbuilt)
    with pytest.raises(ValueError, match=r"[Oo]utput"):
        kwm.CAST(model, teacher=other)
    assert other.trainable
    assert type(model.layers[0]) is keras.layers.Dense
    assert not slots(model.layers[0])
    model.trainable = False
    with pytest.raises(ValueError, match="frozen"):
        kwm.CAST(model)
    model.trainable = True
    kwm.CAST(model)
    other = make_mlp()
    for teacher in ("self", other):
        with pytest.raises(ValueError, match="fold"):
            kwm.CAST(model, teacher=teacher)
    assert other.trainable
    assert all(layer.trainable for layer in other.layers)


def test_a_call_without_training():
    class Plain(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(4)

        def call(self, x):
            return self.dense(x)

    model, (x, y) = Plain(), make_data()
    model(x)
    cast = kwm.CAST(model)
    cast.compile(loss=casts.cross_entropy())
    cast.fit(x, y, verbose=0)
    kwm.assert_sparse(cast.finalize(), "2:4")


def test_a_one_shot_start_from_nan_is_refused():
    cast = kwm.CAST(make_mlp(), init="magnitude")
    cast.compile(loss=casts.cross_entropy())
    kernel = cast.targets[0].variable
    kernel.assign(np.full(kernel.shape, np.nan))
    before = weights_of(cast.student)
    with pytest.raises(ValueError, match=kernel.path):
        cast.fit(*make_data(), verbose=0)
    assert_same(weights_of(cast.student), before)


@pytest.mark.one_backend
def test_a_run_that_made_nan_is_not_finalized():
    cast = kwm.CAST(make_mlp())
    cast.compile(loss=casts.cross_entropy())
    cast.fit(*make_data(), verbose=0)
    kernel = cast.targets[0].variable
    kernel.assign(np.full(kernel.shape, np.nan))
    before = weights_of(cast.student)
    with pytest.raises(ValueError, match=rf"{kernel.path}.*diverged"):
        cast.finalize()
    assert_same(weights_of(cast.student), before)


def test_a_frozen_kernel_stays_dense():
    model = make_mlp()
    model.layers[0].trainable = False
    cast = kwm.CAST(model)
    assert [t.layer for t in cast.targets] == [model.layers[-1]]
    assert any(s.reason == "frozen" for s in cast.targets.skipped)


def test_wrong_compile_and_order():
    x, y = make_data()
    cast = kwm.CAST(make_mlp())
    adam, other = keras.optimizers.Adam(), kwm.AdamS(pattern="1:4")
    for optimizer in ("adam", adam, other):
        with pytest.raises(ValueError, match=r"`AdamS` of pattern .2:4"):
            cast.compile(optimizer, loss=casts.cross_entropy())
    with pytest.raises(ValueError, match="`loss`"):
        cast.compile()
    with pytest.raises(ValueError, match="compile"):
        cast.fit(x, y)
    with pytest.raises(ValueError, match="not trained"):
        cast.finalize()
    cast.compile(loss=casts.cross_entropy())
    with pytest.raises(ValueError, match="not trained"):
        cast.finalize()
    started(cast, x, y)
    with pytest.raises(ValueError, match="no step"):
        cast.finalize()
    with pytest.raises(NotImplementedError, match="finalize"):
        cast.get_config()


# Finalize


@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
@pytest.mark.parametrize("scaling_groups", [0, 2])
def test_finalize_multiplies_the_pruned_weights(pattern, scaling_groups):
    model = make_mlp()
    cast = compiled(model=model, pattern=pattern, scaling_groups=scaling_groups)
    rng = np.random.default_rng(0)
    x, y = make_data()
    started(cast, x, y, epochs=4)
    # As after a training: any weights, scales, masks and steps.
    masks, expected = [], []
    states = cast.adam_s.sparsified_state
    for target, (variable, _, bits) in zip(cast.targets, states, strict=True):
        w = rng.normal(size=variable.shape).astype("float32")
        variable.assign(w)
        mask = numpy(kwm.ops.nm_mask(w, pattern, 0))
        bits.assign(kwm.ops.pack_bits(mask))
        masks.append(mask)
        scale = np.ones((1, w.shape[1]), "float32")
        if scaling_groups:
            scale = rng.normal(size=(2, w.shape[1])).astype("float32")
            target.layer.trainable_weights[-1].assign(scale)
        expected.append(w * mask * np.repeat(scale, len(w) // len(scale), 0))
    assert_same(cast.adam_s.masks, masks)
    cast.adam_s.iterations.assign(16)
    assert cast.finalize() is model
    for layer, w in zip(model.layers, expected, strict=True):
        assert type(layer) is keras.layers.Dense
        np.testing.assert_allclose(numpy(layer.kernel), w, rtol=1e-6)
    kwm.assert_sparse(model, pattern)
    for call in (cast.finalize, lambda: cast.fit(x, y)):
        with pytest.raises(ValueError, match=r"after `finalize\(\)`"):
            call()


@pytest.mark.one_backend
def test_finalize_folds_the_scales_alone():
    layers = keras.layers.Dense(8), kwm.CompanderDense(4)
    model = models.sequential((8,), *layers)
    cast = compiled(model=model, targets=model.layers[0])
    assert [t.layer for t in cast.targets] == [model.layers[0]]
    fit(cast)
    assert cast.report is None
    cast.finalize()
    assert type(model.layers[0]) is keras.layers.Dense
    assert type(model.layers[1]) is kwm.CompanderDense


def test_predict_and_evaluate_follow_finalize():
    x, y = make_data()
    optimizer = kwm.AdamS(0.05, decay="relative", ramp=1.0)
    cast = compiled(optimizer, teacher="self")
    fit(cast, epochs=2)
    cast.predict(x, verbose=0)
    cast.evaluate(x, y, verbose=0)
    sparse = cast.finalize()
    logits = numpy(sparse(x))
    predicted = cast.predict(x, verbose=0)
    np.testing.assert_allclose(predicted, logits, rtol=1e-5, atol=1e-6)
    loss = cast.evaluate(x, y, verbose=0, return_dict=True)["student_loss"]
    expected = float(numpy(casts.cross_entropy()(y, logits)))
    assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.one_backend
def test_a_target_frozen_since_leaves_the_model_alone():
    x, y = make_data()
    model = make_mlp()
    cast = kwm.CAST(model)
    model.layers[0].trainable = False
    cast.compile(kwm.AdamS(total_steps=2), loss=casts.cross_entropy())
    with pytest.warns(UserWarning, match="leaves 1 targets"):
        cast.train_on_batch(x, y)
    before = weights_of(model)
    for call in (cast.finalize, lambda: cast.fit(x, y, verbose=0)):
        with pytest.raises(ValueError, match="frozen since"):
            call()
        assert_same(weights_of(model), before)
    model.layers[0].trainable = True
    cast.compile(kwm.AdamS(decay="relative"), loss=casts.cross_entropy())
    cast.fit(x, y, epochs=2, verbose=0)
    kwm.assert_sparse(cast.finalize(), "2:4")


# Interruption


STEPS = 16


def resumable():
    keras.utils.set_random_seed(0)
    dropout = keras.layers.Dropout(0.25)
    first, last = keras.layers.Dense(16, "relu"), keras.layers.Dense(4)
    model = models.sequential((8,), first, dropout, last)
    return compiled(model=model, teacher="self")


def run(cast, **kwargs):
    fit(cast, batch_size=16, epochs=STEPS, **kwargs)
    return weights_of(cast) + [numpy(v) for v in cast.optimizer.variables]


def test_a_resumed_run_is_the_same(tmp_path):
    path = str(tmp_path / "{epoch}.weights.h5")
    save = keras.callbacks.ModelCheckpoint(path, save_weights_only=True)
    whole = run(resumable(), callbacks=[save])
    for k in (3, 10):
        cast = resumable()
        cast.load_weights(path.format(epoch=k))
        assert cast.adam_s.total_steps == STEPS
        assert steps_of(cast) == k
        assert_same(run(cast, initial_epoch=k), whole)
    # Also the last one can be pruned at once.
    cast.save_weights(tmp_path / "end.weights.h5")
    final = weights_of(cast.finalize())
    cast = resumable()
    cast.load_weights(tmp_path / "end.weights.h5")
    assert_same(weights_of(cast.finalize()), final)

    backup, restore = (
        keras.callbacks.BackupAndRestore(tmp_path / "backup") for _ in range(2)
    )
    with pytest.raises(casts.Interrupted):
        run(resumable(), callbacks=[backup, casts.Interrupt(epoch=6)])
    assert_same(run(resumable(), callbacks=[restore]), whole)


def test_interrupted_in_the_middle_of_an_epoch(tmp_path):
    x, y = make_data(24)
    path = str(tmp_path / "{epoch}-{batch}.weights.h5")
    options = {"save_freq": 9, "save_weights_only": True}
    save = keras.callbacks.ModelCheckpoint(path, **options)
    cast = resumable()
    fit(cast, (x, y), epochs=3, callbacks=[save])
    whole = weights_of(cast)
    cast = resumable()
    cast.load_weights(path.format(epoch=2, batch=3))
    assert steps_of(cast) == 9
    keras.utils.set_random_seed(5)
    fit(cast, (x[12:], y[12:]), epochs=3, initial_epoch=2)
    fit(cast, (x, y), epochs=3, initial_epoch=2)
    assert_same(weights_of(cast), whole)


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="torch's state")
@pytest.mark.parametrize(("size", "dtype"), [(3, "uint8"), (5056, "float32")])
def test_a_random_state_that_does_not_fit(size, dtype):
    cast = resumable()
    before = cast._run.random_stream.states["cpu"]
    with pytest.raises(ValueError, match="random state"):
        cast.load_own_variables({"random_state_cpu": np.zeros(size, dtype)})
    np.testing.assert_array_equal(cast._run.random_stream.states["cpu"], before)


# Precision and backends


def test_a_checkpoint_with_loss_scaling(tmp_path):
    def scaled():
        model = make_mlp(dtype="mixed_float16")
        return compiled(model=model, teacher="self")

    rng = np.random.default_rng(0)
    cast = scaled()
    started(cast, *make_data(), batch_size=4, epochs=2)
    for variable in cast.optimizer.variables:
        noise = rng.integers(1, 9, size=variable.shape)
        variable.assign(noise.astype(variable.dtype))
    cast.save_weights(tmp_path / "scaled.weights.h5")
    restored = scaled()
    restored.load_weights(tmp_path / "scaled.weights.h5")
    assert restored.adam_s.total_steps == cast.adam_s.total_steps == 8
    optimizers = restored.optimizer, cast.optimizer
    assert_same(*([numpy(v) for v in each.variables] for each in optimizers))


@pytest.mark.parametrize("globally", [False, True])
def test_mixed_float16(globally):
    x, y = make_data()
    before = keras.config.dtype_policy()
    try:
        if globally:
            keras.config.set_dtype_policy("mixed_float16")
        model = make_mlp(dtype=None if globally else "mixed_float16")
        cast = compiled(model=model, teacher="self")
    finally:
        keras.config.set_dtype_policy(before)
    assert isinstance(cast.optimizer, keras.optimizers.LossScaleOptimizer)
    if globally:
        assert started(cast, x, y, epochs=4)[0] == 4
        return
    history = fit(cast, epochs=4, callbacks=[kwm.SparsityMonitor()])
    assert np.isfinite(history["loss"]).all()
    assert history["kept_share"][-1] == pytest.approx(1.0, abs=1e-3)
    kwm.assert_sparse(cast.finalize(), "2:4")


def trained_before():
    model = casts.make_mlp()
    model.compile("adam", casts.cross_entropy())
    model.fit(*casts.make_data(), verbose=0)
    return model


@breadth("groups", [0, 2], 1)
def test_a_model_that_was_trained_with_another_optimizer(groups):
    cast = kwm.CAST(trained_before(), scaling_groups=groups, teacher=None)
    cast.compile(loss=casts.cross_entropy())
    fit(cast, epochs=2)
    kwm.assert_sparse(cast.finalize(), "2:4")


@pytest.mark.one_backend
def test_an_error_leaves_the_optimizer_of_a_model():
    model = trained_before()
    optimizer = model.optimizer
    for arguments in ({"teacher": mlp(9, 4)}, {"pattern": "15:30"}):
        with pytest.raises(ValueError, match=r"incompatible|15:30"):
            kwm.CAST(model, **arguments)
        assert model.optimizer is optimizer
        assert model.compiled
        model.fit(*casts.make_data(), verbose=0)


class Log(keras.layers.Layer):
    """Makes NaN of what is negative."""

    def call(self, x):
        return keras.ops.log(x)


@pytest.mark.parametrize("init", ["dense", "wanda"])
def test_activations_that_are_not_finite_are_named(init):
    model = models.sequential(
        (8,),
        keras.layers.Dense(8, name="first"),
        Log(),
        keras.layers.Dense(4, name="second"),
    )
    before = models.weights_of(model)
    cast = kwm.CAST(model, init=init)
    cast.compile(loss="mse")
    x = models.normal(8, 8)
    with pytest.raises(ValueError, match=r"NaN or infinit.*second/kernel"):
        cast.fit(x, models.normal(8, 4), batch_size=4, verbose=0)
    kernels = [t.variable for t in cast.targets]
    models.assert_same([models.numpy(k) for k in kernels], before[::2])


@pytest.mark.one_backend
def test_a_start_of_whole_blocks_is_left_by_smaller_steps():
    recipe = kwm.CAST.default_recipe
    sparse = recipe("sparsegpt", "swaps")
    assert sparse == recipe("sparsegpt")
    for refine in ("blocks", ("swaps", "blocks")):
        found = recipe("sparsegpt", refine)
        assert found["learning_rate"] < sparse["learning_rate"]
        assert found["ramp"] == 0.0
