import contextlib
import pkgutil
import warnings

import keras
import numpy as np
import pytest
from keras import ops

import keras_weightmods as kwm
from keras_weightmods import backend, native
from keras_weightmods.utils import huge_pages, progress
from tests import models

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


def test_the_same_tokens_as_without():
    """A packed model draws them at random, with stop tokens."""
    # On TensorFlow XLA draws others.
    samplers = keras_hub.samplers
    model = language_model(tie_word_embeddings=True)
    kwm.pack(models.make_sparse(model), dtype="int8", head="int8")

    def samples(stops):
        if BACKEND != "tensorflow":
            model.compile(sampler=samplers.TopKSampler(k=3, seed=3))
        return generated(model, prompts(2, 5), stops)

    # No token stops it, so what it ends with is known.
    expected = samples((1000,))
    kwm.compile_generate(model)
    with no_warning():
        models.assert_same(samples((1000,)), expected)


@pytest.mark.one_backend
@pytest.mark.parametrize(
    "family", ["llama", "gpt2", pytest.param("gemma", marks=pytest.mark.heavy)]
)
def test_tokens_of_families_and_sizes_are_equal(family):
    model = language_model(family)
    whole, _ = check_same(model, prompts(2, 5), prompts(4, size=9))
    stops = tuple({int(row[8]) for row in whole["token_ids"]})
    (found,) = check_same(model, prompts(2, 5), stop_token_ids=stops)
    assert not found["padding_mask"].all()


@pytest.mark.skipif(not native.is_available(), reason="no compiled kernels")
@pytest.mark.parametrize(
    "family", ["qwen", pytest.param("gemma", marks=pytest.mark.heavy)]
)
def test_the_kernel_computes_the_attention(family, monkeypatch):
    name = "rewrites" if BACKEND == "torch" else "attention"
    place = f"keras_weightmods.backend.{BACKEND}.{name}.kernel"
    kernel, queries = pkgutil.resolve_name(place), []

    def counted(query, *args):
        queries.append(query.shape[1])
        return kernel(query, *args)

    monkeypatch.setattr(place, counted)
    # Heads as large as the cache is long by XLA: masks have the shape of keys.
    sizes = {"head_dim": 64} if family == "gemma" else {"hidden_dim": 128}
    check_same(language_model(family, **sizes), prompts(2, 5))
    # Of the prompt, and of a token.
    assert {12, 1} <= {*queries}


@pytest.mark.one_backend
def test_packed_and_lora():
    model = language_model(tie_word_embeddings=True)
    models.make_sparse(model)
    kwm.pack(model)
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


@pytest.mark.skipif(BACKEND == "tensorflow", reason="it shows copies alone")
def test_weights_move_to_huge_pages(monkeypatch):
    seen = []
    monkeypatch.setattr(huge_pages, "collapse", seen.extend)
    model = language_model(dtype="bfloat16")
    kwm.compile_generate(model)
    for _ in range(2):
        generated(model, prompts(3))
    assert len(seen) == len(model.variables)
    for view, variable in zip(seen, model.variables):
        own = backend.current().view_of(variable.value)
        assert np.shares_memory(view, own)


@pytest.mark.one_backend
def test_new_weights_are_seen(monkeypatch, capsys):
    monkeypatch.setattr(progress, "DELAY", 0.01)
    model = language_model(dtype="bfloat16")
    kwm.compile_generate(model)
    before = generated(model, prompts(3))
    assert "Compiling `generate`: 0 s" in capsys.readouterr().out
    models.randomize(model, seed=5)
    with no_warning():
        after = generated(model, prompts(3))
    assert (after["token_ids"] != before["token_ids"]).any()
    # What is there is not compiled again.
    assert "Compiling" not in capsys.readouterr().out


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


@pytest.mark.one_backend
@pytest.mark.parametrize("sampler", ["greedy", "beam"])
def test_an_empty_list_has_no_stop_token(sampler):
    model = language_model(sampler=sampler)
    expected = generated(model, prompts(2, 5))
    kwm.compile_generate(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`generate` of")
        models.assert_same(generated(model, prompts(2, 5), []), expected)


@pytest.mark.one_backend
def test_a_saved_model_is_plain(tmp_path):
    model = language_model()
    plain = model.make_generate_function
    report = kwm.compile_generate(model)
    assert (report.model, report.backend) == (model.name, BACKEND)
    assert model.make_generate_function != plain
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert "make_generate_function" not in vars(loaded)
    for _ in range(2):
        kwm.uncompile_generate(model)
        assert model.make_generate_function == plain


def check_falls_back(model, match, inputs=None, **kwargs):
    inputs = inputs or prompts(3)
    expected = generated(model, inputs, **kwargs)
    kwm.compile_generate(model)
    with pytest.warns(UserWarning, match=match):
        received = generated(model, inputs, **kwargs)
    models.assert_same(received, expected)
    with no_warning():  # once
        generated(model, inputs, **kwargs)


def test_a_cache_of_pairs_and_a_sliding_window():
    """Gemma 3 has keys and values for each layer, and gives masks with them."""
    model = language_model(
        "gemma3",
        preprocessor=models.gemma3_preprocessor(length=32),
        num_layers=2,
        # The kernel of attention takes multiples of 16.
        head_dim=32,
        use_sliding_window_attention=True,
        sliding_window_size=4,
    )
    # Of unequal lengths, one beyond what the first pass reads.
    texts = ["abc", "bad cab dab " * 4]
    options = {"max_length": 28, "stop_token_ids": None}
    expected = model.generate(texts, **options)
    kwm.compile_generate(model)
    with no_warning():
        assert model.generate(texts, **options) == expected


@pytest.mark.one_backend
def test_what_is_given_beside_a_cache_falls_back():
    model = language_model("gemma4_moe")
    inputs = prompts(3)
    kwm.compile_generate(model)
    with pytest.warns(UserWarning, match="gets more than tokens, one cache"):
        model.generate(inputs, stop_token_ids=None)


@pytest.mark.one_backend
def test_beam_search_falls_back():
    model = language_model(sampler="beam")
    check_falls_back(model, "BeamSampler has a loop of its own")


@pytest.mark.skipif(BACKEND != "torch", reason="torch records")
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


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("packed", "off", "match"),
    [
        # Sums of other lengths differ so much if inputs are rounded.
        (True, lambda tokens: 1e-3 * tokens.shape[1], None),
        (False, lambda tokens: 1e-3 * tokens.shape[1], "at most"),
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


@pytest.mark.one_backend
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_prompt_gives_the_logits_of_some_places_alone(family, monkeypatch):
    """Those of all take most of the memory with a large vocabulary."""
    model = language_model(family)
    table, seen = model.backbone.token_embedding, []

    def call(x, reverse=False):
        seen.append(x.shape[1] if reverse else 1)
        return type(table).call(table, x, reverse)

    monkeypatch.setattr(table, "call", call)
    kwm.compile_generate(model)
    with no_warning():
        generated(model, prompts(70, 90, size=100))
    assert max(seen) == 32


@pytest.mark.one_backend
def test_own_models_of_keras_hub_whose_tokens_see_later_ones_fall_back(
    monkeypatch,
):
    model = language_model()
    norm = model.backbone.layer_norm

    def call(x):
        return type(norm).call(norm, x + ops.mean(x, axis=1, keepdims=True))

    monkeypatch.setattr(norm, "call", call)
    check_falls_back(model, "at most", prompts(3, size=40))


@pytest.mark.one_backend
def test_refuses_other_models():
    with pytest.raises(ValueError, match=r"CausalLM.*Received: Sequential"):
        kwm.compile_generate(models.mlp())
