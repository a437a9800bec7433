"""What shows progress, and when."""

import io
import sys
import threading
import time

import keras
import pytest

import keras_weightmods as kwm
from keras_weightmods.utils import progress
from keras_weightmods.utils.progress import Progress, Waiting
from tests.models import mlp

pytestmark = pytest.mark.one_backend


@pytest.fixture
def clock(monkeypatch):
    class Timer:
        started, is_over = [], False

        def __init__(self, seconds, function):
            assert 1 < seconds <= 2
            self.fire = function

        def start(self):
            self.started.append(self)
            if self.is_over:
                self.fire()

        def cancel(self):
            pass

    monkeypatch.setattr(progress.threading, "Timer", Timer)
    return Timer


def test_the_bar_shows_once_the_work_takes_long(clock, capsys):
    with Progress(2, "kernel") as bar:
        bar.add()
        bar.add()
    # One that fires at the last moment.
    clock.started[0].fire()
    assert capsys.readouterr().out == ""
    with Progress(3, "kernel") as bar:
        bar.add()
        clock.started[1].fire()
        assert "1/3" in capsys.readouterr().out
        bar.total = 4
    out = capsys.readouterr().out
    assert "4/4" in out
    assert "/kernel" in out
    with Progress(1, "kernel", verbose=0) as bar:
        bar.add()
    assert len(clock.started) == 2


def fit_by_lift(verbose):
    x, model = keras.ops.ones((4, 8)), mlp()
    model.compile(kwm.SparseAdamW(0.1), "mse")
    callback = kwm.PrincipalMaskCallback(0.25, refresh_every=1, seed=0)
    model.fit(x, x[:, :4], epochs=2, callbacks=[callback], verbose=verbose)


def packing(verbose):
    shown, model = {"verbose": verbose}, mlp()
    kwm.SemiStructuredSparse.attach(model, **shown)
    kwm.assert_sparse(model, **shown)
    kwm.pack(model, "int8", **shown)
    kwm.save_model(model, "model.safetensors", **shown)
    kwm.load_model("model.safetensors", **shown)
    kwm.unpack(model, **shown)


def patches(verbose):
    model, path = mlp(), "patch.safetensors"
    base = [weight + 0.5 for weight in model.get_weights()]
    shown = {"verbose": verbose}
    for patch in (
        kwm.Patch.from_models(model, base, **shown),
        kwm.WeightSignature.extract(None, model, mlp(), depth=2, **shown),
    ):
        patch.save(path, **shown)
        kwm.Patch.load(path, **shown)
        patch.apply(model, force=True, **shown)
        patch.remove(model, **shown)


@pytest.mark.parametrize(
    ("call", "unit"),
    [
        (fit_by_lift, "s/mask"),
        (patches, "s/weight"),
        (packing, "s/kernel"),
        (lambda verbose: kwm.merge([mlp()], mlp(), verbose=verbose), "weight"),
        (lambda verbose: kwm.attach_scaling(mlp(), verbose=verbose), "kernel"),
    ],
)
def test_all_calls_show_it(call, unit, clock, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clock.is_over = True
    call(verbose=0)
    assert unit not in capsys.readouterr().out
    call(verbose=1)
    assert unit in capsys.readouterr().out


@pytest.fixture
def ticking(monkeypatch):
    monkeypatch.setattr(progress, "DELAY", 0.01)
    monkeypatch.setattr(progress, "_EVERY", {True: 0.01, False: 0.01})


@pytest.mark.parametrize("is_terminal", [False, True])
def test_what_cannot_be_counted_shows_the_seconds(
    is_terminal, ticking, monkeypatch
):
    shown = io.StringIO()
    shown.isatty = lambda: is_terminal
    monkeypatch.setattr(sys, "stdout", shown)
    line = "Compiling: 0 s"
    twice = f"\r{line}\r{line}" if is_terminal else f"{line}\n{line}\n"
    with Waiting("Compiling"):
        end = time.monotonic() + 10
        while twice not in shown.getvalue() and time.monotonic() < end:
            time.sleep(0.005)
    out = shown.getvalue()
    assert twice in out
    # What is shown next begins on a line of its own.
    assert out.endswith(f"{line}\n")
    assert out.count("\n") == (1 if is_terminal else out.count(line))
    time.sleep(0.05)
    assert shown.getvalue() == out


def test_waiting_is_quiet_where_it_is_short_or_asked_to_be(capsys, ticking):
    with Waiting("Compiling", verbose=0, since=0):
        time.sleep(0.05)
    progress.DELAY = 60
    threads = threading.active_count()
    with pytest.raises(KeyError), Waiting("Compiling"):
        raise KeyError
    assert threading.active_count() == threads
    assert capsys.readouterr().out == ""


def test_shows_at_once_what_has_taken_long_before(capsys):
    long_ago = time.perf_counter() - 2 * progress.DELAY
    with Progress(3, "step", since=long_ago):
        time.sleep(0.2)
    assert "0/3" in capsys.readouterr().out
    with Waiting("Compiling", since=long_ago):
        time.sleep(0.2)
    # The seconds are its own.
    assert "Compiling: 0 s" in capsys.readouterr().out
