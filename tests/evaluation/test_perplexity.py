import types

import keras
import numpy as np
import pytest

import keras_weightmods as kwm
from tests.models import causal_lm, numpy, randomize, token_net

pytest.importorskip("keras_hub")

VOCABULARY = 11
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (5, 7))


@pytest.fixture(scope="module")
def model():
    sizes = {"vocabulary_size": VOCABULARY, "tie_word_embeddings": True}
    sizes |= {"hidden_dim": 8, "intermediate_dim": 8}
    return randomize(causal_lm("llama3", **sizes), scale=1.0)


def logits_of(model, tokens):
    tokens = np.asarray(tokens, dtype="int32")[None]
    if hasattr(model, "backbone"):
        tokens = {"token_ids": tokens, "padding_mask": np.ones_like(tokens)}
    return numpy(model(tokens))[0].astype("float64")


def reference_losses(model, text, length=1024, stride=None):
    """Loss of each token but the first, one window and token at a time."""
    stride = length if stride is None else stride
    losses = {}
    for start in range(0, len(text) - 1, stride):
        window = text[start : start + length + 1]
        for place, row in enumerate(logits_of(model, window[:-1])):
            log_sum = np.log(np.exp(row).sum())
            loss = log_sum - row[window[place + 1]]
            losses.setdefault(start + place + 1, loss)
    assert sorted(losses) == list(range(1, len(text)))
    return np.array([losses[i] for i in sorted(losses)])


def test_losses_follow_changed_weights_without_a_new_build(model):
    measure = kwm.Perplexity(model, batch_size=2, chunk_size=3)
    functions = []
    for _ in range(2):
        expected = [reference_losses(model, row).mean() for row in TOKENS]
        losses = measure.losses(TOKENS, verbose=0)
        np.testing.assert_allclose(losses, expected, rtol=1e-5)
        np.testing.assert_allclose(
            measure(TOKENS, verbose=0), np.exp(np.mean(expected)), rtol=1e-5
        )
        functions.append(measure._score._run_body)
        for variable in model.trainable_variables:
            variable.assign(variable * 0.9)
    assert functions[0] is functions[1]


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("length", "stride"), [(1024, None), (4, None), (4, 2), (5, 1)]
)
def test_windows_score_each_token_once(model, length, stride):
    random = np.random.default_rng(1)
    texts = [random.integers(0, VOCABULARY, n) for n in (2, 9, 0, 16, 1, 5)]
    expected = [reference_losses(model, t, length, stride) for t in texts]
    measure = kwm.Perplexity(model, length, stride, batch_size=3, chunk_size=4)
    losses = measure.losses(iter(texts), verbose=0)
    means = [e.mean() if len(e) else np.nan for e in expected]
    np.testing.assert_allclose(losses, means, rtol=1e-5)
    total = np.exp(np.concatenate(expected).mean())
    assert measure(texts, verbose=0) == pytest.approx(total, rel=1e-5)


def plain(length=None):
    return token_net(VOCABULARY, 4, length)


def with_soft_cap():
    model = plain()
    capped = keras.ops.tanh(model.outputs[0] / 2.0) * 2.0
    return keras.Model(model.inputs[0], capped)


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.inner = plain()

    def call(self, tokens):
        return self.inner(tokens)


class Sharper(keras.Model):
    """Does more than its graph."""

    def call(self, tokens):
        return 9 * super().call(tokens)


def sharper():
    model = plain()
    return Sharper(model.inputs, model.outputs)


@pytest.mark.one_backend
@pytest.mark.parametrize(
    "make", [plain, lambda: plain(9), with_soft_cap, Subclassed, sharper]
)
def test_other_models(make):
    model = make()
    texts = [[1, 2, 3], [3, 1, 4, 1, 5, 9, 2, 6, 5]]
    expected = []
    for text in texts:
        padded = np.pad(text, (0, 9 - len(text)))
        rows = logits_of(model, padded)[: len(text) - 1]
        picked = rows[np.arange(len(rows)), text[1:]]
        expected.append((np.log(np.exp(rows).sum(-1)) - picked).mean())
    losses = kwm.Perplexity(model, chunk_size=2).losses(texts, verbose=0)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.mark.one_backend
def test_logits_of_few_positions_are_held(model):
    sizes = []
    embedding = model.backbone.token_embedding
    call = embedding.call

    def noting(inputs, reverse=False):
        if reverse:
            sizes.append(tuple(inputs.shape[:2]))
        return call(inputs, reverse=reverse)

    object.__setattr__(embedding, "call", noting)
    try:
        kwm.perplexity(model, TOKENS, batch_size=5, chunk_size=10, verbose=0)
    finally:
        object.__delattr__(embedding, "call")
    assert sizes
    assert all(rows * width <= 10 for rows, width in sizes)


@pytest.mark.one_backend
def test_windows_are_no_longer_than_positions_are_embedded():
    model = causal_lm("gpt2", vocabulary_size=VOCABULARY, max_sequence_length=6)
    text = np.random.default_rng(0).integers(0, VOCABULARY, 15)
    (loss,) = kwm.Perplexity(model).losses([text], verbose=0)
    expected = reference_losses(model, text, length=6).mean()
    assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.one_backend
def test_texts_and_windows_begin_with_the_start_token():
    def words(text):
        """A word of n letters is token n."""
        return [len(word) for word in text.split()]

    words.start_token_id = 1
    preprocessor = types.SimpleNamespace(tokenizer=words, add_start_token=True)
    model = plain()
    object.__setattr__(model, "preprocessor", preprocessor)

    def value(texts, length=1024):
        return kwm.perplexity(model, texts, length, verbose=0)

    texts = ["one three a", "", "two"]
    assert value(texts) == value([[1, 3, 5, 1], [1], [1, 3]])
    assert value(texts[0]) == value([[1, 3, 5, 1]])
    # Windows of three inputs; the second one's oldest gives way.
    parts = value([[1, 3, 5, 2], [1, 4, 6, 3]])
    assert value([[1, 3, 5, 2, 4, 6, 3]], 3) == pytest.approx(parts, 1e-5)
    # Without the start token at its begin a text is cut as it is.
    match = r"begins with the token 3, .* start token, 1"
    with pytest.warns(UserWarning, match=match):
        parts = value([[3, 5, 2, 4], [4, 6, 3]])
    with pytest.warns(UserWarning, match=match):
        whole = value([[3, 5, 2, 4, 6, 3]], 3)
    assert whole == pytest.approx(parts, 1e-5)
    preprocessor.add_start_token = False
    assert value(["one three a"]) == value([[3, 5, 1]])


@pytest.mark.parametrize("token", [-1, 10**9])
def test_tokens_outside_of_the_vocabulary_are_refused(model, token):
    with pytest.raises(ValueError, match=rf"token ids.*={token}"):
        kwm.perplexity(model, [[1, token, 2]], verbose=0)


@pytest.mark.one_backend
def test_what_is_refused(model, capsys):
    empty, single = np.zeros((0, 4), int), np.zeros((3, 1), int)
    for texts in (empty, single, np.zeros((2, 3)), 7, ["no preprocessor"]):
        with pytest.raises(ValueError, match=r"texts|preprocessor"):
            kwm.perplexity(model, texts)
    with pytest.raises(ValueError, match=r"`stride` must be an int .* <= 1024"):
        kwm.Perplexity(model, stride=2000)
    unbuilt = keras.Sequential([keras.layers.Dense(4)])
    image = keras.Input((4,), name="image")
    tokens = keras.Input((4,), name="token_ids")
    other = keras.Model({"image": image, "token_ids": tokens}, image + tokens)
    for model, match in (
        (unbuilt, r"a built `keras\.Model`"),
        (other, r"takes .'image'"),
    ):
        with pytest.raises(ValueError, match=match):
            kwm.perplexity(model, TOKENS)
    # No progress bar stands before the error.
    assert not capsys.readouterr().out
