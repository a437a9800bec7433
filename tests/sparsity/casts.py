"""What the tests of `CAST` share."""

import keras
import numpy as np
import pytest

import keras_weightmods as kwm
from tests.models import mlp, numpy, randomize


def cross_entropy():
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def make_mlp(seed=0, **kwargs):
    return randomize(mlp(8, 16, 4, **kwargs), seed, 0.3)


def make_data(samples=16, seed=1):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(samples, 8)).astype("float32")
    return x, rng.integers(4, size=(samples,))


class Interrupted(Exception):
    pass


def interrupt(*args):
    raise Interrupted


AT_THE_START = keras.callbacks.LambdaCallback(on_train_begin=interrupt)


def stopping(cast, epoch):
    def stop(now, logs):
        cast.stop_training = now >= epoch

    return keras.callbacks.LambdaCallback(on_epoch_end=stop)


class Batches(keras.utils.PyDataset):
    def __init__(self, x, y, batch_size):
        super().__init__()
        self.data, self.size = (x, y), batch_size

    def __len__(self):
        return len(self.data[0]) // self.size

    def __getitem__(self, index):
        part = slice(index * self.size, (index + 1) * self.size)
        return tuple(a[part] for a in self.data)


def started(cast, *args, **kwargs):
    with pytest.raises(Interrupted):
        cast.fit(*args, callbacks=[AT_THE_START], verbose=0, **kwargs)
    states = cast.adam_s._states
    importance = [numpy(s["importance"]) for s in states if "importance" in s]
    return cast.adam_s.total_steps, importance


def compiled(optimizer=None, model=None, teacher=None, **kwargs):
    cast = kwm.CAST(model or make_mlp(), teacher=teacher, **kwargs)
    cast.compile(optimizer, loss=cross_entropy())
    return cast


def fit(cast, data=None, batch_size=4, **kwargs):
    x, y = make_data() if data is None else data
    kwargs = {"shuffle": False, "verbose": 0, **kwargs}
    return cast.fit(x, y, batch_size=batch_size, **kwargs).history
