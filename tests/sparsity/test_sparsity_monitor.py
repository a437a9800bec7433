import keras
import numpy as np
import pytest

import keras_weightmods as kwm
from tests.models import mlp, normal, numpy

one_backend = pytest.mark.one_backend


class CountingMonitor(kwm.SparsityMonitor):
    def __init__(self, every=None):
        super().__init__(every)
        self.seen = []

    def measure(self):
        result = super().measure()
        optimizer = self.model.optimizer
        pair = map(numpy, optimizer.sparsified), optimizer.masks
        w, kept = (np.concatenate([a.ravel() for a in each]) for each in pair)
        self.seen.append((result, w.astype("float64"), kept))
        return result


def make_data():
    x = normal(32, 8)
    return x, np.sin(3 * x[:, :4])


def test_values_and_logs():
    x, y = make_data()
    model = mlp()
    optimizer = kwm.AdamS(0.05, 24, decay="relative", mask_every=2)
    model.compile(optimizer, "mse")
    monitor, looked = CountingMonitor(every=3), []

    def record(batch, logs):
        looked.append("kept_share" in logs)

    look = keras.callbacks.LambdaCallback(on_train_batch_end=record)
    fit = {"batch_size": 4, "epochs": 3, "callbacks": [monitor, look]}
    history = model.fit(x, y, verbose=0, **fit).history

    # 8 batches an epoch: looks after the third and sixth, and at its end.
    assert looked == [i % 8 in (2, 5) for i in range(24)]
    steps = [e * 8 + k for e in range(3) for k in (3, 6, 8)]
    before, flips_seen = None, 0
    for step, (result, w, kept) in zip(steps, monitor.seen, strict=True):
        share = np.abs(w[kept]).sum() / np.abs(w).sum()
        assert result["kept_share"] == pytest.approx(share, rel=1e-5)
        largest = np.abs(w[~kept]).max()
        assert result["largest_masked"] == pytest.approx(largest, rel=1e-6)
        flips = 0.0
        if before is not None:
            # A mask is set at steps 0, 2, 4, ...
            masks_set = -(-step // 2) - -(-before[0] // 2)
            flips = (kept != before[1]).mean() / masks_set
        assert result["mask_flips"] == pytest.approx(flips)
        flips_seen += flips > 0
        before = (step, kept)
    assert flips_seen
    last = [monitor.seen[i][0] for i in (2, 5, 8)]
    for name in ("kept_share", "largest_masked", "mask_flips"):
        assert history[name] == [entry[name] for entry in last]
    assert history["largest_masked"][-1] == 0.0


@one_backend
def test_nothing_to_look_at():
    model = mlp()
    model.compile("adam", "mse")
    with pytest.raises(ValueError, match="`optimizer` must be `AdamS`"):
        model.fit(*make_data(), verbose=0, callbacks=[kwm.SparsityMonitor()])
