"""A call of `quantize` that is interrupted, and made again."""

import collections
import random
import re

import numpy as np
import pytest

import keras_weightmods as kwm
from keras_weightmods.quantization import quantize as module
from keras_weightmods.quantization.record import Record, remove_record
from tests import models
from tests.models import assert_same_bits, weights_of
from tests.quantization import test_head
from tests.quantization.test_quantize import data, make_mlp

one_backend = pytest.mark.one_backend
TOKENS = np.random.default_rng(0).integers(2, 16, size=(32, 12))


def make_llama():
    return models.randomize(models.causal_lm("llama"), scale=0.2)


@pytest.fixture
def stopped(monkeypatch):
    """Return a function that stops each call after its first new step."""
    write = Record._write

    def stop(self, *arguments):
        write(self, *arguments)
        if self._folder is not None:
            raise KeyboardInterrupt

    def run(call):
        steps = 0
        with monkeypatch.context() as patch:
            patch.setattr(Record, "_write", stop)
            while True:
                # What other code draws must not matter.
                random.seed(steps)
                try:
                    return call(), steps
                except KeyboardInterrupt:
                    steps += 1

    return run


# JAX compiles for 20 seconds.
@one_backend
@pytest.mark.parametrize(
    ("make", "options", "steps"),
    [
        # Nearest, two blocks.
        (make_mlp, {}, 3),
        # Nearest, the head, one block.
        (make_llama, {}, 3),
        # The bits, nearest, the head, one block.
        (lambda: test_head.make()[0], {"bits": 3.5}, 4),
        # Nearest, and the groups of kernels that share their inputs.
        (make_llama, {"refine": None, "head": False}, 5),
        (make_mlp, {"refine": None, "size": 6000}, 4),
    ],
)
def test_the_same_bits_after_a_stop_at_each_step(
    make, options, steps, stopped, monkeypatch, tmp_path
):
    """And each step is made once, until the folder is removed."""
    counts = collections.Counter()

    def counted(name, function):
        def call(*arguments, **keywords):
            counts[name] += 1
            return function(*arguments, **keywords)

        return call

    for name in ("choose_bits", "round_kept", "round_table", "train_block"):
        monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    monkeypatch.setattr(module, "_SCALES", (4, 2e-3))
    options = {"epochs": 1, "batch_size": 16, "verbose": 0, **options}
    x = data() if make is make_mlp else TOKENS
    whole, folder = make(), tmp_path / "steps"
    expected = kwm.quantize(whole, x, **options)
    once = counts.copy()
    counts.clear()
    model = make()
    before = weights_of(model)

    def call():
        assert_same_bits(weights_of(model), before)
        return kwm.quantize(model, x, **options, resume=folder)

    report, received = stopped(call)
    assert received == steps
    assert counts == once
    assert_same_bits(weights_of(model), weights_of(whole))
    # A kill before the model is saved.
    again = make()
    kwm.quantize(again, x, **options, resume=folder)
    assert counts == once
    assert_same_bits(weights_of(again), weights_of(whole))
    # Keras numbers layers through a process.
    report, expected = (
        re.sub(r"_\d+", "", str(each.to_dict())) for each in (report, expected)
    )
    assert report == expected
    remove_record(folder)
    assert not folder.exists()


@one_backend
def test_the_text_that_a_model_writes_is_kept(stopped, monkeypatch, tmp_path):
    texts = []

    def self_generated(*arguments, **options):
        texts.append(TOKENS)
        return texts[-1]

    monkeypatch.setattr(module, "self_generated", self_generated)
    whole, model = (
        models.randomize(models.causal_lm("gpt2"), scale=0.2) for _ in "ab"
    )
    options = {"refine": None, "verbose": 0}
    kwm.quantize(whole, texts or self_generated(), **options)
    stopped(lambda: kwm.quantize(model, resume=tmp_path / "a", **options))
    assert len(texts) == 2
    assert_same_bits(weights_of(model), weights_of(whole))


@one_backend
def test_what_is_no_part_of_the_same_call(stopped, tmp_path):
    """It is refused, or left alone; what cannot be read is done again."""
    x, folder = data(64), tmp_path / "steps"
    whole = make_mlp()
    text = "56 for 72 inputs"
    with pytest.warns(UserWarning, match=text) as told:
        kwm.quantize(whole, x, refine=None, verbose=0)
    assert __file__ in {w.filename for w in told if text in str(w.message)}

    def run(model, x=x, **options):
        options = {"refine": None, "verbose": 0, "resume": folder, **options}
        return kwm.quantize(model, x, **options)

    models_left = iter([make_mlp(), make_mlp()])
    with pytest.raises(StopIteration):
        stopped(lambda: run(next(models_left)))
    other = make_mlp()
    other.layers[0].bias.assign(other.layers[0].bias + 1)
    wide = make_mlp("mixed_bfloat16")
    wide.set_weights(weights_of(make_mlp()))
    names = {path.name for path in folder.iterdir()}
    for model, options, name in (
        (make_mlp(), {"bits": 3}, "bits"),
        (make_mlp(), {"bits": 4.0}, "bits"),
        (make_mlp(), {"group_size": 128}, "group_size"),
        (make_mlp(), {"damping": 0.1, "targets": "dense"}, "damping"),
        (make_mlp(), {"refine": "scales"}, "refine"),
        (make_mlp(), {"x": -x}, "data"),
        (make_mlp(), {"x": x[:-8]}, "data"),
        (other, {}, "model"),
        (wide, {}, "model"),
        (make_mlp(), {"resume": tmp_path / "a" / "b"}, "folder that exists"),
        (make_mlp(), {"resume": __file__}, "new one in a folder"),
        (make_mlp(), {"resume": 3}, "resume"),
    ):
        before = weights_of(model)
        with pytest.raises(ValueError, match=f"resume.* {name}"):
            run(model, **options)
        assert_same_bits(weights_of(model), before)
    assert {path.name for path in folder.iterdir()} == names

    step = folder / "quantize-nearest.safetensors"
    step.write_bytes(step.read_bytes()[:-9])
    # What a kill within a write leaves, and what is of the user.
    (folder / ".kwm-0123").mkdir()
    (folder / "quantize-mine.safetensors").write_text("mine")
    model = make_mlp()
    few = "1 of 2 kernels were fitted to fewer rows"
    with (
        pytest.warns(UserWarning, match=few),
        pytest.warns(UserWarning, match="cannot be read, and is done again"),
    ):
        run(model)
    assert_same_bits(weights_of(model), weights_of(whole))
    remove_record(folder)
    names = {path.name for path in folder.iterdir()}
    assert names == {".kwm-0123", "quantize-mine.safetensors"}
