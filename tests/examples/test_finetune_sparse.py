import argparse

import numpy as np
import pytest
from keras import ops

import keras_weightmods as kwm
from examples import finetune_sparse
from tests.models import causal_lm, make_sparse

pytest.importorskip("keras_hub")

pytestmark = pytest.mark.one_backend

ARGS = argparse.Namespace(rank=2, seed=0)


@pytest.fixture(scope="module")
def model():
    model = causal_lm("llama3", intermediate_dim=16, tie_word_embeddings=True)
    return make_sparse(model)


@pytest.mark.parametrize("name", list(finetune_sparse.METHODS))
def test_each_way_trains_and_ends_exactly_sparse(model, name):
    start = model.get_weights()
    targets = kwm.find_targets(model)
    before = [ops.convert_to_numpy(t.variable) for t in targets]
    train = np.random.default_rng(0).integers(0, 20, (3, 9)).astype("int32")
    finetune_sparse.METHODS[name](model, train, ARGS)
    kwm.assert_sparse(model, "2:4")
    after = [ops.convert_to_numpy(t.variable) for t in targets]
    changed = any((a != b).any() for a, b in zip(after, before))
    assert changed == (name != "2:4, as it was")
    for old, new in zip(before, after):
        assert name == "LoRA, merged by magnitude" or not new[old == 0].any()
    assert all(v.trainable for v in model.weights)
    model.set_weights(start)
