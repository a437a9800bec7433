import warnings

import pytest

import keras_weightmods as kwm
from keras_weightmods.sparsity import cast_run
from tests.models import assert_same, weights_of
from tests.sparsity import casts
from tests.sparsity.casts import compiled, fit, make_data, started

# Most runs here are too short for the published pull, and say so.
pytestmark = pytest.mark.filterwarnings("ignore:AdamS. this schedule")

EARLY = "CAST: this cuts"


@pytest.mark.one_backend
def test_a_fit_beyond_the_plan_is_warned_about(recwarn):
    x, y = make_data()
    cast = compiled()
    started(cast, x, y, epochs=3, batch_size=4)
    fit(cast, (x[:4], y[:4]), initial_epoch=11, epochs=12)
    fit(cast, epochs=2)
    assert cast.adam_s.total_steps == 12
    assert not [w for w in recwarn if "CAST" in str(w.message)]
    with pytest.warns(UserWarning, match="goes to step 13, beyond the 12"):
        fit(cast)
    before = weights_of(cast.student)
    with pytest.warns(UserWarning, match="the run of 12 steps .* is over"):
        fit(cast)
    assert_same(weights_of(cast.student), before)


@pytest.mark.one_backend
def test_an_early_stop_is_warned_about():
    cast = compiled()
    # Of 8 epochs.
    fit(cast, epochs=8, callbacks=[casts.Stop(after=1)])
    steps = int(cast.optimizer.iterations)
    assert steps == 8
    with pytest.warns(UserWarning, match=EARLY) as caught:
        cast.finalize()
    text = str(next(w for w in caught if EARLY in str(w.message)).message)
    assert "after 8 of 32 steps" in text
    assert "initial_epoch" in text
    # The whole run cuts nothing.
    cast = compiled()
    fit(cast, epochs=8)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", EARLY)
        cast.finalize()


@pytest.mark.one_backend
def test_finalize_says_once_that_a_fit_loses_the_pattern():
    cast_run.say_that_a_fit_loses_the_pattern.cache_clear()
    for times in (1, 0):
        cast = compiled()
        fit(cast)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = cast.finalize()
        found = [w for w in caught if "frozen=True" in str(w.message)]
        assert len(found) == times
        assert all(w.filename == __file__ for w in found)
    # What it says to do keeps the pattern.
    kwm.SemiStructuredSparse.attach(model, "2:4", frozen=True)
    model.compile("adam", casts.cross_entropy())
    model.fit(*casts.make_data(), verbose=0)
    kwm.assert_sparse(model, "2:4")
