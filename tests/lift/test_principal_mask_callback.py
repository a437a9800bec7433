"""PrincipalMaskCallback in whole fits."""

import keras
import numpy as np
import pytest

import keras_weightmods as kwm
from keras_weightmods.core import train_step
from tests import models, references
from tests.backends import breadth
from tests.models import JIT, assert_same, normal, sequential, weights_of

BACKEND = keras.backend.backend()
X, Y = normal(24, 8), normal(24, 4, seed=1)
DENSITY = 0.25
COUNTS = [24, 12]  # of 8 x 12 and 12 x 4


class Traced(keras.layers.Layer):
    calls = 0

    def call(self, x):
        type(self).calls += 1
        return x


def make(optimizer=None, dtype="float32", jit_compile=JIT, **kwargs):
    keras.utils.set_random_seed(0)
    model = sequential(
        (8,),
        keras.layers.Dense(12, activation="tanh", dtype=dtype),
        Traced(dtype=dtype),
        keras.layers.Dense(4, dtype=dtype),
    )
    optimizer = optimizer or kwm.SparseAdamW(0.05)
    model.compile(optimizer, "mse", jit_compile=jit_compile, **kwargs)
    return model


def callback(density=DENSITY, refresh_every=None, **kwargs):
    filter_rank = None if "criterion" in kwargs else 2
    return kwm.PrincipalMaskCallback(
        density, None, filter_rank, refresh_every, seed=0, **kwargs
    )


def fit(model, *callbacks, epochs=1, **kwargs):
    # Four steps an epoch.
    options = {"batch_size": 6, "verbose": 0, "shuffle": False, **kwargs}
    return model.fit(X, Y, epochs=epochs, callbacks=list(callbacks), **options)


def expected_masks(weights):
    kernels = zip(weights[::2], COUNTS)
    return [references.principal_mask(w, count, 2) for w, count in kernels]


def assert_only_masks_changed(before, model):
    after = weights_of(model)
    for i, mask in enumerate(expected_masks(before)):
        assert np.array_equal(before[2 * i] != after[2 * i], mask)
        assert np.array_equal(before[2 * i + 1], after[2 * i + 1])


OPTIMIZERS = {
    "SparseAdamW": lambda: kwm.SparseAdamW(0.05, weight_decay=0.1),
    "AdamW": lambda: keras.optimizers.AdamW(0.05, weight_decay=0.1),
    "SGD": lambda: keras.optimizers.SGD(0.05, momentum=0.9),
}


def flags_of(model):
    return [v.trainable for v in model.weights]


@breadth("name", OPTIMIZERS, 0, 1)
def test_trains_the_principal_weights_alone(name):
    model = make(OPTIMIZERS[name](), jit_compile="auto")
    before = weights_of(model)
    loss = fit(model, callback(), epochs=2).history["loss"]
    assert_only_masks_changed(before, model)
    assert loss[-1] < loss[0]
    # Nothing is left around the step but what keeps the weights on JAX.
    is_plain = not isinstance(model.train_function, train_step._Step)
    assert is_plain == (BACKEND != "jax")
    assert len(model.trainable_variables) == 4
    assert all(v.trainable for v in model.trainable_variables)


@breadth("name", ["SparseAdamW", "AdamW"])
def test_masks_that_were_never_set_are_refused(name):
    trained = make(OPTIMIZERS[name]())
    fit(trained, callback())
    saved = keras.saving.serialize_keras_object(trained.optimizer)

    def restored():
        model = make(keras.saving.deserialize_keras_object(saved))
        model.optimizer.build(model.trainable_variables)
        for layer in (model.layers[0], model.layers[2]):
            layer.bias.trainable = False
        return model

    model = restored()
    before = weights_of(model)
    with pytest.raises(ValueError, match="has masks of 0 variables"):
        fit(model)
    # Keras on JAX has taken the weights out, as for any error in a step.
    if BACKEND != "jax":
        assert_same(weights_of(model), before)
    # With the state of the other one, by whatever way, it goes on.
    model = restored()
    variables = model.optimizer.variables, trained.optimizer.variables
    for variable, other in zip(*variables, strict=True):
        variable.assign(other)
    fit(model)
    assert np.sum(weights_of(model)[0] != before[0]) <= COUNTS[0]


@breadth("name", ["SparseAdamW", "AdamW"])
def test_refresh_follows_the_rule_without_a_retrace(name):
    model = make(OPTIMIZERS[name]())
    before = weights_of(model)
    Traced.calls = 0
    fit(model, callback(refresh_every=1), epochs=2)
    if BACKEND != "torch":
        other = make(OPTIMIZERS[name]())
        refreshed, Traced.calls = Traced.calls - 1, 0
        fit(other, callback(), epochs=2)
        assert refreshed == Traced.calls
    optimizer = model.optimizer
    assert optimizer.mask_step == 7
    after = weights_of(model)
    # More has changed by now than one mask holds, and no bias.
    assert np.sum(after[0] != before[0]) > COUNTS[0]
    assert np.array_equal(after[1], before[1])

    masks = callback(refresh_every=8)
    masks.attach(model)
    masks.set_model(model)
    masks.on_train_batch_begin(0)
    assert optimizer.mask_step == 8
    found = map(optimizer.indices_of, optimizer.masked_variables)
    assert_same(list(found), [*map(np.flatnonzero, expected_masks(after))])
    assert len(model.trainable_variables) == 2
    masks.detach()
    assert len(model.trainable_variables) == 4


@pytest.mark.one_backend
@pytest.mark.parametrize("kind", [kwm.SparseAdamW, keras.optimizers.Adam])
def test_figures_of_the_masks_are_in_the_logs(kind):
    masks, refreshing = [], callback(refresh_every=3)

    def record(batch, logs):
        optimizer = refreshing.model.optimizer
        variables = optimizer.masked_variables
        masks.append([set(optimizer.indices_of(v).tolist()) for v in variables])

    history = fit(
        make(kind(0.5)),
        refreshing,
        keras.callbacks.LambdaCallback(on_train_batch_end=record),
        epochs=4,
    ).history
    # Before which of the 16 updates the masks change: 3, 6, 9, 12, 15.
    expected = []
    for step in range(3, 16, 3):
        pairs = zip(masks[step], masks[step - 1])
        expected.append(sum(len(n - o) for n, o in pairs) / sum(COUNTS))
    assert any(expected)
    found = refreshing.refreshes
    assert [each.step for each in found] == [3, 6, 9, 12, 15]
    a, b, c, d, e = expected
    means = [a, b, c, (d + e) / 2]
    assert history["mask_changed"] == pytest.approx(means)
    assert history["mask_density"] == [sum(COUNTS) / 144] * 4
    # The choice before the first step is in it, the refreshes are besides.
    first, *_ = history["mask_seconds"]
    assert first > found[0].seconds


@pytest.mark.skipif(BACKEND != "jax", reason="only JAX has a state to sync")
def test_touches_the_model_at_refreshes_alone(monkeypatch):
    synced, sync = [], keras.Model.jax_state_sync

    def counted(model):
        synced.append(1)
        return sync(model)

    monkeypatch.setattr(keras.Model, "jax_state_sync", counted)
    fit(make("adam"), epochs=2)
    plain, synced[:] = len(synced), []
    fit(make(), callback(refresh_every=5), epochs=2)
    # At the start, at the first batch, and at the one refresh.
    assert len(synced) - plain <= 4


class Stop(keras.callbacks.Callback):
    def __init__(self, in_step=False, epoch=0):
        super().__init__()
        self.in_step, self.epoch = in_step, epoch

    def on_epoch_begin(self, epoch, logs=None):
        self.is_due = epoch == self.epoch

    def on_train_batch_begin(self, batch, logs=None):
        if self.is_due and self.in_step:
            self.model.compute_loss = self.interrupt
        elif self.is_due:
            self.interrupt()

    def interrupt(self, *args, **kwargs):
        raise KeyboardInterrupt


@pytest.mark.one_backend
@pytest.mark.parametrize("name", ["SparseAdamW", "AdamW"])
def test_resumes_bit_equal(name, tmp_path):
    def run(*callbacks):
        model = make(OPTIMIZERS[name]())
        masks = callback(refresh_every=3, criterion="random")
        fit(model, masks, *callbacks, epochs=2)
        return weights_of(model)

    backup, again = (
        keras.callbacks.BackupAndRestore(tmp_path / "backup") for _ in "ab"
    )
    with pytest.raises(KeyboardInterrupt):
        run(backup, Stop(epoch=1))
    assert_same(run(again), run())


@breadth("name", ["SparseAdamW", "AdamW"])
def test_a_saved_model_and_a_checkpoint_go_on(name, tmp_path):
    model = make(OPTIMIZERS[name]())
    fit(model, callback())
    model.save(tmp_path / "model.keras")
    path = tmp_path / "model.weights.h5"
    model.save_weights(path)
    saved = load(tmp_path / "model.keras")
    assert saved.optimizer.mask_step == 0
    other, masks = make(OPTIMIZERS[name]()), callback(refresh_every=5)
    if name == "SparseAdamW":
        with pytest.raises(ValueError, match="attach"):
            other.load_weights(path)
    masks.attach(other)
    other.load_weights(path)
    for each in (model, saved, other):
        fit(each, masks if each is other else callback(refresh_every=5))
    assert_same(weights_of(saved), weights_of(model))
    assert_same(weights_of(other), weights_of(model))


def load(path):
    return keras.models.load_model(path, custom_objects={"Traced": Traced})


@pytest.mark.one_backend
@pytest.mark.filterwarnings("ignore:Skipping variable loading")
def test_weights_load_and_state_that_would_be_lost_is_an_error(tmp_path):
    path = tmp_path / "model.weights.h5"
    model, other = make(keras.optimizers.Adam(0.05)), make()
    for each in (model, other):
        fit(each, callback())
    other.save_weights(path)
    with pytest.raises(ValueError, match="the state of another"):
        model.load_weights(path)
    with pytest.warns(UserWarning, match="the state of another"):
        model.load_weights(path, skip_mismatch=True)
    assert_same(weights_of(model), weights_of(other))
    # Models that were not trained, or never compiled.
    for plain in (make(), sequential((8,), *make().layers)):
        plain.save_weights(path)
        other.load_weights(path)
        assert_same(weights_of(other), weights_of(plain))
    assert other.optimizer.mask_step == 0


def test_accumulation_counts_updates():
    model = make(kwm.SparseAdamW(0.05, gradient_accumulation_steps=2))
    before = weights_of(model)
    fit(model, callback(refresh_every=3))
    assert model.optimizer.mask_step == 0
    assert_only_masks_changed(before, model)
    fit(model, callback(refresh_every=3))
    assert model.optimizer.mask_step == 3
    assert int(model.optimizer.iterations) == 4


@pytest.mark.skipif(BACKEND == "torch", reason="Keras has it elsewhere only")
def test_several_steps_in_one_execution():
    model = make(steps_per_execution=2)
    fit(model, callback(refresh_every=3), epochs=2)
    # Due at 3 and 6: made up for at 4, and at 6.
    assert model.optimizer.mask_step == 6
    assert int(model.optimizer.iterations) == 8


@breadth(
    ("dtype", "name"),
    [
        ("mixed_float16", "SparseAdamW"),
        ("mixed_float16", "AdamW"),
        ("mixed_bfloat16", "AdamW"),
    ],
)
def test_mixed_precision(dtype, name):
    optimizer = OPTIMIZERS[name]()
    scaled = keras.optimizers.LossScaleOptimizer
    if dtype == "mixed_float16":
        # Keras does this if the whole model has this policy.
        optimizer = scaled(optimizer, initial_scale=8.0)
    model = make(optimizer, dtype)
    before = weights_of(model)
    if dtype == "mixed_float16":
        # The state that an earlier training leaves.
        model.optimizer.build(model.trainable_variables)
        model.optimizer.dynamic_scale.assign(4.0)
    fit(model, callback())
    assert_only_masks_changed(before, model)
    if dtype == "mixed_float16":
        assert isinstance(model.optimizer, scaled)
        assert float(model.optimizer.dynamic_scale) == 4.0


@breadth("name", ["SparseAdamW", "AdamW"])
def test_averages_and_schedules(name):
    schedule = keras.optimizers.schedules.CosineDecay(0.05, 8)
    ema = {"use_ema": True, "ema_momentum": 0.5, "ema_overwrite_frequency": 3}
    module = kwm if name == "SparseAdamW" else keras.optimizers
    model = make(getattr(module, name)(schedule, **ema))
    before = weights_of(model)

    class Check(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            assert_only_masks_changed(before, self.model)

    # In the epochs' ends it shows the averages.
    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
    fit(model, callback(), swap, Check(), epochs=2)
    assert_only_masks_changed(before, model)


@pytest.mark.one_backend
def test_a_model_in_bfloat16_learns_as_in_float32():
    def train(model, x, y):
        model.compile(kwm.SparseAdamW(2e-4), "mse")
        masks = callback(0.5, refresh_every=50)
        model.fit(x, y, 10, epochs=10, verbose=0, callbacks=[masks])

    losses = [
        models.loss_after(lambda own: make(dtype=own), dtype, train)
        for dtype in ("float32", "bfloat16")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


@pytest.mark.parametrize("in_step", [True, False])
def test_an_interrupted_fit_gives_the_flags_back(in_step):
    model = make(run_eagerly=True)
    model.layers[-1].bias.trainable = False
    before = weights_of(model)
    with pytest.raises(KeyboardInterrupt):
        fit(model, callback(), Stop(in_step))
    if not in_step and BACKEND != "jax":
        # Nothing of ours is called.
        assert flags_of(model) == [True, False, True, False]
        callback().detach(model)
    assert flags_of(model) == [True, True, True, False]
    assert_same(weights_of(model), before)
    vars(model).pop("compute_loss", None)
    fit(model, callback())
    assert flags_of(model) == [True, True, True, False]
    model.compile("adam", "mse", jit_compile=JIT)
    fit(model)
    moved = [np.any(a != b) for a, b in zip(before, weights_of(model))]
    assert moved == [True, True, True, False]


@pytest.mark.one_backend
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_head_is_trained_whole(name, tmp_path):
    model = make(OPTIMIZERS[name]())
    before = weights_of(model)
    fit(model, callback(also_train=model.layers[-1]))
    changed = [a != b for a, b in zip(weights_of(model), before)]
    assert np.array_equal(changed[0], expected_masks(before)[0])
    assert [change.all() for change in changed[1:]] == [False, True, True]
    assert not changed[1].any()
    assert all(v.trainable for v in model.trainable_variables)
    (first,) = model.optimizer.masked_variables
    assert first is model.layers[0].kernel

    model.save(tmp_path / "model.keras")
    other = load(tmp_path / "model.keras")
    report = callback(also_train=other.layers[-1]).attach(other)
    assert report.totals == {"trained": 24, "entries": 96, "whole": 52}
    with pytest.raises(ValueError, match="masks of other kernels or sizes"):
        callback().attach(other)


@pytest.mark.one_backend
def test_also_train_is_checked():
    model = make()
    head = model.layers[-1]
    head.bias.trainable = False
    head.kernel.assign(kwm.ops.nm_project(head.kernel, "2:4"))

    def check(match, also, **kwargs):
        with pytest.raises(ValueError, match=match):
            callback(also_train=also, **kwargs).attach(model)
        assert sum(v.trainable for v in model.weights) == 3

    check("matches none of 3 trainable weights", head.bias.path)
    check("found no kernel", keras.layers.Dense)
    first = kwm.find_targets(model)[0].variable
    first.assign(kwm.ops.nm_project(first, "2:4"))
    check("lose its zeros", head, keep_pattern=True)


@breadth("criterion", ["magnitude", "gradient", "random"], 1)
def test_other_criteria(criterion):
    model = make()
    before = weights_of(model)
    data = (X[:6], Y[:6]) if criterion == "gradient" else None
    fit(model, callback(criterion=criterion, data=data))
    changed = [weights_of(model)[2 * i] != before[2 * i] for i in range(2)]
    assert [int(c.sum()) for c in changed] == COUNTS
    hidden = np.tanh(X[:6] @ before[0] + before[1])
    error = 2 * (hidden @ before[2] + before[3] - Y[:6]) / 24
    if criterion != "random":
        ranked = before[2] if criterion == "magnitude" else hidden.T @ error
        score = np.abs(ranked)
        assert score[changed[1]].min() > score[~changed[1]].max()


@pytest.mark.one_backend
def test_sparse_model_stays_sparse():
    model = make()
    for target in kwm.find_targets(model):
        target.variable.assign(kwm.ops.nm_project(target.variable, "2:4"))
    before = weights_of(model)
    fit(model, callback(keep_pattern=True, refresh_every=2), epochs=2)
    kwm.assert_sparse(model, "2:4")
    for i in (0, 2):
        changed = before[i] != weights_of(model)[i]
        assert changed.sum() >= before[i].size * DENSITY
        assert np.all(before[i][changed] != 0)
    model.compile(kwm.SparseAdamW(), "mse")
    with pytest.warns(UserWarning, match="zeros of 2 kernels that are 2:4"):
        callback().attach(model)
    model.compile(kwm.SparseAdamW(), "mse")
    with pytest.raises(ValueError, match="as many candidates"):
        callback(keep_pattern=True, density=0.6).attach(model)
    with pytest.raises(ValueError, match="is for a sparse model"):
        callback(keep_pattern=True).attach(make())


@breadth("name", ["SparseAdamW", "AdamW"])
def test_fit_without_the_callback_afterwards(name):
    model = make(OPTIMIZERS[name]())
    fit(model, callback())
    before = weights_of(model)
    with pytest.raises(ValueError, match="compile the model with a new"):
        fit(model)
    models.assert_same_bits(weights_of(model), before)
    fit(model, callback())
    changed = [np.any(a != b) for a, b in zip(before, weights_of(model))]
    assert changed == [True, False, True, False]


@pytest.mark.one_backend
@pytest.mark.parametrize("frozen", [False, True])
def test_a_constraint_to_a_pattern_needs_keep_pattern(frozen):
    model = sequential((10,), keras.layers.Dense(12), keras.layers.Dense(8))
    model.compile(kwm.SparseAdamW(0.1), "mse")
    # The first kernel is left dense: 10 is no multiple of 4.
    kwm.SemiStructuredSparse.attach(model, frozen=frozen)
    x, y = normal(16, 10), normal(16, 8)
    before = weights_of(model)

    def fit(keep_pattern):
        masks = callback(keep_pattern=keep_pattern)
        model.fit(x, y, epochs=3, verbose=0, callbacks=[masks])

    with pytest.raises(ValueError, match="pass `keep_pattern=True`"):
        fit(keep_pattern=False)
    model.layers[1].kernel.assign(np.ones((12, 8)))
    with pytest.raises(ValueError, match="is not in its pattern"):
        fit(keep_pattern=True)
    model.layers[1].kernel.assign(before[2])
    models.assert_same_bits(weights_of(model), before)
    assert all(v.trainable for v in model.trainable_variables)
    fit(keep_pattern=True)
    kwm.assert_sparse(model.layers[1], "2:4")
    for variable, old in zip(model.weights[::2], before[::2]):
        changed = np.flatnonzero(models.numpy(variable) != old)
        chosen = model.optimizer.indices_of(variable)
        assert changed.size
        assert np.isin(changed, chosen).all()


@pytest.mark.one_backend
def test_errors_leave_the_model_as_it_was():
    def check(match, model, **kwargs):
        before, optimizer = weights_of(model), model.optimizer
        flags = flags_of(model)
        with pytest.raises(ValueError, match=match):
            fit(model, callback(**kwargs))
        assert_same(weights_of(model), before)
        assert flags_of(model) == flags
        assert model.optimizer is optimizer

    check("Not one entry is selected", make(), density=0.001)
    frozen, broken = make(), make()
    for layer in (frozen.layers[0], frozen.layers[-1]):
        layer.kernel.trainable = False
    check("found no kernel", frozen)
    broken.layers[0].kernel.assign(np.full((8, 12), np.inf))
    check("/kernel.* must be finite", broken)
    scaled = make()
    kwm.attach_scaling(scaled)
    check("is reparameterized", scaled)
    constrained = sequential(
        (8,),
        keras.layers.Dense(12, kernel_constraint="max_norm"),
        keras.layers.Dense(6, kernel_constraint="non_neg"),
        keras.layers.Dense(4, bias_constraint="non_neg"),
    )
    constrained.compile(kwm.SparseAdamW(0.05), "mse")
    named = r"2 problems:\n.*/kernel'.* MaxNorm, .*\n.*/kernel'.* NonNeg, .*$"
    check(named, constrained)
    other = make()
    fit(other, callback())
    with pytest.raises(ValueError, match="masks of other kernels or sizes"):
        fit(other, callback(density=0.5))
    several, sgd = make(), keras.optimizers.SGD()
    several.optimizer = keras.optimizers.MultiOptimizer(lambda v: sgd)
    check("wraps no other", several)
    wrapping = make(kwm.CompanderOptimizer(keras.optimizers.Adam()))
    with pytest.raises(ValueError, match="wraps no other"):
        callback().attach(wrapping)
    assert all(v.trainable for v in wrapping.weights)
    for match, arguments in (
        ("Give one of `rank`", {"density": 0.1, "rank": 2}),
        ("`data` must be a batch", {"criterion": "gradient"}),
    ):
        with pytest.raises(ValueError, match=match):
            kwm.PrincipalMaskCallback(**arguments)


@pytest.mark.one_backend
def test_a_kernel_that_its_layer_rewrites_is_refused():
    normalized = keras.layers.SpectralNormalization(keras.layers.Dense(8))
    model = sequential((8,), normalized, keras.layers.Dense(4, name="last"))
    model.compile(kwm.SparseAdamW(0.1), "mse")
    before = weights_of(model)
    with pytest.raises(ValueError, match=r"whole.*`SpectralNormalization`"):
        fit(model, callback())
    assert_same(weights_of(model), before)
    fit(model, callback(targets="last"))


@pytest.mark.one_backend
def test_a_kernel_too_small_for_an_entry_is_left_and_named():
    # One in a hundred of 8 x 12 is an entry; of 12 x 4 it is none.
    model = make()
    before, last = weights_of(model), model.layers[-1].kernel
    masks = callback(0.01)
    with pytest.warns(UserWarning, match=f"leaves 1 kernels.*{last.path}"):
        report = masks.attach(model)
    assert [kernel.trained for kernel in report.kernels] == [1]
    (skipped,) = [s for s in report.skipped if s.path.endswith("kernel")]
    assert "Not one entry is selected" in skipped.reason
    with pytest.warns(UserWarning, match="leaves 1 kernels"):
        fit(model, masks)
    moved = [int(np.sum(a != b)) for a, b in zip(before, weights_of(model))]
    assert moved == [1, 0, 0, 0]
