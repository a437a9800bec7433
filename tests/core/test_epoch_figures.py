import contextlib
import csv

import keras

from keras_weightmods.core.epoch_figures import EpochFigures
from tests.models import mlp, normal


class Figures(EpochFigures):
    def __init__(self, name):
        super().__init__()
        self.name = name
        self.epochs = 0

    def figures(self):
        self.epochs += 1
        return {self.name: float(self.epochs)}


def test_other_callbacks_find_them_in_any_order(tmp_path):
    model = mlp()
    model.compile("sgd", "mse", jit_compile=False)
    x, y, path = normal(8, 8), normal(8, 4), tmp_path / "log.csv"
    seen = []

    def see(epoch, logs):
        seen.append({**logs})

    callbacks = [
        keras.callbacks.CSVLogger(path),
        Figures("one"),
        keras.callbacks.LambdaCallback(on_epoch_end=see),
        Figures("two"),
    ]
    data = {"batch_size": 4, "verbose": 0, "validation_data": (x, y)}
    for start in (0, 2):
        history = model.fit(
            x,
            y,
            epochs=start + 2,
            initial_epoch=start,
            callbacks=callbacks,
            **data,
        ).history
        # Not of the validation.
        assert set(history) == {"loss", "val_loss", "one", "two"}
        assert history["one"] == history["two"] == [start + 1, start + 2]
        with path.open() as file:
            rows = [float(row["two"]) for row in csv.DictReader(file)]
        assert rows == history["two"]
    assert [logs["two"] for logs in seen] == [1, 2, 3, 4]
    # The model is as it was.
    assert "_get_metrics_result_or_logs" not in vars(model)
    assert set(model.evaluate(x, y, verbose=0, return_dict=True)) == {"loss"}


def test_what_an_interrupted_fit_leaves_is_taken_over():
    model = mlp()
    model.compile("sgd", "mse", jit_compile=False)
    x, y = normal(8, 8), normal(8, 4)

    def stop(batch, logs):
        raise KeyboardInterrupt

    figures = Figures("one")
    stopping = keras.callbacks.LambdaCallback(on_train_batch_begin=stop)
    with contextlib.suppress(KeyboardInterrupt):
        model.fit(x, y, verbose=0, callbacks=[figures, stopping])
    history = model.fit(x, y, verbose=0, callbacks=[figures]).history
    assert history["one"] == [1.0]
    assert "_get_metrics_result_or_logs" not in vars(model)
    # And they are not in the logs of a fit without the callback.
    with contextlib.suppress(KeyboardInterrupt):
        model.fit(x, y, verbose=0, callbacks=[figures, stopping])
    assert set(model.fit(x, y, verbose=0).history) == {"loss"}
    assert "_get_metrics_result_or_logs" not in vars(model)
