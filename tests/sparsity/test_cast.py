import json
import zipfile

import keras
import keras_hub
import numpy as np
import pytest
from keras import ops

import keras_weightmods as kwm
from keras_weightmods.core.seam import is_reparameterized
from keras_weightmods.sparsity.schedules import WarmupLinearDecay
from tests.models import (
    Subclassed,
    assert_same,
    causal_lm,
    gpt2_preprocessor,
    mlp,
    numpy,
    randomize,
    sequential,
    token_net,
    two_heads,
    weights_of,
)

LENGTH = 10

# Most runs here are too short for the published pull, and say so.
pytestmark = pytest.mark.filterwarnings("ignore:AdamS. this schedule")


def cross_entropy():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def make_mlp(seed=0, **kwargs):
    return randomize(mlp(8, 16, 4, **kwargs), seed, 0.3)


def make_data(samples=16, seed=1):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(samples, 8)).astype("float32")
    return x, rng.integers(4, size=(samples,))


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


class Interrupt(keras.callbacks.Callback):
    """Raises `Interrupted` at the end of an epoch, or before the first."""

    def __init__(self, epoch=None):
        super().__init__()
        self.epoch = epoch

    def on_train_begin(self, logs=None):
        if self.epoch is None:
            raise Interrupted

    def on_epoch_end(self, epoch, logs=None):
        if epoch == self.epoch:
            raise Interrupted


class Interrupted(Exception):
    pass


class Batches(keras.utils.PyDataset):
    def __init__(self, x, y, batch_size):
        super().__init__()
        self.data, self.size = (x, y), batch_size

    def __len__(self):
        return len(self.data[0]) // self.size

    def __getitem__(self, index):
        part = slice(index * self.size, (index + 1) * self.size)
        return tuple(a[part] for a in self.data)


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


def started(cast, *args, **kwargs):
    """Runs all of `fit` up to the first step."""
    with pytest.raises(Interrupted):
        cast.fit(*args, callbacks=[Interrupt()], verbose=0, **kwargs)
    importance = [numpy(v) for v in cast.adam_s._importance if v is not None]
    return cast.adam_s.total_steps, importance


def compiled_cast(**kwargs):
    cast = kwm.CAST(make_mlp(), teacher=None, **kwargs)
    cast.compile(loss=cross_entropy())
    return cast


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


# Losses


def reference_losses(student, teacher, y, weight, temperature):
    """Cross-entropy and KL with the weights, over the number of positions."""

    def log_softmax(z):
        z = z.astype("float64")
        z = z - z.max(axis=-1, keepdims=True)
        return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))

    rows = log_softmax(student)
    entropy = -np.take_along_axis(rows, y[..., None], axis=-1)[..., 0]
    p, q = (
        log_softmax(teacher / temperature),
        log_softmax(student / temperature),
    )
    kl = temperature**2 * (np.exp(p) * (p - q)).sum(axis=-1)
    return (entropy * weight).mean(), (kl * weight).mean()


@pytest.mark.parametrize("mask_zero", [False, True])
def test_both_losses_honour_weights_and_masks(mask_zero):
    model = token_net(mask_zero=mask_zero)
    cast = kwm.CAST(model, distillation_weight=0.25, temperature=2.0)
    cast.compile(loss=cross_entropy())
    rng = np.random.default_rng(0)
    x = rng.integers(0, 20, size=(3, 5))
    x[:, -1] = 0
    y = rng.integers(4, size=(3, 5))
    weight = rng.uniform(0, 2, size=(3, 5)).astype("float32")
    taught = numpy(model(x))
    for variable in model.trainable_variables:
        variable.assign_add(
            rng.normal(size=variable.shape).astype("float32") * 0.5
        )
    total = weight.astype("float64")
    if mask_zero:
        # Keras takes the mean over what is not masked.
        total = total * (x != 0) * x.size / (x != 0).sum()
    y_pred = cast(x, training=True)
    entropy, kl = reference_losses(numpy(y_pred), taught, y, total, 2.0)
    loss = cast.compute_loss(x, y, y_pred, weight)
    assert float(numpy(loss)) == pytest.approx(
        0.75 * entropy + 0.25 * kl, rel=1e-5
    )
    results = {m.name: float(m.result()) for m in cast.metrics if m.variables}
    assert results["student_loss"] == pytest.approx(entropy, rel=1e-5)
    assert results["distillation_loss"] == pytest.approx(kl, rel=1e-5)
    assert kl > 0.01


def test_positions_of_weight_zero_change_nothing(tmp_path):
    cast = kwm.CAST(token_net())
    cast.compile(loss=cross_entropy())
    rng = np.random.default_rng(0)
    x = rng.integers(0, 10, size=(8, 6))
    y = rng.integers(4, size=(8, 6))
    weight = (rng.uniform(size=(8, 6)) < 0.6).astype("float32")
    start = tmp_path / "start.weights.h5"
    cast.adam_s.total_steps = 12
    cast.optimizer.build(cast.trainable_variables)
    cast.save_weights(start)

    def train(x, y):
        cast.load_weights(start)
        cast.fit(
            x,
            y,
            sample_weight=weight,
            batch_size=4,
            epochs=6,
            shuffle=False,
            verbose=0,
        )
        return weights_of(cast) + [numpy(v) for v in cast.optimizer.variables]

    clean = train(x, y)
    # Other tokens than any in use, so that their embeddings get no gradient.
    garbage = rng.integers(10, 20, size=x.shape)
    used = weight != 0
    dirty = train(np.where(used, x, garbage), np.where(used, y, (y + 1) % 4))
    assert_same(clean, dirty)


def test_the_models_own_losses_count_once():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8,))
    hidden = keras.layers.Dense(
        8, activity_regularizer="l2", kernel_regularizer="l2"
    )(inputs)
    outputs = {
        "a": keras.layers.Dense(4, name="a")(hidden),
        "b": keras.layers.Dense(4, name="b")(hidden),
    }
    model = keras.Model(inputs, outputs)
    cast = kwm.CAST(model, distillation_weight=0.5)
    cast.compile(loss={"a": cross_entropy(), "b": cross_entropy()})
    x, label = make_data(4)
    y = {"a": label, "b": label[::-1]}
    weight = {
        "a": np.array([1, 0, 1, 1], "float32"),
        "b": np.array([0, 0, 0, 2], "float32"),
    }
    for _ in range(2):
        y_pred = cast(x, training=True)
        loss = cast.compute_loss(x, y, y_pred, weight)
    predicted = {k: numpy(v) for k, v in y_pred.items()}
    expected = sum(
        reference_losses(
            predicted[k], predicted[k], y[k].astype("int64"), weight[k], 1.0
        )[0]
        for k in y
    )
    own = sum(float(numpy(v)) for v in model.losses)
    assert len(model.losses) == 2
    assert float(numpy(loss)) == pytest.approx(0.5 * (expected + own), rel=1e-5)


@pytest.mark.parametrize("as_dict", [False, True])
def test_losses_and_metrics_by_name(as_dict):
    x, y = make_data()
    cast = kwm.CAST(two_heads(as_dict))
    cast.compile(
        loss={"z": cross_entropy(), "a": cross_entropy()},
        loss_weights={"z": 1.0, "a": 0.5},
        metrics={"a": ["accuracy"]},
    )
    labels = {"z": y, "a": y[::-1]}
    history = cast.fit(x, labels, batch_size=8, verbose=0).history
    assert {"a_accuracy", "a_loss", "z_loss"} <= set(history)


@pytest.mark.parametrize("as_dict", [False, True])
def test_outputs_are_paired_by_name(as_dict):
    x, _ = make_data()
    # The same weights: nothing to learn, if z is taught by z.
    teacher = two_heads()
    if not as_dict:
        teacher = keras.Model(teacher.inputs[0], teacher.outputs[::-1])
    cast = kwm.CAST(two_heads(as_dict), teacher=teacher)
    cast.compile(loss={"z": cross_entropy(), "a": cross_entropy()})
    labels = np.zeros(len(x), "int64")
    labels = {"z": labels, "a": labels}
    cast.compute_loss(x, labels if as_dict else [*labels.values()], cast(x))
    distilled = cast.distillation_loss_tracker.result()
    assert float(numpy(distilled)) == pytest.approx(0, abs=1e-6)


# Teachers


def test_the_teacher_is_the_frozen_start():
    model = make_mlp()
    x, y = make_data()
    start = numpy(model(x))
    cast = kwm.CAST(model)
    cast.compile(loss=cross_entropy())
    frozen = model.layers[-1]
    frozen_bias = numpy(frozen.bias)
    # Freezing after the copy was taken moves variables to another list.
    frozen.bias.trainable = False
    cast.fit(x, y, batch_size=8, epochs=3, verbose=0)
    np.testing.assert_array_equal(numpy(cast.teacher(x)), start)
    np.testing.assert_array_equal(numpy(frozen.bias), frozen_bias)
    assert np.abs(numpy(model(x)) - start).max() > 1e-4
    assert not cast.teacher.trainable_variables
    cast.finalize()
    # The scales are gone from the model, not from the teacher.
    np.testing.assert_array_equal(numpy(cast.teacher(x)), start)


def test_the_memory_of_the_teacher():
    whole = kwm.CAST(make_mlp())
    scales = sum(int(np.prod(t.shape[1:])) * 2 for t in whole.targets)
    weights = 8 * 16 + 16 + 16 * 4 + 4 + scales
    seed_state = 2 * 4
    assert whole.teacher_bytes in (4 * weights, 4 * weights + seed_state)
    half = kwm.CAST(make_mlp(), teacher_dtype="bfloat16")
    assert half.teacher_bytes - whole.teacher_bytes == -2 * weights
    assert kwm.CAST(make_mlp(), teacher=None).teacher_bytes == 0


def test_another_model_as_teacher():
    teacher = make_mlp(seed=5, name="teacher")
    x, y = make_data()
    before = weights_of(teacher)
    cast = kwm.CAST(make_mlp(), teacher=teacher, distillation_weight=1.0)
    assert cast.teacher is teacher
    cast.compile(kwm.AdamS(1e-2, decay="relative"), loss=cross_entropy())
    history = cast.fit(x, y, batch_size=16, epochs=20, verbose=0).history
    assert_same(weights_of(teacher), before)
    losses = history["distillation_loss"]
    assert losses[-1] < losses[0]
    # `loss` is the distillation loss alone.
    np.testing.assert_allclose(history["loss"], losses, rtol=1e-5)


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
    assert not is_reparameterized(model.layers[0])
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


@pytest.mark.parametrize("ending", ["softmax", "Softmax", "one unit", None])
def test_outputs_that_are_no_logits(ending, recwarn):
    inputs = keras.Input((8,))
    outputs = keras.layers.Dense(
        1 if ending == "one unit" else 4,
        activation="softmax" if ending == "softmax" else None,
    )(inputs)
    if ending == "Softmax":
        outputs = keras.layers.Softmax()(outputs)
    model = keras.Model(inputs, outputs)
    kwm.CAST(model, teacher=None, scaling_groups=0)
    assert not [w for w in recwarn if "logits" in str(w.message)]
    kwm.CAST(model)
    warned = [w for w in recwarn if "`teacher=None`" in str(w.message)]
    assert len(warned) == (ending is not None)


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


def test_a_schedule_to_zero():
    schedule = WarmupLinearDecay(2.0, 4, 12)
    rates = [float(numpy(schedule(t))) for t in range(14)]
    np.testing.assert_allclose(rates[:4], [0.5, 1.0, 1.5, 2.0])
    np.testing.assert_allclose(
        rates[4:], [2, 1.75, 1.5, 1.25, 1, 0.75, 0.5, 0.25, 0, 0]
    )
    config = json.loads(json.dumps(schedule.get_config()))
    assert WarmupLinearDecay.from_config(config).get_config() == config


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


class TwoOfOneName(keras.layers.Layer):
    """Its two kernels have the same path, as in some KerasHub backbones."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.pair = [keras.layers.Dense(8, name="o_proj") for _ in range(2)]
        for layer in self.pair:
            layer.build((None, 8))

    def call(self, x):
        first, second = self.pair
        return second(ops.tanh(first(x)))

    def compute_output_shape(self, input_shape):
        return input_shape


def test_gradients_do_not_add_up():
    inputs = keras.Input((8,))
    outputs = TwoOfOneName(name="two")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(4)(outputs))
    paths = [v.path for v in model.trainable_variables]
    assert len(set(paths)) < len(paths)
    cast = kwm.CAST(model)
    # The first moment is the gradient, and the weights do not move.
    cast.compile(
        kwm.AdamS(0.0, beta_1=0.0, l1=1e-9, total_steps=4),
        loss=cross_entropy(),
    )
    x, y = make_data(8)
    gradients = []
    for _ in range(2):
        cast.fit(x, y, batch_size=8, verbose=0)
        gradients.append([numpy(v) for v in cast.adam_s._momentums])
    for first, second in zip(*gradients, strict=True):
        assert np.abs(first).max() > 0
        np.testing.assert_allclose(first, second, rtol=1e-5, atol=1e-8)


def test_jit_compile_is_the_users_choice():
    cast = kwm.CAST(make_mlp(), teacher=None)
    cast.compile(loss=cross_entropy(), jit_compile=False, metrics=["accuracy"])
    assert not cast.jit_compile
    x, y = make_data()
    results = cast.evaluate(x, y, 4, verbose=0, return_dict=True)
    assert set(results) == {"loss", "accuracy"}
