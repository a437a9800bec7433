import keras
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
one_backend = pytest.mark.one_backend

# Most runs here are too short for the published pull, and say so.
pytestmark = pytest.mark.filterwarnings("ignore:AdamS. this schedule")


def make_tokens():
    rng = np.random.default_rng(2)
    ids = rng.integers(1, 20, size=(8, LENGTH + 1)).astype("int32")
    mask = np.arange(LENGTH) < rng.integers(4, LENGTH + 1, size=(8, 1))
    x = {"token_ids": ids[:, :-1], "padding_mask": mask.astype("int32")}
    return x, ids[:, 1:], mask.astype("float32")


def test_a_token_net_becomes_sparse():
    model = models.token_net(20)
    x, y, weight = make_tokens()
    x = x["token_ids"]
    start = numpy(model(x))
    cast = compiled(model=model, teacher="self")
    np.testing.assert_array_equal(numpy(model(x)), start)
    monitor = [kwm.SparsityMonitor()]
    history = fit(
        cast, (x, y), epochs=8, sample_weight=weight, callbacks=monitor
    )
    assert cast.adam_s.total_steps == 16
    assert history["kept_share"][-1] == pytest.approx(1.0, abs=1e-3)
    before = cast.predict(x, verbose=0)
    assert cast.finalize() is model
    kwm.assert_sparse(model)
    after = numpy(model(x))
    np.testing.assert_allclose(after, before, atol=1e-5)
    # What was compiled does not remember the scales.
    loss = cast.evaluate(x, y, verbose=0, return_dict=True)["student_loss"]
    expected = float(numpy(casts.cross_entropy()(y, after)))
    assert loss == pytest.approx(expected, rel=1e-5)


@one_backend
def test_the_default_rate_is_in_proportion_to_small_weights():
    """Found on a model whose weights are a sixteenth of the usual ones."""
    rates = []
    for size in (0.4, 0.2, 0.1, 0.0125):
        model = models.mlp(16, 16, 4)
        for layer in model.layers:
            signs = np.sign(models.normal(*layer.kernel.shape))
            layer.kernel.assign(size * signs)
        cast = kwm.CAST(model, init="magnitude")
        cast.compile(loss="mse")
        rates.append(float(numpy(cast.adam_s.learning_rate)))
    known = kwm.CAST.default_recipe("magnitude")["learning_rate"]
    expected = [known, known, known / 2, known / 16]
    np.testing.assert_allclose(rates, expected, rtol=1e-5)
    with pytest.raises(ValueError, match="`targets` must be `Targets`"):
        kwm.CAST.default_recipe("magnitude", targets=[model])


@one_backend
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
    x, y, w = keras.tree.map_structure(np.asarray, preprocessor(texts))
    loss = cast.evaluate(x, y, 2, sample_weight=w, verbose=0)
    assert history["val_loss"][-1] == pytest.approx(loss, rel=1e-6)
    with pytest.warns(UserWarning, match="step 6, beyond the run of 4"):
        history = fit(cast, (texts, None), 2, validation_data=dataset)
    assert history["val_loss"][-1] == pytest.approx(loss, rel=1e-6)
    with pytest.raises(ValueError, match="preprocessor"):
        compiled().fit(texts)


@one_backend
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
            fit(cast, pair, **more)
            ends.append(weights_of(cast.finalize()))
        for a, b in zip(*ends, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@one_backend
@pytest.mark.parametrize(
    ("optimizer", "options", "steps"),
    [
        ({}, {"batch_size": 4}, 18),
        ({}, {"batch_size": 4, "validation_split": 0.5}, 9),
        ({}, {"batch_size": 4, "steps_per_epoch": 2}, 6),
        ({"gradient_accumulation_steps": 2}, {"batch_size": 4}, 9),
        ({"total_steps": 7}, {}, 7),
    ],
)
def test_the_length_of_the_run(optimizer, options, steps):
    x, y = make_data(24)
    cast = compiled(kwm.AdamS(**optimizer))
    if not optimizer:
        batches = casts.Batches(x, y, 4)
        with pytest.raises(ValueError, match="steps_per_epoch"):
            cast.fit(batches[i] for i in range(6))
    assert started(cast, x, y, epochs=3, **options)[0] == steps


@one_backend
def test_a_fit_that_failed_is_planned_anew():
    x, y = make_data()
    cast = compiled()
    with pytest.raises(ValueError, match="Input 0"):
        fit(cast, (x[:, :7], y))
    assert cast.adam_s.total_steps == 4
    fit(cast, epochs=2)
    assert cast.adam_s.total_steps == int(cast.adam_s.iterations) == 8
    rate = cast.adam_s.get_config()["learning_rate"]["config"]
    assert rate["total_steps"] == 8
    kwm.assert_sparse(cast.finalize(), "2:4")


@breadth("init", ["sparsegpt", "wanda", "magnitude"])
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
        # A unit of few kept weights may never be above zero.
        assert np.mean(after[before != 0] != before[before != 0]) > 0.8


@one_backend
def test_a_start_is_refined():
    x, y = make_data(40)
    options = {"init": "magnitude", "init_refine": "blocks", "init_rows": 16}
    cast = compiled(teacher="self", **options)
    dense = numpy(cast.teacher(x))
    started(cast, x, y, batch_size=4)
    blocks = cast.init_report.blocks
    assert len(blocks) == 2
    assert all(block.after < block.before for block in blocks)
    np.testing.assert_array_equal(numpy(cast.teacher(x)), dense)
    expected = make_mlp()
    kwm.sparsify(
        expected, "2:4", x[:16], refine="blocks", batch_size=4, verbose=0
    )
    for target, own in zip(kwm.find_targets(expected), cast.targets):
        found = numpy(own.variable)
        np.testing.assert_allclose(found, numpy(target.variable), rtol=1e-5)
    fit(cast, (x, y))
    kwm.assert_sparse(cast.finalize(), "2:4")


@one_backend
@pytest.mark.parametrize("init", ["dense", "sparsegpt"])
def test_a_start_that_fails_leaves_the_model_alone(init):
    x, y = make_data()
    cast = compiled(init=init)
    before = weights_of(cast.student)
    with pytest.raises(ValueError, match=r"finite.*/kernel"):
        fit(cast, (np.full_like(x, np.nan), y))
    assert_same(weights_of(cast.student), before)
    fit(cast)
    kwm.assert_sparse(cast.finalize(), "2:4")


@one_backend
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pattern": "2:5"}, "no kernel that fits"),
        ({"init_refine": "blocks"}, "`init_refine`"),
        ({"teacher": mlp(9, 4)}, "incompatible"),
        ({"teacher": mlp(8, 5)}, r"[Oo]utput"),
        ({"teacher": keras.Sequential()}, "another built"),
        ({"teacher": None, "teacher_dtype": "bfloat16"}, "`teacher_dtype`"),
        ({"distillation_weight": 1.5}, "`distillation_weight`"),
    ],
)
def test_wrong_arguments_leave_the_model_alone(arguments, message):
    model = make_mlp()
    model.compile("adam", casts.cross_entropy())
    model.fit(*make_data(), verbose=0)
    before, optimizer = weights_of(model), model.optimizer
    with pytest.raises(ValueError, match=message):
        kwm.CAST(model, **arguments)
    assert_same(weights_of(model), before)
    assert {type(layer) for layer in model.layers} == {keras.layers.Dense}
    assert not slots(model.layers[0])
    assert model.optimizer is optimizer
    assert model.compiled
    if isinstance(arguments.get("teacher"), keras.Model):
        assert arguments["teacher"].trainable


@one_backend
def test_wrong_models():
    model, other = make_mlp(), make_mlp()
    with pytest.raises(ValueError, match="frozen copy"):
        kwm.CAST(model, teacher=model)
    with pytest.raises(ValueError, match="built"):
        kwm.CAST(models.Subclassed())
    model.trainable = False
    with pytest.raises(ValueError, match="frozen"):
        kwm.CAST(model)
    model.trainable = True
    model.layers[0].trainable = False
    cast = kwm.CAST(model)
    assert [t.layer for t in cast.targets] == [model.layers[-1]]
    assert any(s.reason == "frozen" for s in cast.targets.skipped)
    with pytest.raises(ValueError, match="fold"):
        kwm.CAST(model, teacher=other)
    assert other.trainable


@one_backend
def test_a_subclassed_model_that_was_trained_before():
    model, (x, y) = models.Subclassed(), make_data()
    model.compile("adam", casts.cross_entropy())
    model.fit(x, y, verbose=0)
    cast = compiled(model=model, teacher="self")
    fit(cast, (x, y))
    kwm.assert_sparse(cast.finalize(), "2:4")


@one_backend
def test_wrong_compile_and_order():
    x, y = make_data()
    cast = kwm.CAST(make_mlp())
    for optimizer in ("adam", kwm.AdamS(pattern="1:4")):
        with pytest.raises(ValueError, match=r"`AdamS` of pattern .2:4"):
            cast.compile(optimizer, loss=casts.cross_entropy())
    with pytest.raises(ValueError, match="`loss`"):
        cast.compile()
    with pytest.raises(ValueError, match="compile"):
        cast.fit(x, y)
    for _ in range(2):
        with pytest.raises(ValueError, match="not trained"):
            cast.finalize()
        cast.compile(loss=casts.cross_entropy())
    started(cast, x, y)
    with pytest.raises(ValueError, match="no step"):
        cast.finalize()
    with pytest.raises(NotImplementedError, match="finalize"):
        cast.get_config()


@one_backend
@pytest.mark.filterwarnings("ignore:AdamS. this cuts")
@pytest.mark.parametrize(
    ("pattern", "scaling_groups"), [("2:4", 2), ("1:4", 0)]
)
def test_finalize_multiplies_the_pruned_weights(pattern, scaling_groups):
    model = make_mlp()
    cast = compiled(model=model, pattern=pattern, scaling_groups=scaling_groups)
    rng = np.random.default_rng(0)
    x, y = make_data()
    started(cast, x, y, epochs=4)
    # The state after a training: any weights, scales, masks and steps.
    expected = []
    states = cast.adam_s.sparsified_state
    for target, (variable, _, bits) in zip(cast.targets, states, strict=True):
        w = rng.normal(size=variable.shape).astype("float32")
        variable.assign(w)
        mask = numpy(kwm.ops.nm_mask(w, pattern, 0))
        bits.assign(kwm.ops.pack_bits(mask))
        scale = np.ones((1, w.shape[1]), "float32")
        if scaling_groups:
            scale = rng.normal(size=(2, w.shape[1])).astype("float32")
            target.layer.trainable_weights[-1].assign(scale)
        expected.append(w * mask * np.repeat(scale, len(w) // len(scale), 0))
    cast.adam_s.iterations.assign(16)
    assert cast.finalize() is model
    for layer, w in zip(model.layers, expected, strict=True):
        assert type(layer) is keras.layers.Dense
        np.testing.assert_allclose(numpy(layer.kernel), w, rtol=1e-6)
    kwm.assert_sparse(model, pattern)
    for call in (cast.finalize, lambda: cast.fit(x, y)):
        with pytest.raises(ValueError, match=r"after `finalize\(\)`"):
            call()


@one_backend
def test_finalize_folds_the_scales_alone():
    layers = keras.layers.Dense(8), kwm.CompanderDense(4)
    model = models.sequential((8,), *layers)
    cast = compiled(model=model, targets=model.layers[0])
    assert [t.layer for t in cast.targets] == [model.layers[0]]
    fit(cast)
    cast.finalize()
    assert type(model.layers[0]) is keras.layers.Dense
    assert type(model.layers[1]) is kwm.CompanderDense


@one_backend
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
    fit(cast, epochs=2)
    kwm.assert_sparse(cast.finalize(), "2:4")


@one_backend
def test_a_fit_beyond_the_end_is_warned_about_and_nan_refused(recwarn):
    batches = casts.Batches(*make_data(), 4)
    cast = compiled()
    fit(cast, epochs=3, callbacks=[casts.stopping(cast, 0)])
    fit(cast, epochs=3, initial_epoch=1)
    planned = compiled(kwm.AdamS(total_steps=7))
    fit(planned, steps_per_epoch=2, epochs=3)
    assert not [w for w in recwarn if "CAST" in str(w.message)]
    before = weights_of(cast.student)
    with pytest.warns(UserWarning, match="step 16, beyond the run of 12"):
        fit(cast)
    assert_same(weights_of(cast.student), before)
    with pytest.warns(UserWarning, match="step 8, beyond the run of 7"):
        started(planned, batches, steps_per_epoch=2)
    # Where the length is not known, it is seen at the end. Keras takes one
    # batch of a generator twice on TensorFlow.
    with pytest.warns(UserWarning, match=r"step 1[01], beyond the run of 7"):
        planned.fit((batches[i] for i in range(4)), verbose=0)
    kernel = cast.targets[0].variable
    kernel.assign(np.full(kernel.shape, np.nan))
    before = weights_of(cast.student)
    with pytest.raises(ValueError, match=rf"{kernel.path}.*diverged"):
        cast.finalize()
    assert_same(weights_of(cast.student), before)


@one_backend
def test_an_early_stop_is_warned_about():
    cast = compiled()
    fit(cast, epochs=8, callbacks=[casts.stopping(cast, 1)])
    with pytest.warns(UserWarning, match="this cuts.* after 8 of 32 steps"):
        cast.finalize()


@pytest.mark.parametrize(
    ("change", "last_rate", "rises"),
    [(70, 3.0, True), (0, 3.0, True), (70, 1e-4, False)],
)
def test_a_loss_that_rose_from_a_one_shot_start_is_warned_about(
    change, last_rate, rises, recwarn, tmp_path
):
    rates = keras.optimizers.schedules.PiecewiseConstantDecay(
        [change], [1e-4, last_rate]
    )

    def start():
        optimizer = kwm.AdamS(rates, total_steps=80)
        return compiled(optimizer, init="magnitude")

    cast = start()
    callbacks = [kwm.Checkpoint(tmp_path)]
    fit(cast, batch_size=8, epochs=20, callbacks=callbacks)
    cast = start()
    fit(cast, batch_size=8, epochs=40, callbacks=callbacks)
    assert len(cast._run_losses.values) == 80
    cast.finalize()
    rose = [each for each in recwarn if "the loss rose" in str(each.message)]
    assert len(rose) == rises


@one_backend
@pytest.mark.parametrize("init", ["dense", "sparsegpt"])
def test_a_resumed_run_is_the_same(init, tmp_path):
    def start():
        dropout = keras.layers.Dropout(0.3, seed=1)
        layers = keras.layers.Dense(16), dropout, keras.layers.Dense(4)
        model = models.randomize(models.sequential((8,), *layers))
        return compiled(model=model, teacher="self", init=init)

    def run(*callbacks, cast=None, **kwargs):
        cast = cast or start()
        fit(cast, epochs=4, callbacks=list(callbacks), **kwargs)
        variables = [numpy(v) for v in cast.optimizer.variables]
        return weights_of(cast) + variables

    path = str(tmp_path / "{epoch}.weights.h5")
    save = keras.callbacks.ModelCheckpoint(path, save_weights_only=True)
    whole = run(save)
    cast = start()
    cast.load_weights(path.format(epoch=2))
    assert (cast.adam_s.total_steps, int(cast.adam_s.iterations)) == (16, 8)
    assert_same(run(cast=cast, initial_epoch=2), whole)
    assert cast.init_report is None
    # Also the last one can be pruned at once.
    final = weights_of(cast.finalize())
    cast = start()
    cast.load_weights(path.format(epoch=4))
    assert_same(weights_of(cast.finalize()), final)

    backup, restore = (
        keras.callbacks.BackupAndRestore(tmp_path / "backup") for _ in range(2)
    )
    interrupt = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: epoch == 2 and casts.interrupt()
    )
    with pytest.raises(casts.Interrupted):
        run(backup, interrupt)
    assert_same(run(restore), whole)


def test_loss_scaling_goes_on_in_a_second_fit_and_from_a_checkpoint(tmp_path):
    def scaled():
        model = make_mlp(dtype="mixed_float16")
        return compiled(model=model, teacher="self")

    cast = scaled()
    assert isinstance(cast.optimizer, keras.optimizers.LossScaleOptimizer)
    fit(cast, epochs=4, callbacks=[casts.stopping(cast, 1)])
    count = len(cast.optimizer.variables)
    cast.save_weights(tmp_path / "scaled.weights.h5")
    restored = scaled()
    restored.load_weights(tmp_path / "scaled.weights.h5")
    assert restored.adam_s.total_steps == 16
    optimizers = restored.optimizer, cast.optimizer
    assert_same(*([numpy(v) for v in each.variables] for each in optimizers))

    monitor = [kwm.SparsityMonitor()]
    history = fit(cast, epochs=4, initial_epoch=2, callbacks=monitor)
    assert len(cast.optimizer.variables) == count
    assert np.isfinite(history["loss"]).all()
    assert history["kept_share"][-1] == pytest.approx(1.0, abs=1e-3)
    kwm.assert_sparse(cast.finalize(), "2:4")


# tests/saving/test_checkpoint.py stops CAST, and loss scaling, on each backend.
@one_backend
@pytest.mark.parametrize("dtype", ["mixed_float16", "bfloat16"])
def test_a_run_that_was_stopped_twice_is_the_same(dtype, tmp_path):
    def run(folder, stop=None):
        cast = compiled(model=make_mlp(dtype=dtype), teacher="self")
        interrupt = keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: epoch == stop and casts.interrupt()
        )
        callbacks = [kwm.Checkpoint(tmp_path / folder), interrupt]
        fit(cast, epochs=4, callbacks=callbacks)
        variables = [numpy(v) for v in cast.optimizer.variables]
        return weights_of(cast) + variables

    for stop in (0, 2):
        with pytest.raises(casts.Interrupted):
            run("twice", stop)
    assert_same(run("twice"), run("whole"))


@one_backend
def test_a_global_policy_is_seen():
    keras.config.set_dtype_policy("mixed_float16")
    try:
        cast = compiled(teacher="self")
    finally:
        keras.config.set_dtype_policy("float32")
    assert isinstance(cast.optimizer, keras.optimizers.LossScaleOptimizer)
    assert started(cast, *make_data(), epochs=4)[0] == 4
