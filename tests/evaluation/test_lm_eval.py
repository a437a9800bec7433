import importlib.util
import sys
import types

import numpy as np
import pytest

import keras_weightmods as kwm
from keras_weightmods.evaluation import lm_eval
from tests.models import causal_lm, gpt2_preprocessor, numpy, randomize

pytest.importorskip("keras_hub")
IS_MISSING = importlib.util.find_spec("lm_eval") is None
NEEDS_LM_EVAL = pytest.mark.skipif(IS_MISSING, reason="needs lm-eval")
pytestmark = pytest.mark.one_backend


@pytest.fixture(scope="module")
def model(request):
    """A model whose texts begin with a start token, or with none."""
    has_start = getattr(request, "param", True)
    preprocessor = gpt2_preprocessor(add_start_token=has_start)
    sizes = {"hidden_dim": 8, "max_sequence_length": 32}
    model = causal_lm("gpt2", preprocessor, **sizes)
    model.compile(sampler="top_k")
    return randomize(model, scale=1.0)


def logits_of(model, tokens):
    inputs = np.asarray(tokens, dtype="int32")[None]
    inputs = {"token_ids": inputs, "padding_mask": np.ones_like(inputs)}
    return numpy(model(inputs))[0].astype("float64")


def log_probabilities(model, tokens):
    """Those of each token after the first, and whether it is the likeliest."""
    logits = logits_of(model, tokens[:-1])
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    places = np.arange(len(logits))
    return logits[places, tokens[1:]], logits.argmax(-1) == tokens[1:]


def encode(model, text):
    tokens = [int(token) for token in model.preprocessor.tokenizer(text)]
    return ([0] if model.preprocessor.add_start_token else []) + tokens


def greedy(model, tokens, count):
    tokens = list(tokens)
    for _ in range(count):
        tokens.append(int(logits_of(model, tokens)[-1].argmax()))
    return tokens


def requests(*args):
    return [types.SimpleNamespace(args=each, arguments=each) for each in args]


@pytest.fixture
def adapted(model, monkeypatch):
    if IS_MISSING:
        base = types.SimpleNamespace(TemplateLM=object)
        monkeypatch.setitem(sys.modules, "lm_eval.api.model", base)
    return kwm.lm_eval_model(model, length=12, batch_size=2, chunk_size=5)


@NEEDS_LM_EVAL
def test_loglikelihood(model, adapted):
    pairs = [("ab cd", " ab"), ("c", "b"), ("c d ", "ef"), ("defgh" * 4, "h")]
    results = adapted.loglikelihood(requests(*pairs))
    for (context, continuation), (value, is_greedy) in zip(pairs, results):
        whole = encode(model, context + continuation)
        count = len(whole) - len(encode(model, context.rstrip()))
        each, likeliest = log_probabilities(model, np.array(whole[-13:]))
        assert value == pytest.approx(each[-count:].sum(), rel=1e-4)
        assert is_greedy == likeliest[-count:].all()


def test_loglikelihood_of_tokens(model, adapted):
    whole = greedy(model, encode(model, "cd"), 2)
    likeliest, other = whole[-2:], [(whole[-2] + 1) % 9, whole[-1]]
    requests = [(("", ""), whole[:-2], each) for each in (likeliest, other)]
    results = adapted._loglikelihood_tokens(requests)
    assert [is_greedy for _, is_greedy in results] == [True, False]
    for (_, context, scored), (value, _) in zip(requests, results):
        each, _ = log_probabilities(model, np.array(context + scored))
        assert value == pytest.approx(each[-2:].sum(), rel=1e-4)
    with pytest.raises(ValueError, match="continuation"):
        adapted._loglikelihood_tokens([(("", ""), [1], [2] * 13)])


@NEEDS_LM_EVAL
def test_loglikelihood_rolling(model, adapted):
    texts = [("abcdefgh " * 4,), ("c",)]
    results = adapted.loglikelihood_rolling(requests(*texts))
    for (text,), value in zip(texts, results):
        tokens = [0, *model.preprocessor.tokenizer(text)]
        expected, scored = 0.0, 1
        while scored < len(tokens):
            end = min(len(tokens), scored + 12)
            # Each token once, after as much as fits.
            window = np.array(tokens[max(0, end - 13) : end])
            each, _ = log_probabilities(model, window)
            expected += each[scored - end :].sum()
            scored = end
        assert value == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("model", [True, False], indirect=True)
def test_the_likeliest_tokens_without_a_change_of_the_model(model):
    before = dict(vars(model))
    start = encode(model, "ab cd")
    view = lm_eval._greedy_view(model)
    found = lm_eval._new_tokens(view, start, 4, [99])
    assert [*start, *found] == greedy(model, start, 4)
    first = lm_eval._new_tokens(view, start, 4, [found[1]])
    assert first == found[: found.index(found[1]) + 1]
    assert vars(model).keys() == before.keys()
    for name in ("sampler", "generate_function"):
        assert vars(model)[name] is before[name]


def test_generate_until_is_greedy(model, adapted):
    text = model.preprocessor.tokenizer.detokenize
    prompt = "ab cd"
    start = encode(model, prompt)
    new = greedy(model, start, 4)[len(start) :]
    new = new[: new.index(0)] if 0 in new else new
    whole = text([*start, *new])[len(text(start)) :]
    stop = whole[len(whole) // 2 :][:1] or "zz"
    found = adapted.generate_until(
        requests(
            (prompt, {"until": ["zz"], "max_gen_toks": 4}),
            (prompt, {"until": stop, "max_gen_toks": 4}),
            (prompt, {"max_gen_toks": 1}),
        )
    )
    one = text([*start, *new[:1]])[len(text(start)) :]
    assert found == [whole, whole.split(stop)[0], one]
    with pytest.raises(ValueError, match="greedily"):
        adapted.generate_until(requests((prompt, {"do_sample": True})))


def test_only_end_tokens_end_a_text(adapted, monkeypatch):
    # Token 0 is an ordinary one in most vocabularies.
    monkeypatch.setattr(type(adapted), "eot_token_id", 3)
    monkeypatch.setattr(lm_eval, "_new_tokens", lambda *_: [1, 0, 2, 3, 1])
    text = adapted._generate(None, "c", {})
    assert text == "a<|endoftext|>b"


def test_wrong_arguments(model, adapted, monkeypatch):
    with pytest.raises(ValueError, match="preprocessor"):
        kwm.lm_eval_model(model.backbone)
    with pytest.raises(ValueError, match="`length`"):
        kwm.lm_eval_model(model, length=0)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(ImportError, match="pip install lm-eval"):
        kwm.lm_eval_model(model)
