import argparse

import keras
import numpy as np
import pytest

import keras_weightmods as kwm
from benchmarks import lift_quality, lift_step, lift_tuning
from examples import finetune_lift
from examples.data import prose
from tests import models

pytestmark = pytest.mark.one_backend


class Characters:
    """A tokenizer of one token a character; 0 ends a text."""

    end_token_id, pad_token_id = 0, 1

    def __call__(self, text):
        return np.array([min(ord(each), 127) for each in text])

    def detokenize(self, ids):
        return "".join(map(chr, ids))


@pytest.fixture
def llama():
    keras.utils.set_random_seed(0)
    return models.causal_lm(hidden_dim=64, intermediate_dim=96)


@pytest.mark.parametrize("name", lift_tuning.METHODS)
def test_methods_train_as_many_numbers(name, llama):
    method = lift_tuning.METHODS[name]
    kernels = kwm.find_targets(llama)
    expected = method.density * lift_tuning.entries(kernels)
    if method.lora:
        lift_step.enable_lora(llama, method.density, method.lora == "rsLoRA")
        trained = sum(np.prod(v.shape) for v in llama.trainable_variables)
        assert trained == pytest.approx(expected, rel=0.5)
        return
    if not method.criterion:
        return
    llama.compile(kwm.SparseAdamW(1e-3), "sparse_categorical_crossentropy")
    ids = np.ones((2, 8), "int32")
    data = {"token_ids": ids, "padding_mask": ids > 0}, ids
    lift_tuning.make_masks(llama, method, 10, 0, data).attach(llama)
    optimizer = llama.optimizer
    chosen = [optimizer.indices_of(v) for v in optimizer.masked_variables]
    assert sum(map(len, chosen)) == pytest.approx(expected, rel=0.1)
    if method.criterion == "smallest":
        for variable, places in zip(optimizer.masked_variables, chosen):
            kernel = np.abs(keras.ops.convert_to_numpy(variable)).ravel()
            rest = np.delete(kernel, places)
            assert kernel[places].max() <= rest.min()


@pytest.mark.parametrize("name", ["rsLoRA", "gradient 5 %", "LIFT + LoRA"])
def test_a_run_of_a_tiny_model(name, tmp_path, monkeypatch):
    pytest.importorskip("reasoning_gym")

    def load_model(dtype):
        keras.utils.set_random_seed(1)
        model = models.causal_lm(vocabulary_size=128, dtype=dtype)
        model.tokenizer = Characters()
        return model

    def load_rows(tokenizer, length, **texts):
        return [np.ones((rows, length), "int32") for rows in texts.values()]

    monkeypatch.setattr(finetune_lift, "load_model", load_model)
    monkeypatch.setattr(prose, "load_rows", load_rows)
    args = argparse.Namespace(
        steps=2,
        search_steps=1,
        batch=2,
        length=330,
        valid=2,
        test=3,
        unseen=2,
        text_rows=1,
        dtype="float32",
        json=tmp_path / "log.json",
    )
    method = lift_tuning.METHODS[name]
    before = lift_tuning.Worker(args, 0)(None, 0.0, False)
    found = lift_tuning.Worker(args, 0)(method, 1e-2, False)
    assert set(lift_quality.COSTS) < set(found)
    for measure in ("loss", "unseen_loss", *lift_tuning.TEXTS):
        assert found[measure] != before[measure]
        assert found[measure] == pytest.approx(before[measure], rel=0.2)
    assert found["solved"] == before["solved"] == 0
    again = lift_tuning.Worker(args, 0)(method, 1e-2, False)
    assert again["loss"] == found["loss"]
    found = lift_tuning.Worker(args, 3)(method, 1e-2, True)
    assert "valid" in found
    assert "solved" not in found
