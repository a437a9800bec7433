import contextlib
import threading
import warnings

import keras
import numpy as np
import pytest
from keras import ops

import keras_weightmods as kwm
from keras_weightmods.utils import progress
from tests import models
from tests.backends import breadth

pytest.importorskip("keras_hub")
import keras_hub

BACKEND = keras.backend.backend()


def prompts(*lengths, size=12):
    """Return tokens, some for each prompt and zeros after them."""
    mask = np.arange(size) < np.array(lengths)[:, None]
    tokens = np.random.default_rng(0).integers(1, 20, mask.shape)
    return {"token_ids": tokens * mask, "padding_mask": mask}


def generated(model, inputs, stop_token_ids=None):
    return model.generate(dict(inputs), stop_token_ids=stop_token_ids)


def language_model(family="llama", sampler="greedy", **sizes):
    # XLA takes long for each layer.
    sizes = {"num_layers": 2 if BACKEND == "torch" else 1, **sizes}
    model = models.randomize(models.causal_lm(family, **sizes))
    model.compile(sampler=sampler)
    return model


@contextlib.contextmanager
def no_warning():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "`generate` of")
        yield


def check_same(model, *batches, **kwargs):
    """Both ways give equal tokens, and masks."""
    kwm.uncompile_generate(model)
    expected = [generated(model, batch, **kwargs) for batch in batches]
    kwm.compile_generate(model)
    with no_warning():
        received = [generated(model, batch, **kwargs) for batch in batches]
    models.assert_same(received, expected)
    return expected


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "gemma"] if BACKEND == "torch" else ["llama"]
)
def test_tokens_are_equal(family):
    model = language_model(family)
    # XLA compiles for each size, twice.
    sizes = [prompts(6), prompts(4, size=9)] if BACKEND == "torch" else []
    check_same(model, prompts(3), prompts(2, 5), *sizes)


@pytest.mark.skipif(BACKEND == "tensorflow", reason="XLA draws others")
@breadth("sampler", ["top_k", "top_p", "random"])
def test_random_numbers_are_the_same(sampler):
    model = language_model()

    def samples():
        cls = {
            "top_k": keras_hub.samplers.TopKSampler,
            "top_p": keras_hub.samplers.TopPSampler,
            "random": keras_hub.samplers.RandomSampler,
        }[sampler]
        model.compile(sampler=cls(seed=3))
        return [generated(model, prompts(2, 4)) for _ in range(2)]

    expected = samples()
    kwm.compile_generate(model)
    with no_warning():
        models.assert_same(samples(), expected)


def test_another_sampler():
    model = language_model()
    expected = generated(model, prompts(3))
    model.compile(sampler="random")
    kwm.compile_generate(model)
    with no_warning():
        generated(model, prompts(3))
        model.compile(sampler=keras_hub.samplers.TopKSampler(k=1))
        models.assert_same(generated(model, prompts(3)), expected)


def test_stop_tokens():
    model = language_model()
    whole = generated(model, prompts(3, 5))["token_ids"]
    stops = tuple({int(row[8]) for row in whole})
    (found,) = check_same(model, prompts(3, 5), stop_token_ids=stops)
    assert not found["padding_mask"].all()


@pytest.mark.parametrize(
    "pack",
    [{}, {"dtype": "int8", "head": "int8"}][BACKEND != "torch" :],
)
def test_packed_and_lora(pack):
    model = language_model(tie_word_embeddings=True)
    models.make_sparse(model)
    kwm.pack(model, **pack)
    check_same(model, prompts(3))
    # The variables are others: recorded anew, by itself.
    model.backbone.enable_lora(2)
    for variable in model.backbone.trainable_variables:
        if "lora" in variable.path:
            variable.assign(models.normal(*variable.shape))
    with no_warning():
        received = generated(model, prompts(4))
    kwm.uncompile_generate(model)
    # KerasHub itself goes on with what it compiled before.
    model.compile(sampler="greedy")
    models.assert_same(received, generated(model, prompts(4)))


def test_new_weights_are_seen():
    model = language_model()
    kwm.compile_generate(model)
    before = generated(model, prompts(3))
    models.randomize(model, seed=5)
    with no_warning():
        after = generated(model, prompts(3))
    assert (after["token_ids"] != before["token_ids"]).any()
    kwm.uncompile_generate(model)
    models.assert_same(after, generated(model, prompts(3)))


def test_bfloat16():
    model = language_model(dtype="bfloat16")
    kwm.compile_generate(model)
    with no_warning():
        generated(model, prompts(3))


@pytest.mark.one_backend
def test_strings_and_length():
    preprocessor = models.gpt2_preprocessor()
    model = models.causal_lm("gpt2", preprocessor)
    models.randomize(model).compile(sampler="greedy")
    texts = ["abc", "ab cd"]
    expected = model.generate(texts, max_length=11, stop_token_ids=None)
    kwm.compile_generate(model)
    with no_warning():
        received = model.generate(texts, max_length=11, stop_token_ids=None)
    assert received == expected


def test_a_saved_model_is_plain(tmp_path):
    model = language_model()
    kwm.compile_generate(model)
    expected = generated(model, prompts(3))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    loaded.compile(sampler="greedy")
    assert "make_generate_function" not in vars(loaded)
    models.assert_same(generated(loaded, prompts(3)), expected)


def test_other_threads_see_the_model_and_keras_as_they_are():
    """Nothing is replaced while a step is compiled, or runs."""
    from keras.src import backend

    model = language_model()
    watched = [backend.core, backend.nn, backend.numpy, model.sampler, model]
    watched += [type(model), type(model.sampler), keras_hub.samplers.Sampler]
    watched += model._flatten_layers()
    inputs = prompts(3)
    expected = ops.convert_to_numpy(model(inputs))

    def own(x):
        names = {name for name in vars(x) if name != "generate_function"}
        return {name: id(vars(x)[name]) for name in names}

    kwm.compile_generate(model)
    before = [own(x) for x in watched]
    seen, ended = [], threading.Event()

    def watch():
        while not ended.is_set():
            seen.append([own(x) for x in watched] == before)
            outputs = ops.convert_to_numpy(model(inputs))
            seen.append(np.allclose(outputs, expected, atol=1e-5))

    thread = threading.Thread(target=watch)
    thread.start()
    with no_warning():
        received = generated(model, inputs)
    ended.set()
    thread.join()
    assert seen
    assert all(seen)
    kwm.uncompile_generate(model)
    models.assert_same(received, generated(model, inputs))


def check_falls_back(model, match, inputs=None, **kwargs):
    inputs = inputs or prompts(3)
    expected = generated(model, inputs, **kwargs)
    kwm.compile_generate(model)
    with pytest.warns(UserWarning, match=match):
        received = generated(model, inputs, **kwargs)
    models.assert_same(received, expected)
    with no_warning():  # once
        generated(model, inputs, **kwargs)


def test_beam_search_falls_back():
    model = language_model(sampler="beam")
    check_falls_back(model, "BeamSampler has a loop of its own")


@pytest.mark.skipif(BACKEND != "torch", reason="of recordings")
@pytest.mark.parametrize(
    ("read", "match"),
    [
        (lambda x: float(ops.max(x)), "reads a number out of a tensor"),
        # Past torch, as a constant.
        (lambda x: ops.convert_to_numpy(x).max(), "gives other logits"),
    ],
)
def test_what_cannot_be_repeated_falls_back(read, match):
    class Reads(keras_hub.models.LlamaCausalLM):
        def call_with_cache(self, token_ids, cache, cache_update_index):
            logits, *others = super().call_with_cache(
                token_ids, cache, cache_update_index
            )
            scale = np.arange(20, dtype="float32") - read(token_ids)
            return logits * ops.convert_to_tensor(scale), *others

    model = Reads(models.backbone("llama"))
    models.randomize(model).compile(sampler="greedy")
    check_falls_back(model, match)


@pytest.mark.skipif(BACKEND == "torch", reason="there a recording is compared")
@pytest.mark.parametrize(
    ("packed", "off", "match"),
    [
        # As sums of other lengths are, where inputs are rounded.
        (True, lambda tokens: 1e-3 * tokens.shape[1], None),
        (False, lambda tokens: 1e-3 * tokens.shape[1], "at most"),
        (False, lambda tokens: 0.0 if tokens.shape[1] > 39 else np.nan, "nan"),
        (True, lambda tokens: 0.1 * tokens.shape[1], "in the mean"),
        (
            True,
            lambda tokens: 0.01 * ops.cast(ops.sum(tokens), "float32"),
            "at most",
        ),
    ],
)
def test_first_tokens_that_depend_on_what_follows(packed, off, match):
    class Noisy(keras_hub.models.LlamaCausalLM):
        def call_with_cache(self, token_ids, cache, cache_update_index):
            logits, *others = super().call_with_cache(
                token_ids, cache, cache_update_index
            )
            return logits + ops.cast(off(token_ids), logits.dtype), *others

    model = Noisy(models.backbone("llama"))
    models.randomize(model).compile(sampler="greedy")
    if packed:
        kwm.pack(models.make_sparse(model), dtype="int8")
    inputs = prompts(3, size=40)
    if match:
        check_falls_back(model, match, inputs)
    else:
        check_same(model, inputs)


def test_uncompile():
    model = language_model()
    plain = model.make_generate_function
    kwm.compile_generate(model)
    assert model.make_generate_function != plain
    for _ in range(2):
        kwm.uncompile_generate(model)
        assert model.make_generate_function == plain


def test_report():
    model = models.causal_lm()
    report = kwm.compile_generate(model)
    assert report.compiled
    assert report.backend == BACKEND
    assert model.name in str(report)


def test_refuses_other_models():
    with pytest.raises(ValueError, match=r"CausalLM.*Received: Sequential"):
        kwm.compile_generate(models.mlp())


def test_shows_that_it_compiles(monkeypatch, capsys):
    monkeypatch.setattr(progress, "DELAY", 0.01)
    model = language_model()
    kwm.compile_generate(model)
    generated(model, prompts(2))
    assert "Compiling `generate`: 0 s" in capsys.readouterr().out
    # What is there is not compiled again, and may be asked to be silent.
    generated(model, prompts(2))
    kwm.compile_generate(model, verbose=0)
    generated(model, prompts(2))
    assert "Compiling" not in capsys.readouterr().out
