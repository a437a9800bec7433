import keras
import numpy as np
import pytest

from keras_weightmods import AdamS, find_targets
from tests import models, references
from tests.backends import breadth
from tests.models import numpy

TOTAL = 24
one_backend = pytest.mark.one_backend

# Most runs here are too short for the published pull, and say so.
pytestmark = pytest.mark.filterwarnings("ignore:AdamS. this schedule")


def ones(*shape, name="kernel", dtype="float32"):
    return keras.Variable(np.ones(shape), dtype=dtype, name=name)


AXES = {
    "dense": ((16, 6), (0,)),
    "query": ((8, 2, 4), (0,)),
    "output": ((2, 4, 8), (0, 1)),
    "experts": ((2, 8, 3), (1,)),
    "conv": ((2, 2, 4, 3), (0, 1, 2)),
}


def make_kernels(dtype="float32"):
    kernels, targets = [], []
    for i, (name, (shape, axes)) in enumerate(AXES.items()):
        value = 0.1 * models.normal(*shape, seed=i)
        kernels.append(keras.Variable(value, dtype=dtype, name=name))
        targets.append(config(i, kernels[-1], axes))
    return kernels, targets


def config(index, variable, axes):
    return {
        "index": index,
        "path": variable.path,
        "shape": tuple(variable.shape),
        "contraction_axes": axes,
    }


def apply_steps(optimizer, variables, gradients):
    if keras.backend.backend() != "jax":
        for grads in gradients:
            tensors = [keras.ops.convert_to_tensor(g) for g in grads]
            optimizer.apply(tensors, variables)
        return
    import jax

    optimizer.build(variables)
    step = jax.jit(optimizer.stateless_apply)
    state = [v.value for v in optimizer.variables]
    values = [v.value for v in variables]
    for grads in gradients:
        values, state = step(state, grads, values)
    for v, value in zip(optimizer.variables + variables, state + values):
        v.assign(value)


def rate_at(t):
    return 2e-2 + (1e-3 - 2e-2) * min(t / TOTAL, 1.0)


@breadth(
    "kwargs",
    [
        {"l1": "auto", "decay": "published"},
        {"decay": "relative", "ramp": 0.4, "criterion": "wanda"},
        {"l1": 0.05, "decay": "published", "ramp": 0.5, "pattern": "1:4"},
        {"decay": "relative", "ramp": 0.0},
        {"decay": "published", "criterion": "wanda"},
        {"decay": "relative", "dtype": "bfloat16"},
        {"decay": "published", "dtype": "float16"},
    ],
    *(0, 1, 5),
    ids=str,
)
def test_equals_float64_reference(kwargs):
    kwargs = {"pattern": "2:4", **kwargs}
    dtype = kwargs.pop("dtype", "float32")
    kernels, targets = make_kernels(dtype)
    starts = [numpy(v) for v in kernels]
    rng = np.random.default_rng(1)
    # A gradient with a direction, so that no weight hovers about a decision.
    bias = [rng.normal(size=v.shape) for v in kernels]
    gradients = [
        [(b + 0.3 * rng.normal(size=b.shape)).astype("float32") for b in bias]
        for _ in range(TOTAL)
    ]
    rate = keras.optimizers.schedules.PolynomialDecay(2e-2, TOTAL, 1e-3)
    optimizer = AdamS(rate, TOTAL, targets=targets, **kwargs)
    optimizer.build(kernels)
    importance = [None] * len(kernels)
    if kwargs.pop("criterion", None):
        importance = [rng.uniform(0.2, 2.0, k) for k in (16, 8, 8, 8, 16)]
        optimizer.set_importance(importance)
    apply_steps(optimizer, kernels, gradients)

    n, m = map(int, kwargs.pop("pattern").split(":"))
    for i, (kernel, target) in enumerate(zip(kernels, targets)):
        own = [grads[i] for grads in gradients]
        run = starts[i], own, target["contraction_axes"], n, m, rate_at, TOTAL
        kwargs["importance"] = importance[i]
        expected, mask = references.adam_s(*run, **kwargs)
        if dtype != "float32":
            master = optimizer._states[i]["master"]
            rounded = numpy(keras.ops.cast(master, dtype))
            np.testing.assert_array_equal(rounded, numpy(kernel))
            kernel = master
        error = np.abs(numpy(kernel) - expected)
        assert error.max() <= 1e-5 * np.abs(expected).max(), kernel.path
        np.testing.assert_array_equal(optimizer.masks[i], mask)


@breadth(
    "kwargs",
    [
        {"weight_decay": 0.1, "use_ema": True, "ema_momentum": 0.9},
        {"clipnorm": 0.5},
        {"global_clipnorm": 1.0},
        {"gradient_accumulation_steps": 3},
        {"beta_1": 0.8, "beta_2": 0.95, "epsilon": 1e-2},
    ],
    ids=str,
)
def test_without_a_target_equals_keras_adam(kwargs):
    shapes = {"bias": (4,), "gamma": (4,), "embeddings": (8, 4), "scale": ()}
    gradients = [
        [models.normal(*s, seed=seed) for s in ((8, 4), *shapes.values())]
        for seed in range(TOTAL)
    ]
    results = []
    own = {"total_steps": TOTAL, "decay": "relative"}
    for make, more in ((keras.optimizers.Adam, {}), (AdamS, own)):
        variables = [ones(8, 4)]
        variables += [ones(*s, name=name) for name, s in shapes.items()]
        rate = keras.optimizers.schedules.PolynomialDecay(2e-3, TOTAL, 1e-4)
        optimizer = make(rate, **{"epsilon": 1e-7, **more, **kwargs})
        optimizer.exclude_from_weight_decay(var_names=["gamma"])
        apply_steps(optimizer, variables, gradients)
        stepped = [numpy(v) for v in variables[1:]]
        optimizer.finalize_variable_values(variables)  # The averages.
        stepped += [numpy(v) for v in variables[1:]]
        results.append(stepped)
    for expected, received in zip(*results):
        np.testing.assert_allclose(received, expected, rtol=0, atol=1e-6)


@one_backend
def test_state_is_adams_and_one_bit_a_weight():
    kernel = ones(256, 512)
    sizes = []
    for optimizer in (AdamS(1e-3, total_steps=10), keras.optimizers.Adam()):
        optimizer.build([kernel])
        sizes.append(sum(numpy(v).nbytes for v in optimizer.variables))
    budget = sizes[1] + 256 * 512 // 8
    assert budget - 16 <= sizes[0] <= 1.02 * budget


def fit(model, optimizer, epochs=3):
    x = models.normal(32, 8)
    model.compile(optimizer, "mse")
    model.fit(x, x[:, :4], batch_size=8, epochs=epochs, verbose=0)


@one_backend
@pytest.mark.parametrize(
    ("dtype", "kwargs"),
    [
        (None, {"clipnorm": 1.0, "weight_decay": 0.01, "use_ema": True}),
        (None, {"gradient_accumulation_steps": 2, "criterion": "wanda"}),
        (None, {"pattern": "1:2"}),
        ("mixed_float16", {}),
    ],
)
def test_fit_and_prune(dtype, kwargs):
    model = models.mlp(dtype=dtype)
    adam_s = AdamS(1e-2, 12, decay="relative", ramp=0.5, **kwargs)
    scaled = keras.optimizers.LossScaleOptimizer(adam_s)
    fit(model, scaled if dtype else adam_s)
    warned = None
    if adam_s.use_ema:
        warned = "after 12 of 12.*no `use_ema`"
    elif adam_s.criterion == "wanda":
        warned = "importance of all inputs is 1"
    if warned:
        with pytest.warns(UserWarning, match=warned):
            report = adam_s.prune()
    else:
        report = adam_s.prune()
    assert len(report.kernels) == 2
    for variable, mask in zip(adam_s.sparsified, adam_s.masks):
        w = numpy(variable)
        assert np.isfinite(w).all()
        assert np.all(w[~mask] == 0)
        assert mask.mean() == adam_s.n / adam_s.m


@one_backend
def test_a_model_in_bfloat16_learns_as_in_float32():
    def train(model, x, y):
        optimizer = AdamS(2e-4, total_steps=200, decay="relative")
        model.compile(optimizer, "mse")
        model.fit(x, y, 10, epochs=10, verbose=0)
        optimizer.prune()

    losses = [
        models.loss_after(lambda own: models.mlp(dtype=own), dtype, train)
        for dtype in ("float32", "bfloat16")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


def test_config_and_state_round_trip(tmp_path):
    model = models.mlp()
    fit(model, AdamS(1e-2, total_steps=24, targets=model, decay="relative"))
    path = str(tmp_path / "model.keras")
    model.save(path)
    loaded = keras.models.load_model(path)
    expected, received = (m.optimizer.get_config() for m in (model, loaded))
    for config in (*expected["targets"], *received["targets"]):
        del config["path"]  # Keras names a reloaded Sequential anew.
    assert received == expected
    x = np.ones((8, 8), "float32")
    for m in (model, loaded):
        m.fit(x, x[:, :4], batch_size=8, epochs=2, verbose=0)
    assert_same(model.variables, loaded.variables)


def assert_same(received, expected):
    models.assert_same(*(list(map(numpy, x)) for x in (received, expected)))


@one_backend
@pytest.mark.filterwarnings("ignore:Skipping variable loading")
@pytest.mark.parametrize(
    ("make", "form"),
    [
        (models.mlp, lambda model: None),
        (models.mlp, find_targets),
        (models.nested_net, lambda model: model),
    ],
)
def test_saved_before_the_first_step(make, form, tmp_path):
    loaded = model = make()
    optimizer = AdamS(1e-2, total_steps=4, targets=form(model))
    model.compile(optimizer, "mse")
    # Twice, since loading may have changed the paths.
    for _ in range(2):
        loaded.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
    assert_same(model.weights, loaded.weights)
    loaded.optimizer.build(loaded.trainable_variables)
    assert len(loaded.optimizer.sparsified) == len(find_targets(model))


@one_backend
def test_restored_targets_that_cannot_be_told_apart():
    kernels = [ones(8, 4), ones(8, 4)]
    target = config(None, kernels[0], (0,))
    with pytest.raises(ValueError, match="which fits 2 variables"):
        AdamS(total_steps=4, targets=[target]).build(kernels)
    both = AdamS(total_steps=4, targets=[target, target])
    both.build(kernels)
    assert both.sparsified == kernels


@one_backend
def test_masks_follow_the_importance():
    kernel = ones(4, 2)
    optimizer = AdamS(1e-3, total_steps=4, criterion="wanda")
    with pytest.raises(ValueError, match="needs a built `AdamS"):
        optimizer.set_importance([])
    optimizer.build([kernel])
    optimizer.set_importance([np.array([0.0, 1.0, 3.0, 2.0])])
    optimizer.apply([keras.ops.ones((4, 2))], [kernel])
    assert optimizer.masks[0][:, 0].tolist() == [False, False, True, True]


@one_backend
def test_nothing_to_sparsify():
    def build(*variables, **kwargs):
        AdamS(1e-3, **{"total_steps": 5, **kwargs}).build(variables)

    with pytest.raises(ValueError, match="needs `total_steps`"):
        build(ones(4, 4), total_steps=None)
    with pytest.raises(ValueError, match="Pass `targets=model`"):
        build(ones(3, 4, 8))
    with pytest.raises(ValueError, match="found no kernel to sparsify"):
        build(ones(4, name="bias"))
    with pytest.warns(UserWarning, match="leaves 1 kernels dense"):
        with pytest.raises(ValueError, match="found no kernel to sparsify"):
            build(ones(6, 4))


@one_backend
def test_state_that_does_not_fit_changes_nothing():
    def built(shape):
        optimizer = AdamS(0.5, total_steps=5)
        optimizer.apply([keras.ops.ones(shape)], [ones(*shape)])
        return optimizer

    small, large = built((4, 2)), built((8, 2))
    before = [numpy(v) for v in small.variables]
    store = {str(i): numpy(v) for i, v in enumerate(large.variables)}
    for wrong in (store, {"a": np.zeros(3)}, {}):
        with pytest.raises(ValueError, match="does not fit this `AdamS`"):
            small.load_own_variables(wrong)
    assert_same(small.variables, before)


@one_backend
def test_warnings_tell_the_way_out(recwarn):
    AdamS(0.1, total_steps=100).build([ones(4, 2)])
    AdamS(1e-6, total_steps=100, decay="relative").build([ones(4, 2)])
    assert not [w for w in recwarn if "AdamS" in str(w.message)]
    low = ones(4, 2, dtype="bfloat16")
    with pytest.warns(UserWarning, match='`use_ema` are.*"mixed_bfloat16"'):
        AdamS(1.0, total_steps=100, use_ema=True).build([low])
    # sum over t of 1e-3 * t / 100, and 3 times the mean masked |w| of 1.
    message = r"too short to reach zero.*= 0\.049.*need about 3 "
    with pytest.warns(UserWarning, match=message):
        AdamS(1e-3, total_steps=100).build([ones(4, 2)])
    model = models.mlp()
    model.layers[0].trainable = False
    optimizer = AdamS(1.0, total_steps=5, targets=find_targets(model))
    with pytest.warns(UserWarning, match="leaves 1 targets as they are"):
        optimizer.build(model.trainable_variables)


def test_a_run_that_cannot_arrive_is_warned_about():
    # Keras builds the optimizer in `fit`, on TensorFlow while it traces.
    model = models.mlp()
    optimizer = AdamS(1e-3, 24, gradient_accumulation_steps=2)
    with pytest.warns(UserWarning, match="schedule is too short"):
        fit(model, optimizer, epochs=6)
    magnitudes = [np.abs(numpy(v)) for v in optimizer.sparsified]
    pairs = list(zip(magnitudes, optimizer.masks))
    share = sum(w[~mask].sum() for w, mask in pairs) / sum(
        w.sum() for w in magnitudes
    )
    assert share > 0.1
    message = f"after 12 of 24 steps: {share:.1%} .*are updates"
    with pytest.warns(UserWarning, match=message):
        optimizer.prune()


@one_backend
def test_prune_refuses_what_has_no_mask_or_diverged():
    model = models.mlp()
    optimizer = AdamS(0.01, total_steps=2, targets=find_targets(model))
    with pytest.raises(ValueError, match="there once it is built"):
        optimizer.prune()
    optimizer.build(model.trainable_variables)
    with pytest.raises(ValueError, match="has taken no step"):
        optimizer.prune()
    model.compile(optimizer, "mse")
    x = models.normal(8, 8)
    x[0, 0] = np.nan
    model.fit(x, models.normal(8, 4), verbose=0)
    before = model.get_weights()
    with pytest.raises(ValueError, match="training diverged"):
        optimizer.prune()
    models.assert_same_bits(model.get_weights(), before)


@one_backend
def test_weight_decay_is_decoupled_with_exclusions():
    results = []
    gradients = [models.normal(*shape) for shape, _ in AXES.values()]
    for weight_decay in (None, 0.5):
        kernels, targets = make_kernels()
        starts = [numpy(v) for v in kernels]
        optimizer = AdamS(0.1, TOTAL, targets=targets)
        optimizer.weight_decay = weight_decay
        optimizer.exclude_from_weight_decay(var_names=["query"])
        apply_steps(optimizer, kernels, [gradients])
        results.append([numpy(v) for v in kernels])
    for name, start, plain, decayed in zip(AXES, starts, *results):
        share = 0.0 if name == "query" else 0.1 * 0.5
        expected = plain - share * start
        np.testing.assert_allclose(decayed, expected, rtol=1e-5, atol=1e-7)
