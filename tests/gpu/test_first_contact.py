"""cuSPARSELt on a card that is new to it, by fakes that may be wrong."""

import warnings

import keras
import numpy as np
import pytest

import keras_weightmods as kwm
from keras_weightmods.native.gpu import dispatch, first_contact
from keras_weightmods.native.gpu.dispatch import Measured, Plan
from keras_weightmods.native.gpu.first_contact import Trial, trusted
from keras_weightmods.native.packed import pack_kernel, unpack_kernel
from tests.gpu.cards import CARD
from tests.gpu.kernels import error, sparse_kernel
from tests.models import make_sparse, mlp, normal, numpy

BACKEND = keras.backend.backend()
K, N = 64, 32
SHAPE = K, N
PLAN = Plan(
    (
        Measured(15, {"dense": 1.0}),
        Measured(40, {"dense": 2.0, "cusparselt": 1.0}, 3),
    ),
    "published",
    is_published=True,
)


@pytest.fixture(autouse=True)
def unwarned(monkeypatch):
    monkeypatch.setattr(first_contact, "_warned", [])


def right(trial):
    kernel = trial.steps[:, trial.columns] * trial.scale
    y = trial.x @ kernel
    return y.astype("bfloat16"), y


def try_plan(multiply, plan=PLAN, reason=""):
    return trusted(plan, CARD, SHAPE, "bfloat16", lambda: reason, multiply)


@pytest.mark.one_backend
def test_a_trial_is_exact_and_2_to_4():
    trial = Trial.of(48, (72, 33), 3)
    assert trial.x.shape == (48, 72)
    assert set(np.unique(trial.x)) == {-1, 0, 1}
    assert np.abs(trial.x).max(axis=1).min() == 1
    kernel = trial.steps[:, trial.columns] * trial.scale
    assert kernel.shape == (72, 33)
    pack_kernel(kernel)
    assert np.count_nonzero(trial.steps) == 256 * 36
    # Different columns, or swapped ones were not seen.
    assert len(np.unique(kernel, axis=1).T) == 33
    assert trial.algorithm == 3


@pytest.mark.one_backend
def test_a_right_product_is_trusted():
    asked = []

    def multiply(trial):
        asked.append((trial.x.shape, trial.algorithm))
        return right(trial)

    assert try_plan(multiply) is PLAN
    # As many rows as use it, and its algorithm; never more than 512.
    assert asked == [((32, K), 3)]
    many = Plan((Measured(4096, {"dense": 2.0, "cusparselt": 1.0}),))
    assert try_plan(multiply, many) is many
    assert asked[1] == ((512, K), -1)


def off_by(place, value):
    def multiply(trial):
        y, expected = right(trial)
        y[place] = value
        return y, expected

    return multiply


def failing(trial):
    raise RuntimeError("illegal instruction")


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("multiply", "message"),
    [
        (off_by((7, 3), 1e4), r"1 of 1024 .* at \(7, 3\) it is 9984 in the"),
        (off_by((slice(None), 5), np.nan), "32 of 1024 .* it is nan in the"),
        (lambda t: (right(t)[0][:, ::-1], right(t)[1]), "of 1024 entries"),
        (lambda t: (right(t)[0][1:], right(t)[1]), r"its shape is \(31, 32\)"),
        (failing, "RuntimeError: illegal instruction"),
    ],
)
def test_a_wrong_product_is_dropped(multiply, message):
    with pytest.warns(UserWarning, match=message) as caught:
        plan = try_plan(multiply)
    text = str(caught[0].message)
    for part in (CARD, "32 rows of bfloat16", str(SHAPE)):
        assert part in text
    assert dispatch.TABLE_VARIABLE in text
    assert plan.companions == ("dense",)
    assert not plan.is_sparse
    # Not even where the companion is there already.
    assert plan.choose(32, ("cusparselt",)) == ("dense", -1)
    assert "without cusparselt: tried with 32 rows" in plan.why(32)


@pytest.mark.one_backend
def test_what_is_missing_is_not_tried():
    with pytest.warns(UserWarning, match="multiplied by dense kernels"):
        plan = try_plan(failing, reason="cuSPARSELt was not found.")
    assert plan.companions == ("dense",)
    dense = Plan((Measured(8, {"dense": 1.0, "cusparselt": 2.0}),))
    assert try_plan(failing, dense) is dense


@pytest.mark.one_backend
def test_published_figures_are_warned_of_once():
    about = CARD, SHAPE, 512, "bfloat16"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        first_contact.warn_published(Plan(PLAN.measured), *about)
    with pytest.warns(UserWarning, match="have not been run on a") as caught:
        first_contact.warn_published(PLAN, *about)
    text = str(caught[0].message)
    for part in (CARD, str(SHAPE), "512 rows", "make gpu", "to 'dense'"):
        assert part in text
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        first_contact.warn_published(PLAN, *about)


def packed_model():
    model = make_sparse(mlp(K, N, dtype="mixed_bfloat16"))
    x = normal(32, K)
    expected = numpy(model(x)).astype("float64")
    return model, x, expected


def names_of(model):
    return [v.name for v in model.layers[0].variables]


def test_layer_on_a_new_card(card):
    model, x, expected = packed_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        kwm.pack(model)
    if BACKEND == "jax":
        assert "kernel_companion_cusparselt" in names_of(model)
    with pytest.warns(UserWarning, match="have not been run") as caught:
        y = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(x[:16])
    assert [w.category for w in caught].count(UserWarning) == 1
    assert error(y, expected) <= 1e-2


@pytest.mark.parametrize("how", [1, 2])
def test_layer_where_the_library_is_wrong(card, how):
    model, x, expected = packed_model()
    card.fake_break(how)
    message = "entries are off" if how == 1 else "error of fake cuSPARSELt"
    with pytest.warns(UserWarning, match=message) as caught:
        kwm.pack(model)
    assert [w.category for w in caught].count(UserWarning) == 1
    assert "kernel_companion_cusparselt" not in names_of(model)
    assert error(model(x), expected) <= 1e-2
    assert error(model.predict(x, verbose=0), expected) <= 1e-2


@pytest.mark.skipif(BACKEND != "jax", reason="JAX alone")
@pytest.mark.parametrize("how", [0, 1])
def test_first_call_is_traced(card, how):
    import jax

    from keras_weightmods.backend.jax import sparse_matmul_gpu as products

    packed = pack_kernel(sparse_kernel(K, N))
    prepared = products.prepare(packed, "bfloat16", ["cusparselt"])
    card.fake_break(how)
    x = jax.numpy.asarray(normal(32, K), "bfloat16")
    with pytest.warns(UserWarning, match="off by" if how else "not been run"):
        y = jax.jit(lambda x: products.matmul(x, prepared))(x)
    expected = numpy(x).astype("float64") @ unpack_kernel(packed)
    assert error(y, expected) <= 1e-2
