import argparse

import keras
import numpy as np
import pytest
from keras import ops

import keras_weightmods as kwm
from benchmarks import cast_llm
from tests.models import causal_lm

pytestmark = pytest.mark.one_backend

pytest.importorskip("keras_hub")

ROWS = np.random.default_rng(0).integers(0, 11, (7, 6)).astype("int32")


def make_cast():
    model = causal_lm(
        "llama3",
        vocabulary_size=11,
        hidden_dim=8,
        intermediate_dim=8,
        tie_word_embeddings=True,
    )
    cast = kwm.CAST(model, init="wanda")
    cast.compile()
    return cast


def make_args(folder):
    return argparse.Namespace(
        json=folder / "log.json", checkpoints=3, steps=12, batch_size=2, seed=0
    )


def weights(cast):
    return [ops.convert_to_numpy(v) for v in cast.student.weights]


def test_an_interrupted_run_ends_as_one_that_was_not(tmp_path, monkeypatch):
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    args = make_args(tmp_path / "whole")
    whole = make_cast()
    seconds = cast_llm.train_resumably(whole, ROWS, args)
    assert seconds > 0
    assert int(whole.adam_s.iterations) == 12
    assert not list((tmp_path / "whole").iterdir())

    args = make_args(tmp_path / "parts")
    save = keras.callbacks.BackupAndRestore._save_model
    saved = []

    def save_and_stop(self, *a, **k):
        save(self, *a, **k)
        saved.append(self._current_epoch)
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(
        keras.callbacks.BackupAndRestore, "_save_model", save_and_stop
    )
    with pytest.raises(KeyboardInterrupt):
        cast_llm.train_resumably(make_cast(), ROWS, args)
    monkeypatch.undo()
    parts = make_cast()
    cast_llm.train_resumably(parts, ROWS, args)
    assert int(parts.adam_s.iterations) == 12
    for expected, found in zip(weights(whole), weights(parts)):
        np.testing.assert_array_equal(found, expected)
    assert not list((tmp_path / "parts").iterdir())
