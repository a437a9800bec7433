"""What shows progress, and when."""

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
def at_once(monkeypatch):
    monkeypatch.setattr(progress, "DELAY", 0.0)
    monkeypatch.setattr(progress, "_EVERY", {True: 0.01, False: 0.01})


def wait_for(text, capsys):
    """Return what is shown once it has the text, after ten seconds at most."""
    out, end = "", time.monotonic() + 10
    while text not in out and time.monotonic() < end:
        time.sleep(0.005)
        out += capsys.readouterr().out
    return out


def test_the_bar_shows_once_the_work_takes_long(capsys, at_once, monkeypatch):
    with Progress(3, "kernel") as bar:
        # No remaining time can be guessed yet.
        assert "first kernel: 0 s" in wait_for("first kernel: 0 s", capsys)
        bar.add()
        assert "1/3" in wait_for("1/3", capsys)
        bar.total = 4
    out = capsys.readouterr().out
    assert "4/4" in out
    assert "/kernel" in out
    with pytest.raises(KeyError), Progress(2, "kernel"):
        raise KeyError
    assert "2/2" not in capsys.readouterr().out
    with Progress(1, "kernel", verbose=0) as bar:
        bar.add()
    monkeypatch.setattr(progress, "DELAY", 60.0)
    with Progress(2, "kernel") as bar:
        bar.add()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_file_gets_few_lines(is_terminal, at_once, monkeypatch):
    drawn = []
    monkeypatch.setattr(progress, "_EVERY", {True: 0.01, False: 60.0})
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal, False)
    for cls in (Progress, Waiting):
        monkeypatch.setattr(cls, "_draw", lambda self, _: drawn.append(self))
    for shown in (Progress(1, "kernel"), Waiting("Compiling")):
        with shown:
            time.sleep(0.5)
        # The first, and the last.
        count = drawn.count(shown)
        assert count > 2 if is_terminal else count == 2


def test_the_thread_ends_with_a_bar_that_is_never_left(at_once):
    # Ctrl-C may come before the first line of `__exit__`.
    bar = Progress(1, "kernel").__enter__()
    thread = bar._thread
    del bar
    thread.join(10)
    assert not thread.is_alive()


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
def test_all_calls_show_it(call, unit, at_once, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call(verbose=0)
    assert unit not in capsys.readouterr().out
    call(verbose=1)
    assert unit in capsys.readouterr().out


@pytest.mark.parametrize("is_terminal", [False, True])
def test_what_cannot_be_counted_shows_the_seconds(
    is_terminal, at_once, monkeypatch, capsys
):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal, False)
    line = "Compiling: 0 s"
    twice = f"\r{line}\r{line}" if is_terminal else f"{line}\n{line}\n"
    with Waiting("Compiling"):
        out = wait_for(twice, capsys)
    assert twice in out
    out += capsys.readouterr().out
    # What is shown next begins on a line of its own.
    assert out.endswith(f"{line}\n")
    assert out.count("\n") == (1 if is_terminal else out.count(line))
    time.sleep(0.05)
    assert capsys.readouterr().out == ""


def test_waiting_is_quiet_where_it_is_short_or_asked_to_be(
    capsys, at_once, monkeypatch
):
    with Waiting("Compiling", verbose=0, since=0):
        time.sleep(0.02)
    keras.config.disable_interactive_logging()
    try:
        with Waiting("Compiling"):
            time.sleep(0.02)
    finally:
        keras.config.enable_interactive_logging()
    monkeypatch.setattr(progress, "DELAY", 60.0)
    threads = threading.active_count()
    with pytest.raises(KeyError), Waiting("Compiling"):
        raise KeyError
    assert threading.active_count() == threads
    assert capsys.readouterr().out == ""


def test_shows_at_once_what_has_taken_long_before(capsys):
    long_ago = time.perf_counter() - 2 * progress.DELAY
    with Progress(3, "step", since=long_ago):
        assert "first step: 0 s" in wait_for("first step: 0 s", capsys)
    with Waiting("Compiling", since=long_ago):
        # The seconds are its own.
        assert "Compiling: 0 s" in wait_for("Compiling", capsys)
