import zipfile

import keras
import keras_hub
import numpy as np
import pytest

import keras_weightmods as kwm
from keras_weightmods.core.reparameterization import slots
from tests.models import (
    Subclassed,
    assert_same,
    causal_lm,
    gpt2_preprocessor,
    numpy,
    sequential,
    weights_of,
)
from tests.sparsity.casts import (
    Batches,
    Interrupt,
    Interrupted,
    compiled_cast,
    cross_entropy,
    make_data,
    make_mlp,
    started,
)

LENGTH = 10

# Most runs here are too short for the published pull, and say so.
pytestmark = pytest.mark.filterwarnings("ignore:AdamS. this schedule")


def make_tokens(samples=8, seed=2):
    """Inputs, labels and weights as a KerasHub preprocessor gives them."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, 20, size=(samples, LENGTH + 1))
    mask = np.arange(LENGTH) < rng.integers(4, LENGTH + 1, size=(samples, 1))
    x = {
        "token_ids": ids[:, :-1].astype("int32"),
        "padding_mask": mask.astype("int32"),
    }
    return x, ids[:, 1:].astype("int32"), mask.astype("float32")


def kernels_of(cast):
    return [numpy(target.variable) for target in cast.targets]


def steps_of(cast):
    return int(numpy(cast.adam_s.iterations.value))


# The main job, on each family of KerasHub


@pytest.mark.parametrize(
    ("family", "pattern", "dtype"),
    [
        ("llama", "2:4", None),
        ("gpt2", "1:4", None),
        ("gemma", "2:4", "mixed_bfloat16"),
    ],
)
def test_a_causal_lm_becomes_sparse(family, pattern, dtype, tmp_path):
    model = causal_lm(family, dtype=dtype)
    x, y, weight = make_tokens()
    start = numpy(model(x))
    classes = [type(layer) for layer in model._flatten_layers()]
    shapes = [tuple(v.shape) for v in model.weights]

    cast = kwm.CAST(
        model, pattern, teacher_dtype="bfloat16" if dtype is None else None
    )
    np.testing.assert_array_equal(numpy(model(x)), start)
    perplexity = keras_hub.metrics.Perplexity(from_logits=True, mask_token_id=0)
    cast.compile(weighted_metrics=[perplexity])
    history = cast.fit(
        x,
        y,
        sample_weight=weight,
        batch_size=4,
        epochs=8,
        validation_data=(x, y, weight) if family == "llama" else None,
        callbacks=[kwm.SparsityMonitor()],
        verbose=0,
    ).history
    assert {"loss", "perplexity", "kept_share"} <= set(history)
    assert ("val_perplexity" in history) == (family == "llama")
    assert cast.adam_s.total_steps == 16
    assert history["kept_share"][-1] == pytest.approx(1.0, abs=1e-3)
    before = numpy(model(x))

    sparse = cast.finalize()
    assert sparse is model
    kwm.assert_sparse(sparse, pattern)
    assert cast.report.totals["exact"] == len(cast.targets)
    assert cast.report.skipped == cast.targets.skipped
    assert [type(layer) for layer in sparse._flatten_layers()] == classes
    assert [tuple(v.shape) for v in sparse.weights] == shapes
    after = numpy(model(x))
    tolerance = 1e-5 if dtype is None else 0.05
    np.testing.assert_allclose(after, before, atol=tolerance)

    path = tmp_path / "sparse.keras"
    sparse.save(path)
    with zipfile.ZipFile(path) as archive:
        assert b"keras_weightmods" not in archive.read("config.json")
    loaded = keras.saving.load_model(path)
    np.testing.assert_array_equal(numpy(loaded(x)), after)

    loaded.compile(sampler="greedy")
    prompt = {
        "token_ids": x["token_ids"],
        "padding_mask": (np.arange(LENGTH) < 4).astype("int32")
        + np.zeros_like(x["token_ids"]),
    }
    generated = loaded.generate(prompt, stop_token_ids=None)["token_ids"]
    generated = np.asarray(generated)
    np.testing.assert_array_equal(generated[:, :4], x["token_ids"][:, :4])
    if dtype is None:
        logits = loaded(
            {
                "token_ids": generated,
                "padding_mask": np.ones_like(generated),
            }
        )
        greedy = numpy(logits).argmax(axis=-1)
        np.testing.assert_array_equal(generated[:, 4:], greedy[:, 3:-1])


def test_raw_strings():
    import tensorflow as tf

    texts = ["abcdef", "fedcba abc", "a b c d", "hgfedcba"]
    preprocessor = gpt2_preprocessor(LENGTH)
    model = causal_lm("gpt2", preprocessor)
    cast = kwm.CAST(model, teacher=None)
    cast.compile()
    dataset = tf.data.Dataset.from_tensor_slices(texts).batch(2)
    history = cast.fit(
        dataset, validation_data=texts, epochs=2, verbose=0
    ).history
    assert cast.adam_s.total_steps == 4
    assert "distillation_loss" not in history

    with pytest.warns(UserWarning, match="the run of 4 steps .* is over"):
        history = cast.fit(
            texts, batch_size=2, validation_data=dataset, verbose=0
        ).history
    assert history["loss"][0] > 0
    expected = history["val_loss"][0]
    tokens = preprocessor(texts)
    tokens = keras.tree.map_structure(np.asarray, tokens)
    for data in (texts, np.array(texts), np.array(texts, dtype=object)):
        loss = cast.evaluate(data, batch_size=2, verbose=0)
        assert loss == pytest.approx(expected, rel=1e-6)
    loss = cast.evaluate(
        tokens[0], tokens[1], sample_weight=tokens[2], batch_size=2, verbose=0
    )
    assert loss == pytest.approx(expected, rel=1e-6)

    with pytest.raises(ValueError, match="preprocessor"):
        plain = kwm.CAST(make_mlp())
        plain.compile(loss=cross_entropy())
        plain.fit(texts)


# What fit takes


@pytest.mark.parametrize("kind", ["tf.data", "PyDataset", "generator", "split"])
def test_the_length_of_the_run_and_the_importance(kind):
    x, y = make_data(24)
    steps, expected = started(compiled_cast(), x, y, batch_size=4, epochs=3)
    assert steps == 18
    cast = compiled_cast()
    if kind == "tf.data":
        import tensorflow as tf

        data = tf.data.Dataset.from_tensor_slices((x, y)).batch(4)
        steps, importance = started(cast, data, epochs=3)
        assert steps == 18
    elif kind == "PyDataset":
        steps, importance = started(cast, Batches(x, y, 4), epochs=3)
        assert steps == 18
    elif kind == "generator":
        data = ((x[i : i + 4], y[i : i + 4]) for i in range(0, 24, 4))
        with pytest.raises(ValueError, match="steps_per_epoch"):
            cast.fit(data, epochs=3)
        steps, importance = started(cast, data, epochs=3, steps_per_epoch=2)
        assert steps == 6
    else:
        steps, importance = started(
            cast, x, y, batch_size=4, epochs=3, validation_split=0.5
        )
        assert steps == 9
    for a, b in zip(importance, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_total_steps_counts_updates():
    x, y = make_data(24)
    cast = kwm.CAST(make_mlp())
    optimizer = kwm.AdamS(gradient_accumulation_steps=2, criterion="activation")
    cast.compile(optimizer, loss=cross_entropy())
    assert started(cast, x, y, batch_size=4, epochs=3)[0] == 9
    cast = kwm.CAST(make_mlp())
    cast.compile(
        kwm.AdamS(total_steps=7, criterion="activation"), loss=cross_entropy()
    )
    assert started(cast, x, y, batch_size=4, epochs=3)[0] == 7


@pytest.mark.parametrize("init", ["dense", "wanda"])
def test_no_batch_of_a_generator_is_lost(init):
    data = Batches(*make_data(24), 4)
    finals = []
    for x in (data, (data[i] for i in range(6))):
        cast = compiled_cast(init=init)
        cast.fit(x, epochs=3, steps_per_epoch=2, shuffle=False, verbose=0)
        assert steps_of(cast) == 6
        finals.append(weights_of(cast.finalize()))
    assert_same(*finals)


def test_a_fit_that_failed_is_planned_anew():
    x, y = make_data()
    cast = compiled_cast()
    with pytest.raises(ValueError, match="Input 0"):
        cast.fit(x[:, :7], y, batch_size=4, verbose=0)
    assert cast.adam_s.total_steps == 4
    cast.fit(x, y, batch_size=4, epochs=2, verbose=0)
    assert cast.adam_s.total_steps == 8
    rate = cast.adam_s.get_config()["learning_rate"]["config"]
    assert rate["total_steps"] == 8
    assert steps_of(cast) == 8
    kwm.assert_sparse(cast.finalize(), "2:4")


def test_a_fit_beyond_the_plan_is_warned_about(recwarn):
    x, y = make_data()
    data = {"batch_size": 4, "shuffle": False, "verbose": 0}
    cast = compiled_cast()
    started(cast, x, y, epochs=3, batch_size=4)
    cast.fit(x[:4], y[:4], initial_epoch=11, epochs=12, **data)
    cast.fit(x, y, epochs=2, **data)
    assert cast.adam_s.total_steps == 12
    assert not [w for w in recwarn if "CAST" in str(w.message)]
    with pytest.warns(UserWarning, match="goes to step 13, beyond the 12"):
        cast.fit(x, y, **data)
    before = weights_of(cast.student)
    with pytest.warns(UserWarning, match="the run of 12 steps .* is over"):
        cast.fit(x, y, **data)
    assert_same(weights_of(cast.student), before)


# One-shot starts


@pytest.mark.parametrize("init", ["magnitude", "wanda", "sparsegpt"])
def test_a_start_is_sparsify_on_the_first_rows(init):
    x, y = make_data(40)
    expected = make_mlp()
    kwm.sparsify(expected, "2:4", init, x[:20], batch_size=4, verbose=0)
    model = make_mlp()
    dense = numpy(model(x))
    cast = kwm.CAST(model, init=init, init_rows=18)
    cast.compile(loss=cross_entropy())
    assert cast.init_report is None
    started(cast, x, y, batch_size=4)
    sparse = kernels_of(cast)
    for target, w in zip(kwm.find_targets(expected), sparse, strict=True):
        np.testing.assert_allclose(w, numpy(target.variable), rtol=1e-5)
    np.testing.assert_array_equal(numpy(cast.teacher(x)), dense)
    assert [k.method for k in cast.init_report.kernels] == [init] * 2

    # Not made again by another fit, whatever its data.
    started(cast, x[20:], y[20:], batch_size=4)
    assert_same(kernels_of(cast), sparse)

    cast.fit(x, y, batch_size=4, epochs=2, verbose=0)
    final = weights_of(cast.finalize())
    kwm.assert_sparse(model, "2:4")
    kernels = [w for w in final if w.ndim == 2]
    for before, after in zip(sparse, kernels, strict=True):
        np.testing.assert_array_equal(after != 0, before != 0)
        assert np.abs(after - before)[before != 0].min() > 0


def test_a_start_whose_mask_goes_on_changing():
    x, y = make_data(40)
    cast = kwm.CAST(make_mlp(), init="sparsegpt", scaling_groups=0)
    cast.compile(
        kwm.AdamS(3e-2, decay="relative", ramp=0.5, criterion="activation"),
        loss=cross_entropy(),
    )
    _, importance = started(cast, x, y, batch_size=4, epochs=4)
    # Of the sparse model's inputs, where the first layer sees the data.
    expected = np.sqrt((x[:32] ** 2).mean(axis=0))
    np.testing.assert_allclose(importance[0], expected, rtol=1e-5)
    before = [numpy(t.variable) != 0 for t in cast.targets]
    cast.fit(x, y, batch_size=4, epochs=4, verbose=0)
    sparse = cast.finalize()
    kwm.assert_sparse(sparse, "2:4")
    after = [w != 0 for w in weights_of(sparse) if w.ndim == 2]
    assert any((a != b).any() for a, b in zip(after, before, strict=True))


def test_a_start_is_in_the_checkpoint(tmp_path):
    x, y = make_data()
    path = tmp_path / "start.weights.h5"

    def make():
        return compiled_cast(init="sparsegpt")

    cast = make()
    started(cast, x, y, batch_size=4, epochs=2)
    cast.save_weights(path)
    fit = {"batch_size": 4, "epochs": 2, "shuffle": False, "verbose": 0}
    cast.fit(x, y, **fit)
    whole = weights_of(cast)
    cast = make()
    cast.load_weights(path)
    cast.fit(x, y, **fit)
    assert_same(weights_of(cast), whole)
    assert cast.init_report is None


def test_a_start_that_fails_leaves_the_model_alone():
    x, y = make_data()
    cast = compiled_cast(init="sparsegpt")
    before = weights_of(cast.student)
    with pytest.raises(ValueError, match="finite"):
        cast.fit(np.full_like(x, np.nan), y, batch_size=4, verbose=0)
    assert_same(weights_of(cast.student), before)
    cast.fit(x, y, batch_size=4, verbose=0)
    kwm.assert_sparse(cast.finalize(), "2:4")


# Wrong use


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pattern": "4:2"}, "pattern"),
        ({"pattern": "2:5"}, "no kernel that fits"),
        ({"init": "random"}, "`init`"),
        ({"init_rows": 0}, "`init_rows`"),
        ({"teacher": "other"}, "`teacher`"),
        ({"teacher": np.ones(3)}, "`teacher`"),
        ({"teacher": None, "teacher_dtype": "bfloat16"}, "`teacher_dtype`"),
        ({"teacher_dtype": "int8"}, "`teacher_dtype`"),
        ({"distillation_weight": 1.5}, "`distillation_weight`"),
        ({"distillation_weight": "much"}, "`distillation_weight`"),
        ({"temperature": 0}, "`temperature`"),
        ({"temperature": None}, "`temperature`"),
        ({"scaling_groups": -1}, "`scaling_groups`"),
        ({"scaling_groups": 1.0}, "`scaling_groups`"),
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
    model = make_mlp()
    with pytest.raises(ValueError, match="frozen copy"):
        kwm.CAST(model, teacher=model)
    with pytest.raises(ValueError, match="built"):
        kwm.CAST(Subclassed())
    with pytest.raises(ValueError, match="built"):
        kwm.CAST("model")
    other = keras.Sequential([keras.Input((8,)), keras.layers.Dense(5)])
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
    with pytest.raises(ValueError, match="fold"):
        kwm.CAST(model)
    other = make_mlp()
    with pytest.raises(ValueError, match="fold"):
        kwm.CAST(model, teacher=other)
    assert other.trainable
    assert all(layer.trainable for layer in other.layers)


def test_a_frozen_kernel_stays_dense():
    model = make_mlp()
    model.layers[0].trainable = False
    cast = kwm.CAST(model)
    assert [t.layer for t in cast.targets] == [model.layers[-1]]
    assert any(s.reason == "frozen" for s in cast.targets.skipped)


def test_wrong_compile_and_order():
    x, y = make_data()
    cast = kwm.CAST(make_mlp())
    with pytest.raises(ValueError, match="`AdamS`"):
        cast.compile("adam", loss=cross_entropy())
    with pytest.raises(ValueError, match="`AdamS`"):
        cast.compile(keras.optimizers.Adam(), loss=cross_entropy())
    with pytest.raises(ValueError, match=r"`AdamS` of pattern .2:4"):
        cast.compile(kwm.AdamS(pattern="1:4"), loss=cross_entropy())
    with pytest.raises(ValueError, match="`loss`"):
        cast.compile()
    with pytest.raises(ValueError, match="compile"):
        cast.fit(x, y)
    with pytest.raises(ValueError, match="not trained"):
        cast.finalize()
    cast.compile(loss=cross_entropy())
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
    cast = kwm.CAST(model, pattern, scaling_groups=scaling_groups)
    cast.compile(loss=cross_entropy())
    rng = np.random.default_rng(0)
    x, y = make_data()
    started(cast, x, y, epochs=4)
    # As after a training: any weights, scales, masks and steps.
    kernels, expected = [], []
    for variable, _, _ in cast.adam_s.sparsified_state:
        w = rng.normal(size=variable.shape).astype("float32")
        variable.assign(w)
        kernels.append(w)
    n, m = kwm.ops.parse_pattern(pattern)
    masks = [np.asarray(numpy(kwm.ops.nm_mask(w, (n, m), 0))) for w in kernels]
    for (_, _, bits), mask in zip(
        cast.adam_s.sparsified_state, masks, strict=True
    ):
        bits.assign(kwm.ops.pack_bits(mask))
    assert_same(cast.adam_s.masks, masks)
    cast.adam_s.iterations.assign(16)
    for target, w, mask in zip(cast.targets, kernels, masks, strict=True):
        scale = np.ones((1, w.shape[1]), "float32")
        if scaling_groups:
            scale = rng.normal(size=(2, w.shape[1])).astype("float32")
            target.layer.trainable_weights[-1].assign(scale)
        expected.append(w * mask * np.repeat(scale, len(w) // len(scale), 0))
    sparse = cast.finalize()
    assert sparse is model
    for layer, w in zip(
        (model.layers[0], model.layers[-1]), expected, strict=True
    ):
        assert type(layer) is keras.layers.Dense
        np.testing.assert_allclose(numpy(layer.kernel), w, rtol=1e-6)
    kwm.assert_sparse(model, pattern)
    for call in (cast.finalize, lambda: cast.fit(x, y)):
        with pytest.raises(ValueError, match=r"after `finalize\(\)`"):
            call()


def test_finalize_folds_the_scales_alone():
    model = sequential((8,), keras.layers.Dense(8), kwm.CompanderDense(4))
    x, y = make_data()
    cast = kwm.CAST(model, targets=model.layers[0])
    assert [t.layer for t in cast.targets] == [model.layers[0]]
    cast.compile(loss=cross_entropy())
    cast.fit(x, y, batch_size=4, verbose=0)
    assert cast.report is None
    cast.finalize()
    assert type(model.layers[0]) is keras.layers.Dense
    assert type(model.layers[1]) is kwm.CompanderDense


def test_predict_and_evaluate_follow_finalize():
    x, y = make_data()
    cast = kwm.CAST(make_mlp())
    cast.compile(
        kwm.AdamS(0.05, decay="relative", ramp=1.0), loss=cross_entropy()
    )
    cast.fit(x, y, batch_size=8, epochs=2, verbose=0)
    cast.predict(x, verbose=0)
    cast.evaluate(x, y, verbose=0)
    sparse = cast.finalize()
    logits = numpy(sparse(x))
    np.testing.assert_allclose(
        cast.predict(x, verbose=0), logits, rtol=1e-5, atol=1e-6
    )
    loss = cast.evaluate(x, y, verbose=0, return_dict=True)["student_loss"]
    expected = float(numpy(cross_entropy()(y, logits)))
    assert loss == pytest.approx(expected, rel=1e-5)


def test_a_target_frozen_since_leaves_the_model_alone():
    x, y = make_data()
    model = make_mlp()
    cast = kwm.CAST(model)
    model.layers[0].trainable = False
    cast.compile(kwm.AdamS(total_steps=2), loss=cross_entropy())
    with pytest.warns(UserWarning, match="leaves 1 targets"):
        cast.train_on_batch(x, y)
    before = weights_of(model)
    for call in (cast.finalize, lambda: cast.fit(x, y, verbose=0)):
        with pytest.raises(ValueError, match="frozen since"):
            call()
        assert_same(weights_of(model), before)
    model.layers[0].trainable = True
    cast.compile(kwm.AdamS(decay="relative"), loss=cross_entropy())
    cast.fit(x, y, epochs=2, verbose=0)
    kwm.assert_sparse(cast.finalize(), "2:4")


# Interruption


STEPS = 16


def resumable():
    keras.utils.set_random_seed(0)
    dropout = keras.layers.Dropout(0.25)
    dense = keras.layers.Dense(16, "relu"), keras.layers.Dense(4)
    cast = kwm.CAST(sequential((8,), dense[0], dropout, dense[1]))
    cast.compile(loss=cross_entropy())
    return cast


def run(cast, **kwargs):
    x, y = make_data()
    cast.fit(
        x, y, batch_size=16, epochs=STEPS, shuffle=False, verbose=0, **kwargs
    )
    return weights_of(cast) + [numpy(v) for v in cast.optimizer.variables]


def test_a_resumed_run_is_the_same(tmp_path):
    paths = {k: tmp_path / f"{k}.weights.h5" for k in (3, 10)}

    class Save(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch + 1 in paths:
                self.model.save_weights(paths[epoch + 1])

    whole = run(resumable(), callbacks=[Save()])
    for k, path in paths.items():
        cast = resumable()
        cast.load_weights(path)
        assert cast.adam_s.total_steps == STEPS
        assert steps_of(cast) == k
        assert_same(run(cast, initial_epoch=k), whole)
    # Also the last one can be pruned at once.
    cast.save_weights(tmp_path / "end.weights.h5")
    final = weights_of(cast.finalize())
    cast = resumable()
    cast.load_weights(tmp_path / "end.weights.h5")
    assert_same(weights_of(cast.finalize()), final)

    backup = tmp_path / "backup"
    cast = resumable()
    with pytest.raises(Interrupted):
        run(
            cast,
            callbacks=[
                keras.callbacks.BackupAndRestore(backup),
                Interrupt(epoch=6),
            ],
        )
    cast = resumable()
    restore = keras.callbacks.BackupAndRestore(backup)
    assert_same(run(cast, callbacks=[restore]), whole)


def test_interrupted_in_the_middle_of_an_epoch(tmp_path):
    x, y = make_data(24)
    path = tmp_path / "middle.weights.h5"

    class Save(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if steps_of(self.model) == 9:
                self.model.save_weights(path)

    def fit(cast, x, y, **kwargs):
        cast.fit(
            x, y, batch_size=4, epochs=3, shuffle=False, verbose=0, **kwargs
        )

    cast = resumable()
    fit(cast, x, y, callbacks=[Save()])
    whole = weights_of(cast)
    cast = resumable()
    cast.load_weights(path)
    keras.utils.set_random_seed(5)
    fit(cast, x[12:], y[12:], initial_epoch=2)
    fit(cast, x, y, initial_epoch=2)
    assert_same(weights_of(cast), whole)


@pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="a generator of torch"
)
@pytest.mark.parametrize(
    "state", [np.zeros(3, "uint8"), np.zeros(5056, "float32")]
)
def test_a_random_state_that_does_not_fit(state):
    cast = resumable()
    before = cast._run.random_stream.states["cpu"]
    with pytest.raises(ValueError, match="random state"):
        cast.load_own_variables({"random_state_cpu": state})
    np.testing.assert_array_equal(cast._run.random_stream.states["cpu"], before)


# Precision and backends


def test_a_checkpoint_with_loss_scaling(tmp_path):
    def scaled():
        cast = kwm.CAST(make_mlp(dtype="mixed_float16"))
        cast.compile(loss=cross_entropy())
        return cast

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
    for a, b in zip(
        cast.optimizer.variables, restored.optimizer.variables, strict=True
    ):
        np.testing.assert_array_equal(numpy(a), numpy(b))


@pytest.mark.parametrize("globally", [False, True])
def test_mixed_float16(globally):
    x, y = make_data()
    before = keras.config.dtype_policy()
    try:
        if globally:
            keras.config.set_dtype_policy("mixed_float16")
        model = make_mlp(dtype=None if globally else "mixed_float16")
        cast = kwm.CAST(model)
        cast.compile(loss=cross_entropy())
    finally:
        keras.config.set_dtype_policy(before)
    assert isinstance(cast.optimizer, keras.optimizers.LossScaleOptimizer)
    if globally:
        assert started(cast, x, y, epochs=4)[0] == 4
        return
    history = cast.fit(
        x,
        y,
        batch_size=4,
        epochs=4,
        callbacks=[kwm.SparsityMonitor()],
        verbose=0,
    ).history
    assert np.isfinite(history["loss"]).all()
    assert history["kept_share"][-1] == pytest.approx(1.0, abs=1e-3)
    kwm.assert_sparse(cast.finalize(), "2:4")


def test_jit_compile_is_the_users_choice():
    cast = kwm.CAST(make_mlp(), teacher=None)
    cast.compile(loss=cross_entropy(), jit_compile=False, metrics=["accuracy"])
    assert not cast.jit_compile
    x, y = make_data()
    results = cast.evaluate(x, y, 4, verbose=0, return_dict=True)
    assert set(results) == {"loss", "accuracy"}
