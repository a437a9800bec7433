"""The step of `CAST` with the models split at their heads."""

import keras
import numpy as np
import pytest

import keras_weightmods as kwm
from keras_weightmods.core.watched import called_by
from keras_weightmods.ops import distillation
from tests import models, references
from tests.backends import breadth
from tests.models import numpy
from tests.sparsity.casts import cross_entropy

pytestmark = pytest.mark.filterwarnings("ignore:AdamS. this schedule")
one_backend = pytest.mark.one_backend
ROWS, LENGTH, CLASSES = 3, 5, 20


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Four positions in a chunk, of 15: the last is not a whole one."""
    monkeypatch.setattr(distillation, "CHUNK_BYTES", 4 * 4 * CLASSES)
    monkeypatch.setattr(distillation, "LEAST_POSITIONS", 1)


def capped():
    return models.causal_lm("gemma", final_logit_soft_cap=1.5)


def masked():
    return models.token_net(CLASSES, mask_zero=True)


tied = models.causal_lm


def make_batch(model, seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, CLASSES, (ROWS, LENGTH), dtype="int32")
    ids[1, 3:] = 0
    x = {"token_ids": ids, "padding_mask": np.int32(ids != 0)}
    weight = rng.uniform(size=ids.shape).astype("float32") * (ids != 0)
    y = rng.integers(CLASSES, size=ids.shape)
    return x if hasattr(model, "backbone") else ids, y, weight


def compiled(make, **kwargs):
    model = models.randomize(make())
    cast = kwm.CAST(model, **kwargs)
    rng = np.random.default_rng(1)
    for variable in model.trainable_variables:
        variable.assign_add(rng.normal(size=variable.shape) * 0.2)
    # The first moment is then the gradient.
    optimizer = kwm.AdamS(0.0, beta_1=0.0, l1=1e-9, total_steps=99)
    cast.compile(optimizer, cross_entropy())
    assert cast._heads is not None
    return cast


def step(cast, x, y, weight, split=True):
    own = cast._heads
    cast._heads = own if split else None
    cast.train_function = None
    options = {"batch_size": len(y), "verbose": 0, "sample_weight": weight}
    logs = cast.fit(x, y, **options).history
    cast._heads = own
    return logs, [numpy(s["momentum"]) for s in cast.adam_s._states]


def assert_split_is_whole(cast, batch, rtol=1e-4):
    (logs, slopes), (whole_logs, whole) = (
        step(cast, *batch, split=split) for split in (True, False)
    )
    assert logs.keys() == whole_logs.keys()
    for name, values in whole_logs.items():
        np.testing.assert_allclose(logs[name], values, rtol=rtol)
    for slope, expected in zip(slopes, whole, strict=True):
        tolerance = rtol * np.abs(expected).max()
        np.testing.assert_allclose(slope, expected, rtol, tolerance)
    assert any(np.abs(slope).max() > 0 for slope in slopes)


CASES = [
    (masked, {"distillation_weight": 0.6}),
    (tied, {}),
    (capped, {"distillation_weight": 1.0}),
    (capped, {"temperature": 2.0}),
    (
        lambda: tied(tie_word_embeddings=False),
        {"distillation_weight": 0.0},
    ),
    (masked, {"teacher": None}),
]


@breadth(("make", "options"), CASES)
def test_a_split_step_is_a_whole_step(make, options):
    cast = compiled(make, **options)
    assert_split_is_whole(cast, make_batch(cast.student))


@one_backend
@pytest.mark.parametrize("weight", [None, np.float32([[1], [0], [3]])])
def test_another_model_as_teacher_and_weights_of_other_shapes(weight):
    teacher = models.randomize(models.causal_lm(hidden_dim=8), seed=7)
    before = models.weights_of(teacher)
    cast = compiled(tied, teacher=teacher)
    x, y, _ = make_batch(cast.student)
    assert_split_is_whole(cast, (x, y[..., None], weight))
    models.assert_same(models.weights_of(teacher), before)


@one_backend
def test_the_losses_in_float64():
    cast = compiled(tied, distillation_weight=0.25, temperature=2.0)
    x, y, weight = make_batch(cast.student)
    logits, taught = (
        numpy(model(x)).reshape(-1, CLASSES)
        for model in (cast.student, cast.teacher)
    )
    expected, _ = references.distillation(
        logits, taught, y.ravel(), weight.ravel() / y.size, 0.25, 2.0
    )
    names = ("loss", "student_loss", "distillation_loss")
    logs, _ = step(cast, x, y, weight)
    found = [logs[name][0] for name in names]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    options = {"sample_weight": weight, "batch_size": ROWS, "verbose": 0}
    found = cast.evaluate(x, y, return_dict=True, **options)
    found = [found[name] for name in names]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@one_backend
def test_mixed_precision():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        cast = compiled(tied, teacher_dtype="bfloat16")
    finally:
        keras.config.set_dtype_policy("float32")
    assert_split_is_whole(cast, make_batch(cast.student), rtol=0.05)


@one_backend
def test_no_more_than_a_chunk_of_logits():
    cast = compiled(tied)
    embedding = cast.student.backbone.token_embedding
    sizes = []

    def call(plain, x, reverse=False, **kwargs):
        if reverse:
            sizes.append(x.shape[0] * (x.shape[1] or 0))
        return plain(x, reverse=reverse, **kwargs)

    cast.fit(*make_batch(cast.student)[:2], batch_size=ROWS, verbose=0)
    cast.train_function = None
    with called_by(embedding, call):
        cast.fit(*make_batch(cast.student)[:2], batch_size=ROWS, verbose=0)
    assert sizes
    assert max(sizes) <= 4


@one_backend
def test_batches_of_two_sizes_and_predictions():
    cast = compiled(masked)
    x, y, weight = make_batch(cast.student)
    cast.fit(x, y, batch_size=2, sample_weight=weight, verbose=0)
    assert cast.predict(x, verbose=0).shape == (ROWS, LENGTH, CLASSES)
    assert cast(x).shape == (ROWS, LENGTH, CLASSES)


def head_of(**options):
    inner = keras.layers.Embedding(CLASSES, 8)
    head = keras.layers.Dense(CLASSES, **options)
    return lambda: models.sequential((None,), inner, head, dtype="int32")


def subclassed():
    model = models.Subclassed()
    model(models.normal(1, 8))
    return model


@one_backend
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (masked, {"metrics": ["accuracy"]}),
        (masked, {"weighted_metrics": ["accuracy"]}),
        (masked, {"loss_weights": 0.5}),
        (masked, {"loss": "sparse_categorical_crossentropy"}),
        (masked, {"loss": {"reduction": "sum"}}),
        (masked, {"loss": {"ignore_class": 0}}),
        (masked, {"loss": {"from_logits": False}}),
        (models.mlp, {}),
        (subclassed, {}),
        (head_of(activity_regularizer="l2"), {}),
        (head_of(dtype="mixed_float16"), {}),
    ],
)
def test_what_is_not_split(make, options):
    cast = kwm.CAST(make())
    loss = options.get("loss", {})
    if isinstance(loss, dict):
        kind = keras.losses.SparseCategoricalCrossentropy
        loss = kind(**{"from_logits": True, **loss})
    cast.compile(**{**options, "loss": loss})
    assert cast._heads is None
    if "metrics" in options:
        x, y, _ = make_batch(cast.student)
        logs = cast.fit(x, y, batch_size=ROWS, verbose=0).history
        assert "accuracy" in logs
