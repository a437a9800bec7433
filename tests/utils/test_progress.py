"""What shows progress, and when."""

import keras
import pytest

import keras_weightmods as kwm
from keras_weightmods.utils import progress
from keras_weightmods.utils.progress import Progress
from tests.models import mlp

pytestmark = pytest.mark.one_backend


@pytest.fixture
def clock(monkeypatch):
    """Holds the timers that were started; `fire` is called when they end."""

    class Timer:
        started = []

        def __init__(self, seconds, function):
            assert seconds == 2
            self.fire = function

        def start(self):
            self.started.append(self)
            if self.is_over:
                self.fire()

        def cancel(self):
            pass

        is_over = False

    monkeypatch.setattr(progress.threading, "Timer", Timer)
    return Timer


def test_short_work_shows_nothing(clock, capsys):
    with Progress(2, "kernel") as bar:
        bar.add()
        bar.add()
    # One that fires at the last moment.
    clock.started[0].fire()
    assert capsys.readouterr().out == ""


def test_a_long_step_shows_the_bar_before_its_end(clock, capsys):
    with Progress(3, "kernel") as bar:
        bar.add()
        clock.started[0].fire()
        assert "1/3" in capsys.readouterr().out
        bar.total = 4
    out = capsys.readouterr().out
    assert "4/4" in out
    assert "/kernel" in out


def test_quiet_and_errors(clock, capsys):
    with Progress(1, "kernel", verbose=0) as bar:
        bar.add()
    assert not clock.started
    with pytest.raises(KeyError), Progress(2, "kernel"):
        clock.started[0].fire()
        raise KeyError
    assert "2/2" not in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:.*exported in dense form")
def test_long_calls_show_it(clock, capsys, tmp_path):
    clock.is_over = True
    model = mlp()
    kwm.SemiStructuredSparse.attach(model)
    path = tmp_path / "model.safetensors"

    def shown(call, *args, **kwargs):
        call(*args, **kwargs, verbose=0)
        assert capsys.readouterr().out == ""
        call(*args, **kwargs)
        return capsys.readouterr().out

    def packed(**kwargs):
        model = mlp()
        kwm.SemiStructuredSparse.attach(model)
        return kwm.pack(model, "int8", **kwargs)

    assert "2/2" in shown(packed)
    assert "4/4" in shown(kwm.save_model, model, path)
    # The description and four weights, checked and then read.
    assert "10/10" in shown(kwm.load_model, path)
    kwm.pack(model, "int8", verbose=0)
    out = shown(kwm.export, model, tmp_path / "model.pt2", "torch")
    assert "3/3" in out
    kwm.unpack(model)
    assert "2/2" in capsys.readouterr().out


def test_a_refresh_of_masks_shows_it(clock, capsys):
    clock.is_over = True
    x = keras.ops.ones((4, 8))
    for verbose in (0, 2):
        model = mlp()
        model.compile(kwm.SparseAdamW(0.1), "mse")
        callback = kwm.PrincipalMaskCallback(0.25, refresh_every=1, seed=0)
        fit = {"epochs": 2, "callbacks": [callback], "verbose": verbose}
        model.fit(x, x[:, :4], **fit)
        assert ("s/mask" in capsys.readouterr().out) is bool(verbose)
