"""Checkpoint: what is resumed is, bit for bit, what nothing has stopped."""

import functools
import os

import keras
import numpy as np
import pytest

import keras_weightmods as kwm
from tests.backends import breadth
from tests.models import assert_same, numpy, sequential

BACKEND = keras.backend.backend()
JIT = BACKEND == "jax"
# Compiling takes the time elsewhere: the breadth is tested on torch.
STOPS = (3, 4) if BACKEND == "torch" else (3,)


class Stop(keras.callbacks.Callback):
    """Raises `Stopped` after so many batches of the process."""

    def __init__(self, batches):
        super().__init__()
        self.left = batches

    def on_train_batch_end(self, batch, logs=None):
        self.left -= 1
        if not self.left:
            raise Stopped


class Stopped(Exception):
    pass


class Shuffled(keras.utils.PyDataset):
    """Batches with noise, in an order that it draws itself."""

    def __init__(self, x, y):
        super().__init__()
        self.x, self.y = x, y
        self.order = np.arange(len(self))
        self.rng = np.random.default_rng(3)

    def __len__(self):
        return len(self.x) // 4

    def __getitem__(self, index):
        rows = slice(4 * self.order[index], 4 * self.order[index] + 4)
        noise = np.random.normal(size=self.x[rows].shape) / 10
        return (self.x[rows] + noise).astype("float32"), self.y[rows]

    def on_epoch_end(self):
        self.rng.shuffle(self.order)


def arrays(rows=20):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, 8)).astype("float32")
    return x, rng.integers(4, size=(rows,))


def net():
    return sequential(
        (8,),
        keras.layers.Dense(16, "relu"),
        keras.layers.BatchNormalization(),
        keras.layers.Dropout(0.25),
        keras.layers.Dense(4),
    )


def loss():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def plain(masks=None):
    model = net()
    model.compile(
        keras.optimizers.Adam(0.01),
        loss(),
        metrics=["accuracy"],
        jit_compile=JIT,
    )
    return model, []


def cast():
    model = kwm.CAST(net())
    model.compile(loss=loss(), jit_compile=JIT)
    return model, []


def lift(optimizer=None):
    model = net()
    optimizer = optimizer or kwm.SparseAdamW(0.01)
    model.compile(optimizer, loss(), jit_compile=JIT)
    masks = kwm.PrincipalMaskCallback(0.3, refresh_every=4, criterion="random")
    return model, [masks]


def masked():
    return lift(keras.optimizers.AdamW(0.01))


def run(make, folder, data, *stops, save_freq=2, epochs=2, seed=0, **kwargs):
    """Train in a process of its own, as it were; return all that is left."""
    # All but the data's seed and the first weights is to come from the file.
    keras.utils.set_random_seed(seed)
    model, callbacks = make()
    if seed:
        for variable in model.weights:
            variable.assign(np.ones(variable.shape))
    checkpoint = kwm.Checkpoint(folder, save_freq)
    fit = {"shuffle": True, "verbose": 0, "epochs": epochs, **kwargs}
    callbacks = [*callbacks, checkpoint, *stops]
    history = model.fit(*data, callbacks=callbacks, **fit).history
    found = [*model.variables, *model.optimizer.variables]
    return [numpy(v) for v in found], history


def assert_resumes(tmp_path, make, data, stops=STOPS, **kwargs):
    whole, history = run(make, tmp_path / "whole", data(), **kwargs)
    for seed, batches in enumerate(stops, 1):
        with pytest.raises(Stopped):
            run(
                make,
                tmp_path / "run",
                data(),
                Stop(batches),
                seed=seed - 1,
                **kwargs,
            )
    resumed, after = run(
        make, tmp_path / "run", data(), seed=len(stops), **kwargs
    )
    assert_same(resumed, whole)
    # Of the last epoch, all of which counts.
    for name in after.keys() - {"mask_seconds"}:
        values = after[name]
        assert values[-1] == history[name][-1]


@breadth("make", [plain, cast, lift, masked], 1, 2, 3)
def test_arrays_in_the_middle_of_epochs(make, tmp_path):
    assert_resumes(tmp_path, make, arrays, batch_size=4)


KINDS = {
    "batch": {"batch_size": 4, "shuffle": "batch"},
    # Passes over the data that end within epochs.
    "steps": {"batch_size": 2, "steps_per_epoch": 4, "epochs": 4},
    "epochs": {"batch_size": 4, "save_freq": "epoch", "stops": (8, 4)},
    "executions": {"batch_size": 2, "stops": (2,), "save_freq": 4},
}
TESTED = {"torch": ["batch", "steps", "epochs"], "tensorflow": ["batch"]}


@pytest.mark.parametrize("kind", TESTED.get(BACKEND, ["executions"]))
def test_ways_to_fit(kind, tmp_path):
    def make():
        model, callbacks = plain()
        if kind == "executions":
            model.compile(
                "adam", loss(), jit_compile=JIT, steps_per_execution=2
            )
        return model, callbacks

    assert_resumes(tmp_path, make, arrays, **KINDS[kind])


def as_generator():
    rng = np.random.default_rng(5)
    x, y = arrays()

    def batches():
        while True:
            rows = rng.permutation(20)[:4]
            yield x[rows], y[rows]

    return (batches(),)


def as_py_dataset():
    return (Shuffled(*arrays()),)


def as_tf_data():
    tf = pytest.importorskip("tensorflow")
    # Its shuffling takes this seed and its own.
    tf.random.set_seed(1)
    data = tf.data.Dataset.from_tensor_slices(arrays())
    return (data.shuffle(20, seed=7).batch(4).prefetch(2),)


def as_loader():
    torch = pytest.importorskip("torch")
    x, y = map(torch.from_numpy, arrays())
    pairs = torch.utils.data.TensorDataset(x, y)
    generator = torch.Generator().manual_seed(3)
    options = {"batch_size": 4, "shuffle": True, "generator": generator}
    return (torch.utils.data.DataLoader(pairs, **options),)


DATA = {
    "torch": [as_generator, as_py_dataset, as_tf_data, as_loader],
    "tensorflow": [as_py_dataset, as_tf_data],
}


@pytest.mark.parametrize("data", DATA.get(BACKEND, [as_generator]))
def test_other_data(data, tmp_path):
    options = {"shuffle": data is as_py_dataset, "epochs": 3, "stops": (8, 4)}
    if data is as_generator:
        options["steps_per_epoch"] = 5
    assert_resumes(tmp_path, plain, data, **options)


@pytest.mark.one_backend
def test_data_in_another_order_are_an_error(tmp_path):
    x, y = arrays()
    with pytest.raises(Stopped):
        run(plain, tmp_path, (x, y), Stop(3), batch_size=4)
    with pytest.raises(ValueError, match="batch 2 of pass 1"):
        run(plain, tmp_path, (x[::-1].copy(), y), batch_size=4)
    with pytest.raises(ValueError, match="num_batches was 5 and is 10"):
        run(plain, tmp_path, (x, y), batch_size=2)


def fit(folder, epochs=1, units=4, model=None):
    model = model or sequential((8,), keras.layers.Dense(units))
    model.compile("sgd", "mse", jit_compile=JIT)
    x, _ = arrays(8)
    checkpoint = kwm.Checkpoint(folder, 1)
    model.fit(x, x[:, :units], 4, epochs, verbose=0, callbacks=[checkpoint])
    return [numpy(v) for v in model.variables]


def test_the_last_two_are_kept_and_the_older_one_is_used(tmp_path):
    fit(tmp_path, 2)
    names = ["step-0000000003.safetensors", "step-0000000004.safetensors"]
    assert sorted(os.listdir(tmp_path)) == names
    last = tmp_path / names[1]
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="goes on from 'step-0000000003"):
        resumed = fit(tmp_path, 2)
    assert len(resumed) == 2
    assert (tmp_path / f"{names[1]}.unreadable").exists()
    for name in names:
        (tmp_path / name).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="None of the checkpoints"):
        fit(tmp_path, 2)


def test_a_complete_run_is_loaded_and_not_trained(tmp_path):
    trained = fit(tmp_path)
    with pytest.warns(UserWarning, match="is complete"):
        assert_same(fit(tmp_path), trained)
    # More epochs go on.
    assert not np.array_equal(fit(tmp_path, 2)[0], trained[0])


def test_another_model_is_unchanged(tmp_path):
    fit(tmp_path)
    model = sequential((8,), keras.layers.Dense(3))
    before = [numpy(v) for v in model.variables]
    with pytest.raises(ValueError, match="of another model"):
        fit(tmp_path, 2, 3, model)
    assert_same([numpy(v) for v in model.variables], before)


@pytest.mark.one_backend
def test_arguments(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="a folder, or none yet"):
        kwm.Checkpoint(tmp_path / "file")
    with pytest.raises(ValueError, match=r"`path`.*Received: path=3"):
        kwm.Checkpoint(3)
    for wrong in (0, "never", 1.5):
        with pytest.raises(ValueError, match="save_freq"):
            kwm.Checkpoint(tmp_path, wrong)
    with pytest.raises(ValueError, match="save_seconds"):
        kwm.Checkpoint(tmp_path, save_seconds=0)


@pytest.mark.one_backend
def test_seconds(tmp_path):
    x, _ = arrays(8)
    model = sequential((8,), keras.layers.Dense(8))
    model.compile("sgd", "mse")
    checkpoint = kwm.Checkpoint(tmp_path, save_seconds=1e-9)
    with pytest.raises(Stopped):
        model.fit(
            x, x, 1, verbose=0, callbacks=[checkpoint, Stop(2)], shuffle=False
        )
    assert len(os.listdir(tmp_path)) == 2


class Group:
    """Stands for two processes, of which this one is `number`."""

    def __init__(self, number):
        self.number = number
        self.whole = numpy

    def count(self):
        return 2

    def index(self):
        return self.number

    def wait(self, name):
        pass

    def gathered(self, value):
        """The value of both, but for the seeds of their data."""
        if not isinstance(value, list):
            return [value, value]
        state, numbers = value
        return [[{**state, "seed": seed}, numbers] for seed in (7, 8)]


# Two real ones are in `tests/devices/processes.py`.
@pytest.mark.one_backend
def test_the_first_of_several_processes_writes_for_all(tmp_path, monkeypatch):
    names = ("checkpoint", "checkpoint_file", "shared", "data_order")

    def become(group):
        for name in names:
            name = f"keras_weightmods.saving.{name}.processes"
            monkeypatch.setattr(name, lambda: group)

    def train(epochs, **kwargs):
        model = sequential((8,), keras.layers.Dense(4))
        model.compile("sgd", "mse")
        checkpoint = kwm.Checkpoint(tmp_path, **kwargs)
        seeds = []
        see = keras.callbacks.LambdaCallback(
            on_epoch_begin=lambda *_: seeds.append(checkpoint._data.seed)
        )
        x, _ = arrays(8)
        model.fit(
            x, x[:, :4], 4, epochs, verbose=0, callbacks=[see, checkpoint]
        )
        return seeds

    become(Group(0))
    train(1)
    become(Group(1))
    saved = os.listdir(tmp_path)
    assert len(saved) == 1
    assert train(2) == [8]
    assert os.listdir(tmp_path) == saved
    with pytest.raises(ValueError, match="whose clocks differ"):
        train(2, save_seconds=1)
    become(None)
    with pytest.raises(ValueError, match="as many processes as it began"):
        train(2)


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


def pair_net(names):
    return sequential((8,), Pair(names, name="pair"))


@breadth("make", [plain, cast, lift], 1, 2)
def test_weights_of_one_path_train_as_others(make, tmp_path, monkeypatch):
    """Keras lists one of them alone for torch, which clears no other's."""
    ends = []
    for names in (("a", "a"), ("a", "b")):
        net = functools.partial(pair_net, names)
        monkeypatch.setitem(globals(), "net", net)
        fit = {"batch_size": 4, "epochs": 1}
        found, _ = run(make, tmp_path / names[1], arrays(), **fit)
        ends.append(found)
    assert_same(*ends)
