"""Checkpoint: what is resumed is, bit for bit, what nothing has stopped."""

import os

import keras
import numpy as np
import pytest

import keras_weightmods as kwm
from keras_weightmods.saving import bounded_json, container
from tests.backends import breadth
from tests.models import assert_same, numpy, sequential

BACKEND = keras.backend.backend()
JIT = BACKEND == "jax"


class Stopped(Exception):
    pass


def stop(batches):
    """Return a callback that raises `Stopped` after so many batches."""
    left = iter(range(batches - 1))

    def end(batch, logs):
        if next(left, None) is None:
            raise Stopped

    return keras.callbacks.LambdaCallback(on_train_batch_end=end)


def arrays(rows=20):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, 8)).astype("float32")
    return x, rng.integers(4, size=(rows,))


def net():
    return sequential(
        (8,),
        keras.layers.Dense(8, "relu"),
        keras.layers.BatchNormalization(),
        keras.layers.Dropout(0.25),
        keras.layers.Dense(4),
    )


LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
OPTIMIZERS = {
    "cast": None,
    # The state of `mixed_float16`, with a scale that changes within an epoch.
    "scaled": lambda rate: keras.optimizers.LossScaleOptimizer(
        keras.optimizers.Adam(rate), dynamic_growth_steps=2
    ),
    "plain": keras.optimizers.Adam,
    "lift": kwm.SparseAdamW,
    "masked": keras.optimizers.AdamW,
}


def run(name, folder, *callbacks, seed=0, make=net, **kwargs):
    """Train in a process of its own, as it were; return all that is left."""
    # All but the first weights and the first order of the data is to come
    # from the file.
    keras.utils.set_random_seed(seed)
    model, options = make(), {"loss": LOSS, "jit_compile": JIT}
    if name == "cast":
        model = kwm.CAST(model)
    else:
        options["optimizer"] = OPTIMIZERS[name](0.01)
    model.compile(**options, metrics=["accuracy"] if name == "plain" else None)
    own = []
    if name in ("lift", "masked"):
        options = {"refresh_every": 4, "criterion": "random"}
        own = [kwm.PrincipalMaskCallback(0.3, **options)]
    if seed:
        for variable in model.weights:
            variable.assign(np.ones(variable.shape))
    # TensorFlow's order of arrays is drawn from a state of its own.
    fit = {"shuffle": BACKEND != "tensorflow", "verbose": 0, "epochs": 3}
    fit["callbacks"] = [*own, kwm.Checkpoint(folder), *callbacks]
    history = model.fit(*arrays(), 4, **{**fit, **kwargs}).history
    found = [*model.variables, *model.optimizer.variables]
    return [numpy(v) for v in found], history


@breadth("name", OPTIMIZERS, 0, 1)
def test_epochs_are_resumed_to_the_bit(name, tmp_path):
    whole, history = run(name, tmp_path / "whole")
    # In the second epoch, and in the one that begins anew.
    for seed, batches in enumerate((8, 4)):
        with pytest.raises(Stopped):
            run(name, tmp_path / "run", stop(batches), seed=seed)
    resumed, after = run(name, tmp_path / "run", seed=2)
    assert_same(resumed, whole)
    for name in after.keys() - {"mask_seconds"}:
        assert after[name][-1] == history[name][-1]


@pytest.mark.one_backend
def test_a_save_within_an_epoch_says_what_is_repeated(tmp_path):
    x, y = arrays()

    def make():
        keras.utils.set_random_seed(0)
        model = sequential((8,), keras.layers.Dense(4))
        model.compile(keras.optimizers.SGD(0.1), LOSS)
        return model

    def fit(model, *callbacks):
        callbacks = [kwm.Checkpoint(tmp_path, save_freq=2), *callbacks]
        options = {"shuffle": False, "verbose": 0, "callbacks": callbacks}
        model.fit(x, y, 4, 2, **options)
        return [numpy(v) for v in model.variables]

    with pytest.raises(Stopped):
        fit(make(), stop(8))
    # Saved at the second step of the second epoch.
    with pytest.warns(UserWarning, match=r"epoch 2.*repeated: 2"):
        resumed = fit(make())
    model = make()
    for batch in (0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3, 4):
        rows = slice(4 * batch, 4 * batch + 4)
        model.train_on_batch(x[rows], y[rows])
    for received, variable in zip(resumed, model.variables, strict=True):
        np.testing.assert_allclose(received, numpy(variable), atol=1e-6)


def fit(folder, epochs=1, units=4, model=None):
    model = model or sequential((8,), keras.layers.Dense(units))
    model.compile("sgd", "mse")
    x, _ = arrays(8)
    checkpoint = kwm.Checkpoint(folder, 1)
    model.fit(x, x[:, :units], 4, epochs, verbose=0, callbacks=[checkpoint])
    return [numpy(v) for v in model.variables]


@pytest.mark.one_backend
def test_the_last_two_are_kept_and_the_older_one_is_used(tmp_path):
    # The folder of a process that was killed.
    (left := tmp_path / ".kwm-0123456789abcdef").mkdir()
    (left / "new.safetensors").write_bytes(b"half")
    os.utime(left, (0, 0))
    fit(tmp_path, 2)
    names = ["step-0000000003.safetensors", "step-0000000004.safetensors"]
    assert sorted(os.listdir(tmp_path)) == names
    last = tmp_path / names[1]
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="goes on from 'step-0000000003"):
        resumed = fit(tmp_path, 2)
    assert len(resumed) == 2
    assert (tmp_path / f"{names[1]}.unreadable").exists()
    for each in tmp_path.glob("*.safetensors"):
        each.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="None of the checkpoints"):
        fit(tmp_path, 2)


@pytest.mark.one_backend
def test_a_complete_run_is_loaded_and_not_trained(tmp_path):
    trained = fit(tmp_path)
    model = sequential((8,), keras.layers.Dense(4))
    with pytest.warns(UserWarning, match="is complete"):
        assert_same(fit(tmp_path, model=model), trained)
    # A later fit without it begins at the first epoch.
    x, _ = arrays(8)
    assert len(model.fit(x, x[:, :4], epochs=3, verbose=0).epoch) == 3
    # More epochs go on.
    assert not np.array_equal(fit(tmp_path, 2)[0], trained[0])


@pytest.mark.one_backend
def test_a_wrong_frequency_is_told_both_forms(tmp_path):
    for value in ("epochs", 0, None):
        with pytest.raises(ValueError, match='`save_freq` must be "epoch" or'):
            kwm.Checkpoint(tmp_path, value)


@pytest.mark.one_backend
def test_another_model_is_unchanged(tmp_path):
    fit(tmp_path)
    model = sequential((8,), keras.layers.Dense(3))
    before = [numpy(v) for v in model.variables]
    with pytest.raises(ValueError, match="of another model"):
        fit(tmp_path, 2, 3, model)
    assert_same([numpy(v) for v in model.variables], before)


@pytest.mark.one_backend
def test_a_state_that_is_none_is_refused(tmp_path):
    fit(tmp_path)
    path = sorted(tmp_path.iterdir())[-1]
    form = "keras_weightmods.checkpoint", 1
    with container.Reader(path, form[0], (1,)) as reader:
        found = {name: reader.read(name) for name in reader.entries}
        state = reader.read_json("state.json")
    model = sequential((8,), keras.layers.Dense(4))
    model.compile("sgd", "mse")
    (kind, keys, *rest), (version, numbers, _) = state["numpy"], state["python"]
    for changed in (
        {},
        {**state, "numpy": ["PCG64", keys, *rest]},
        {**state, "numpy": [kind, keys, 10**6, *rest[1:]]},
        {**state, "numpy": [kind, keys[1:], *rest]},
        {**state, "python": [version, numbers, "1"]},
        {**state, "python": [version, numbers[1:], None]},
        *({**state, key: value} for key in state for value in (-1, [1], None)),
    ):
        found["state.json"] = bounded_json.json_array(changed)
        container.write_arrays(path, *form, found)
        with pytest.raises(ValueError, match="json` is not the state of a run"):
            kwm.Checkpoint(tmp_path).restore(model)


class Group:
    """Stands for two processes, of which this one is `number`."""

    def __init__(self, number):
        self.index = lambda: number
        self.whole = numpy
        self.wait = lambda name: None
        self.gathered = lambda value: [value, value]


# Two real ones are in `tests/devices/processes.py`.
@pytest.mark.one_backend
def test_the_first_of_several_processes_writes_for_all(tmp_path, monkeypatch):
    def become(group):
        for name in ("checkpoint", "shared"):
            name = f"keras_weightmods.saving.{name}.processes"
            monkeypatch.setattr(name, lambda: group)

    become(Group(0))
    trained = fit(tmp_path)
    saved = os.listdir(tmp_path)
    become(Group(1))
    with pytest.warns(UserWarning, match="is complete"):
        assert_same(fit(tmp_path), trained)
    fit(tmp_path, 2)
    assert os.listdir(tmp_path) == saved


@keras.saving.register_keras_serializable("tests")
class Pair(keras.layers.Layer):
    """Two layers in a list, which may have one name, and their weights too."""

    def __init__(self, names, **kwargs):
        super().__init__(**kwargs)
        self.names = names
        self.pair = [keras.layers.Dense(8, name=name) for name in names]

    def build(self, shape):
        for layer in self.pair:
            layer.build(shape)

    def call(self, x):
        first, second = self.pair
        return second(keras.ops.tanh(first(x)))


@pytest.mark.one_backend
@pytest.mark.parametrize("name", ["plain", "lift"])
def test_weights_of_one_path_train_as_others(name, tmp_path):
    """Keras lists one of them alone for torch, which clears no other's."""
    ends = []
    for names in (("a", "a"), ("a", "b")):

        def make(names=names):
            return sequential((8,), Pair(names, name="pair"))

        folder = tmp_path / names[1]
        ends.append(run(name, folder, make=make, epochs=1)[0])
    assert_same(*ends)
