import _thread
import concurrent.futures
import dataclasses
import gc
import itertools
import signal
import sys
import threading
import time
import weakref

import keras
import numpy as np
import pytest

import keras_weightmods as kwm
from keras_weightmods import Patch, WeightSignature, backend
from keras_weightmods.patches import ledger, tensors
from keras_weightmods.patches.checkpoint import Checkpoint
from tests.backends import breadth
from tests.models import (
    CONV,
    CONV_B,
    STATISTICS,
    assert_same_bits,
    conv_net,
    make_signature,
    mlp,
    random_weights,
    sequential,
    weights_of,
)
from tests.patches import references

DTYPES = ("bfloat16", "float32", "float16")
STAGES = ("computing", "waiting", "assigning")


@pytest.fixture(scope="module")
def models():
    """A model of each dtype, which the tests leave as they found it."""
    return {dtype: conv_net(dtype=dtype) for dtype in DTYPES}


@pytest.fixture(scope="module")
def signatures(models):
    """Signatures of different depths, kinds and precisions."""
    model = models["float32"]
    first, second, third = (
        make_signature(model, seed, depth=depth)
        for seed, depth in ((1, 1), (2, 2), (3, 3))
    )
    fourth = make_signature(model, 4, statistics="average", depth=2)
    return [first, second, third.quantize(4), fourth]


def awkward_weights(model, seed):
    """Values of all magnitudes, zeros of both signs, the smallest numbers."""
    weights = random_weights(model, seed)
    rng = np.random.default_rng(seed)
    for place in sorted(set(range(len(weights))) - set(STATISTICS)):
        w = weights[place].astype("float64")
        w *= 10.0 ** rng.integers(-9, 2, size=w.shape)
        w.reshape(-1)[:2] = [-0.0, 6e-8][: w.size]
        weights[place] = w.astype(weights[place].dtype)
    return weights


def test_what_is_on_a_model(models, signatures):
    model = models["float32"]
    a, b, c, _ = signatures
    before = weights_of(model)

    def nbytes(signature):
        return sum(before[entry.position].nbytes for entry in signature)

    report = a.apply(model)
    assert (report.action, report.active) == ("add", {"patch_1": 1.0})
    name = model.layers[0].name
    assert report.changed[:2] == (f"0:{name}/kernel", f"1:{name}/bias")
    assert len(report.changed) == len(a)
    assert report.clean_nbytes == nbytes(a)
    # One memory for a tensor, however many patches.
    assert b.apply(model, 0.5).clean_nbytes == nbytes(b)
    assert Patch.on(model) == {"patch_1": (a, 1.0), "patch_2": (b, 0.5)}
    for call, action in (
        (lambda: b.apply(model, 0.7), "rescale"),
        (lambda: b.remove(model), "remove"),
    ):
        report = call()
        about = report.action, report.name, report.scale
        assert about == (action, "patch_2", 0.7)
    assert "patch_1 x 1, patch_2 x 1" in str(c.apply(model))
    report = Patch.clear(model)
    assert (report.action, report.active) == ("clear", {})
    named = make_signature(model, name="noise")
    named.apply(model)
    make_signature(model, 2, name="noise").apply(model)
    assert [*Patch.on(model)] == ["noise", "noise_1"]
    # Equal by content, as after loading the file again.
    named.truncate(9).remove(model)
    Patch.clear(model)
    assert_same_bits(weights_of(model), before)


@pytest.mark.one_backend
def test_a_block_with_a_patch(models, signatures):
    model = models["float32"]
    a, b, *_ = signatures
    before = weights_of(model)
    with a.applied(model), b.applied(model, 0.5) as report:
        assert report.active == {"patch_1": 1.0, "patch_2": 0.5}
    assert_same_bits(weights_of(model), before)
    with pytest.raises(RuntimeError, match="inside"), a.applied(model):
        raise RuntimeError("inside")
    assert_same_bits(weights_of(model), before)
    # What cannot be taken off does not mask the error.
    with pytest.raises(KeyboardInterrupt) as error, a.applied(model):
        model.weights[CONV].assign(model.weights[CONV] * 2)
        raise KeyboardInterrupt
    (note,) = error.value.__notes__
    assert "still on the model. Weights were changed since" in note
    assert [*Patch.on(model)] == ["patch_1"]
    Patch.clear(model, force=True)
    model.set_weights(before)


@pytest.mark.one_backend
def test_subtracting_from_a_model_that_was_saved(models, signatures):
    """Without books, a patch is subtracted, and statistics solved for."""
    model = models["float32"]
    before = random_weights(model, 4)
    for patch in signatures[2:]:
        model.set_weights(patch.apply(before, 1.5))
        assert len(patch.subtract(model, 1.5).subtracted) == len(patch)
        for a, b in zip(weights_of(model), before):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    now = weights_of(model)
    half = signatures[3]
    with pytest.raises(ValueError, match=r"not known .* 4 prob"):
        half.subtract(model, 2)
    half.apply(model)
    with pytest.raises(ValueError, match="must be taken off first"):
        half.subtract(model)
    half.remove(model)
    assert_same_bits(weights_of(model), now)


def test_a_patch_that_cannot_be_subtracted_stays():
    model = sequential((4,), keras.layers.Dense(2, use_bias=False))
    kernel = np.full((4, 2), 2e38, "float32")
    patch = WeightSignature.extract(
        None, [-kernel / 2], [kernel / 2], like=model
    )
    model.set_weights([-kernel / 2])
    patch.apply(model)
    trained = [-kernel]
    model.set_weights(trained)
    with pytest.raises(ValueError, match="the result is not finite"):
        patch.remove(model, force=True)
    assert_same_bits(weights_of(model), trained)
    assert Patch.on(model)


def test_training_in_between_is_found():
    """What force then does is in `test_weights_changed_since`."""
    model = conv_net()
    model.set_weights(random_weights(model, 0))
    model.get_layer(index=2).trainable = False  # conv_b and its bias
    a, b = (
        make_signature(model, seed, statistics="average") for seed in (1, 2)
    )
    a.apply(model, 0.5)
    b.apply(model)
    model.compile("sgd", "mse")
    x = np.random.default_rng(0).normal(size=(8, 6, 6, 1))
    model.fit(x, np.ones((8, 3)), verbose=0)
    trained = weights_of(model)
    # Also where a patch is put on again at the scale that it has.
    for call in (a.remove, b.apply):
        with pytest.raises(ValueError, match=r"clear\(model, force=T") as error:
            call(model)
        assert f"  {CONV}:" in str(error.value)
        assert f"  {CONV_B}:" not in str(error.value)
        assert_same_bits(weights_of(model), trained)
    report = a.remove(model, force=True)
    # A bias in front of a normalization has no gradient.
    assert {0, 2, 3, 8, 9}.issubset(positions(report.subtracted))
    assert CONV_B in positions(report.changed)
    assert positions(s.path for s in report.skipped) == list(STATISTICS)
    assert "subtracted" in str(report)
    now = weights_of(model)
    assert_same_bits(
        [now[i] for i in STATISTICS], [trained[i] for i in STATISTICS]
    )
    # With `a` gone the books are right again.
    b.remove(model)


def positions(keys):
    return [int(key.split(":")[0]) for key in keys]


@pytest.mark.one_backend
def test_wrong_use(models, signatures):
    model = models["float32"]
    before = weights_of(model)
    first, signature, *_ = signatures
    signature.apply(model)
    patched = weights_of(model)
    adapted = conv_net()
    signature.apply(adapted)
    adapted.get_layer(index=5).enable_lora(2)
    # Names, another order, a missing layer: all at once.
    layers = [keras.layers.Conv2D(2, 3, name="stem"), *conv_net().layers[1:-1]]
    stem = sequential((6, 6, 1), *layers, keras.layers.Dense(3, name="head"))
    for call, message in (
        (lambda: first.apply(model, 1e39), "not finite in float32"),
        (lambda: signature.apply(model, 1e39), "not finite in float32"),
        (lambda: first.remove(model), "must be on this model object"),
        (lambda: signature.apply(mlp()), "another architecture"),
        (lambda: signature.remove(adapted), "does not fit the model"),
        (lambda: signature.apply(stem), r"4 problems[\s\S]*stem/kernel"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
        assert_same_bits(weights_of(model), patched)
        assert Patch.on(model) == {"patch_1": (signature, 1.0)}
    Patch.clear(model)
    assert_same_bits(weights_of(model), before)


@breadth("dtype", DTYPES)
def test_pieces_give_the_same_bits(models, signatures, dtype, monkeypatch):
    model = models[dtype]
    model.set_weights(awkward_weights(model, 2))
    before = weights_of(model)

    def apply_all():
        for scale, signature in zip((1.0, 0.3, 1.0, 0.7), signatures):
            signature.apply(model, scale)

    apply_all()
    patched = weights_of(model)
    Patch.clear(model)
    # And so does memory that NumPy cannot see, as of a GPU.
    for owner, name, value in (
        (tensors, "_PIECE", 3),
        (backend.current(), "view_of", lambda tensor: None),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            apply_all()
            assert_same_bits(weights_of(model), patched)
            Patch.clear(model)
            assert_same_bits(weights_of(model), before)


@breadth("dtype", DTYPES)
def test_a_problem_at_the_very_end_leaves_the_model(
    models, signatures, dtype, monkeypatch
):
    monkeypatch.setattr(tensors, "_PIECE", 3)
    model = models[dtype]
    model.set_weights(awkward_weights(model, 3))
    clean = weights_of(model)
    signatures[0].apply(model)
    before = weights_of(model)
    entries = list(signatures[1])
    for broken, count in ((entries[-1:], "1 problem:"), (entries, "8 probl")):
        changed = []
        for entry in entries:
            tensor = np.array(entry.tensor)
            if entry in broken:
                tensor.reshape(-1)[-1] = 3e38
            changed.append(dataclasses.replace(entry, tensor=tensor))
        signature = signatures[1].with_entries(changed)
        with pytest.raises(ValueError, match="is not finite in") as error:
            signature.apply(model, scale=10.0)
        for part in (count, f"  {entries[-1].position}:"):
            assert part in str(error.value)
        assert_same_bits(weights_of(model), before)
        assert [*Patch.on(model)] == ["patch_1"]
    # What is there may have any bits.
    Patch.clear(model)
    wrong = model.weights[-1]
    wrong.assign(np.full(wrong.shape, np.nan))
    before = weights_of(model)
    with pytest.raises(ValueError, match="values that are not finite"):
        make_signature(model, targets="").apply(model)
    assert_same_bits(weights_of(model), before)
    model.set_weights(clean)


@breadth(
    ("stage", "action"),
    [*itertools.product(STAGES, ("add", "rescale", "remove"))],
    *(0, 4, 8),
)
def test_an_error_while_writing_leaves_the_model(
    models, signatures, stage, action, monkeypatch, request
):
    model = models["float32"]
    clean = weights_of(model)
    _, first, second, third = signatures
    first.apply(model)
    second.apply(model)
    before, on_model = weights_of(model), Patch.on(model)
    call = {
        "add": lambda: third.apply(model),
        "rescale": lambda: second.apply(model, 0.5),
        "remove": lambda: second.remove(model),
    }[action]
    owner, name = tensors, "is_finite"
    if stage == "assigning":
        owner, name = Checkpoint, "assign"
        # So it is on torch if the memory is that of a GPU.
        monkeypatch.setattr(Checkpoint, "memory", lambda *_: None)
    function, calls = getattr(owner, name), itertools.count(1)

    def failing(*args):
        if next(calls) == 8:
            monkeypatch.undo()
            if stage != "waiting":
                raise KeyboardInterrupt
            # What Ctrl-C does while threads compute.
            _thread.interrupt_main()
            time.sleep(0.5)
        return function(*args)

    monkeypatch.setattr(owner, name, failing)
    # A process in the background may have been told to ignore it.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, handler))
    with pytest.raises(KeyboardInterrupt):
        call()
    assert_same_bits(weights_of(model), before)
    assert Patch.on(model) == on_model
    call()
    Patch.clear(model)
    assert_same_bits(weights_of(model), clean)


def last_steps(call, stop=None):
    """Return {line of the ledger: step in which it runs last} of a call.

    Ctrl-C comes before the step `stop`.
    """
    steps, found = itertools.count(), {}

    def trace(frame, event, _):
        if frame.f_code.co_filename != ledger.__file__:
            return None
        if event == "line":
            found[frame.f_lineno] = next(steps)
            if found[frame.f_lineno] == stop:
                raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(None)
    return found


@breadth(
    ("action", "scale"),
    list(itertools.product(("remove", "add", "rescale", "clear"), (0.5, None))),
)
def test_an_interrupt_leaves_either_state(signatures, action, scale):
    model = conv_net(dtype="float32")
    clean = weights_of(model)
    signature, *_ = signatures
    model.set_weights([w + (w > 0) for w in clean])
    patch = Patch.from_models(model, clean)
    model.set_weights(clean)
    calls = {
        "add": lambda: patch.apply(model),
        "rescale": lambda: patch.apply(model, 0.5),
        "remove": lambda: patch.remove(model),
        "clear": lambda: Patch.clear(model),
    }

    def state():
        bits = [w.tobytes() for w in weights_of(model)]
        return bits, Patch.on(model)

    def prepare():
        Patch.clear(model)
        assert_same_bits(weights_of(model), clean)
        if scale:
            signature.apply(model, scale)
        if action != "add":
            patch.apply(model)
        return state()

    before = prepare()
    steps = last_steps(calls[action])
    after = state()
    assert len(steps) > 30
    for step in steps.values():
        assert prepare() == before
        with pytest.raises(KeyboardInterrupt):
            last_steps(calls[action], step)
        assert state() in (before, after)
    Patch.clear(model)
    assert_same_bits(weights_of(model), clean)


@pytest.mark.one_backend
def test_a_thread_that_is_not_in_its_pool_yet_is_waited_for(
    models, signatures, monkeypatch
):
    """Ctrl-C comes while a pool waits for the start of its first thread."""
    model = models["float32"]
    before = weights_of(model)
    start, pieces = threading.Thread.start, tensors.rebuilt_pieces
    memory, seen = Checkpoint.memory, []

    def started(thread):
        start(thread)
        if seen and seen.pop():
            raise KeyboardInterrupt

    def slow(*args):
        time.sleep(0.2)
        yield from pieces(*args)

    def writes(self, position):
        seen[:] = [True]
        return memory(self, position)

    monkeypatch.setattr(threading.Thread, "start", started)
    monkeypatch.setattr(tensors, "rebuilt_pieces", slow)
    monkeypatch.setattr(Checkpoint, "memory", writes)
    with pytest.raises(KeyboardInterrupt):
        signatures[0].apply(model)
    monkeypatch.undo()
    assert_same_bits(weights_of(model), before)
    time.sleep(0.5)
    assert_same_bits(weights_of(model), before)


def test_threads_change_a_model_one_after_the_other():
    model = sequential((16,), keras.layers.Dense(8), keras.layers.Dense(4))
    clean = weights_of(model)
    changes = [make_signature(model, seed) for seed in range(4)]

    def work(change):
        for _ in range(8):
            change.apply(model, 0.5)
            change.apply(model, 0.7)
            change.remove(model)

    with concurrent.futures.ThreadPoolExecutor(len(changes)) as pool:
        for done in [pool.submit(work, change) for change in changes]:
            done.result()
    assert not Patch.on(model)
    assert_same_bits(weights_of(model), clean)


@pytest.mark.one_backend
def test_the_books_do_not_keep_models_alive(signatures):
    model = conv_net()
    signatures[0].apply(model)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


class Block(keras.layers.Layer):
    def __init__(self):
        super().__init__()
        self.inner = keras.layers.Dense(3, name="inner")
        self.inner.build((None, 3))

    def call(self, x):
        return self.inner(x)


@pytest.mark.one_backend
def test_equal_paths_are_told_apart_by_their_place():
    model = sequential((3,), Block(), Block(), Block())
    assert len({v.path for v in model.weights}) < len(model.weights)
    clean, robust = (random_weights(model, seed) for seed in range(2))
    model.set_weights(clean)
    WeightSignature.extract(None, model, robust, targets=model.layers[1]).apply(
        model
    )
    now = weights_of(model)
    np.testing.assert_allclose(now[2], robust[2], rtol=1e-5, atol=1e-6)
    assert_same_bits([now[0], now[4]], [clean[0], clean[4]])


@pytest.mark.one_backend
@pytest.mark.parametrize("kind", ["delta", "signature"])
def test_a_patch_of_companded_weights_is_for_these(kind, tmp_path):
    """What fixed companders store looks like weights, and is not."""

    def make(base, tuned):
        if kind == "delta":
            return Patch.from_models(tuned, base, dtype=None)
        return WeightSignature.extract(None, base, tuned, depth=2)

    plain, companded, other, tuned = mlp(), mlp(), mlp(), mlp()
    kwm.attach_compander(companded)
    kwm.attach_compander(tuned)
    kwm.attach_compander(other, a=0.7)
    stored, before = weights_of(companded), weights_of(plain)
    tuned.set_weights([w + 0.1 for w in stored])
    for pair in ((companded, plain), (plain, companded), (companded, other)):
        with pytest.raises(ValueError, match=r"2 problems[\s\S]*compander \("):
            make(*pair)
    make(companded, tuned).save(tmp_path / "a.safetensors")
    patch = Patch.load(tmp_path / "a.safetensors")
    with patch.applied(companded):
        for got, expected in zip(weights_of(companded), weights_of(tuned)):
            np.testing.assert_allclose(got, expected, atol=1e-6)
    assert_same_bits(weights_of(companded), stored)
    plain.set_weights([w + 0.1 for w in before])
    of_plain = make(before, plain)
    for change, model, match in (
        (patch, plain, "a plain weight, and comp.*store both in one way"),
        (patch, other, r"0\.7, 0\.7\]\), and comp.*Fold both"),
        (of_plain, companded, "and a plain weight is expected"),
    ):
        now = weights_of(model)
        with pytest.raises(ValueError, match=match):
            change.apply(model, force=True)
        assert_same_bits(weights_of(model), now)
    if kind == "signature":
        with pytest.raises(ValueError, match=r"signature 2, .*Fold both"):
            WeightSignature.sum([of_plain, -patch.quantize(8)])
    kwm.fold(companded)
    of_plain.apply(companded, force=True)
    # Elsewhere a compander does not matter.
    model = mlp()
    before, first = weights_of(model), make_signature(model, depth=1)
    first.apply(model)
    kwm.attach_compander(model, targets=kwm.find_targets(model)[1:])
    first.remove(model)
    assert_same_bits(weights_of(model)[:2], before[:2])


# The first and the last order, and one between.
ORDERS = [*itertools.permutations(range(4))][::23] + [(2, 0, 3, 1)]


def made(dtype):
    """A model, its clean weights, and patches by name."""
    model = conv_net(dtype=dtype)
    clean = random_weights(model, 0)
    clean[CONV].reshape(-1)[:4] = -0.0
    named = {"name": "signature", "depth": 1, "statistics": "average"}
    patches = {
        "signature": make_signature(model, 1, **named),
        "quantized": make_signature(model, 2, name="quantized").quantize(4),
    }
    for seed, name, share in ((1, "half", 0.5), (2, "third", 0.3)):
        rng = np.random.default_rng(seed)
        tuned = [w.copy() for w in clean]
        for place in (CONV, CONV_B, 12):
            w = tuned[place]
            at = rng.random(w.shape) < share
            w[at] += rng.normal(size=at.sum()).astype(w.dtype)
        model.set_weights(tuned)
        patches[name] = Patch.from_models(model, clean, name=name)
    model.set_weights(clean)
    return model, clean, patches


@breadth("dtype", DTYPES)
def test_the_order_leaves_no_trace(dtype):
    model, clean, patches = made(dtype)
    expected = {frozenset(): clean}

    def check():
        now = weights_of(model)
        names = frozenset(Patch.on(model))
        assert_same_bits(now, expected.setdefault(names, now))

    for order in ORDERS:
        names = [[*patches][i] for i in order]
        for name in names:
            patches[name].apply(model, 0.3)
            patches[name].apply(model, 0.7)
            check()
        for name in names:
            # Where nothing was changed, force is exact too.
            force = name in ("half", "quantized")
            report = patches[name].remove(model, force=force)
            assert not report.subtracted
            check()
        assert report.clean_nbytes == 0
    assert len(expected) > 10
    # If only deltas change a weight, their entries are kept.
    half, signature = patches["half"], patches["signature"]
    of_delta = sum(e.tensor.size for e in half) * clean[CONV].itemsize
    assert half.apply(model).clean_nbytes == of_delta
    assert signature.apply(model).clean_nbytes > of_delta
    assert signature.remove(model).clean_nbytes == of_delta
    report = Patch.clear(model)
    assert (report.action, report.clean_nbytes) == ("clear", 0)
    assert_same_bits(weights_of(model), clean)


@pytest.mark.one_backend
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_changed_since(dtype):
    model, clean, patches = made(dtype)
    half, signature = patches["half"], patches["signature"]
    for patch in (half, signature):
        patch.apply(model)
    before = weights_of(model)
    changed = [w.copy() for w in before]
    for place in (CONV, 12):  # under both, and under the delta alone
        changed[place] *= 2
    model.set_weights(changed)
    for count, call in (
        (2, lambda: patches["third"].apply(model)),
        (2, lambda: half.remove(model)),
        (1, lambda: signature.apply(model, 2.0)),
        (1, lambda: signature.remove(model)),
        (2, lambda: Patch.clear(model)),
    ):
        with pytest.raises(ValueError, match=f"changed since.*{count} prob"):
            call()
        assert_same_bits(weights_of(model), changed)
        assert len(Patch.on(model)) == 2
    report = half.remove(model, force=True)
    assert [int(key.split(":")[0]) for key in report.subtracted] == [CONV]
    signature.remove(model)
    now = weights_of(model)
    added = before[CONV].astype("float32") - clean[CONV].astype("float32")
    np.testing.assert_allclose(
        now[CONV].astype("float32"),
        changed[CONV].astype("float32") - added,
        rtol=0.05,
        atol=0.05,
    )
    at = before[12] != clean[12]
    assert np.array_equal(now[12], np.where(at, clean[12], changed[12]))
    assert_same_bits([now[CONV_B]], [clean[CONV_B]])


@pytest.mark.one_backend
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scales", [(1, 1, 1), (3,), (0.5, 0.5), (2, -0.1, 2)])
def test_statistics_of_several_patches_are_a_mixture(dtype, scales):
    model = conv_net(dtype=dtype)
    model.set_weights(random_weights(model, 0))
    clean = weights_of(model)
    robust = [random_weights(model, seed) for seed in range(1, 4)]
    found = [
        WeightSignature.extract(None, clean, each, depth=2, like=model)
        for each in robust
    ][: len(scales)]
    results = []
    for order in itertools.permutations(range(len(scales))):
        for i in order:
            found[i].apply(model, scales[i])
        results.append(weights_of(model))
        assert_same_bits(results[-1], results[0])
        Patch.clear(model)
        assert_same_bits(weights_of(model), clean)
    WeightSignature.sum(found, "sum", scales).apply(model)
    close = 1e-5 if dtype == "float32" else 2**-7
    for place in STATISTICS:
        old, *parts = (
            each[place].astype("float64") for each in (clean, *robust)
        )
        expected = references.statistic(
            old, [(scale / 2, part) for scale, part in zip(scales, parts)]
        )
        for got in (results[0], weights_of(model)):
            np.testing.assert_allclose(
                got[place].astype("float64"), expected, rtol=close, atol=close
            )


@pytest.mark.one_backend
def test_statistics_that_were_left_are_no_longer_patched():
    model = conv_net()
    model.set_weights(random_weights(model, 0))
    a, b, c = (
        make_signature(model, i, statistics="average") for i in (1, 2, 3)
    )
    a.apply(model)
    b.apply(model)
    now = weights_of(model)
    for place in STATISTICS:
        now[place] += 1
    model.set_weights(now)
    assert len(a.remove(model, force=True).skipped) == len(STATISTICS)
    b.apply(model, 0.5)
    for call in (lambda: None, lambda: c.apply(model) and Patch.clear(model)):
        call()
        for place in STATISTICS:
            assert_same_bits([weights_of(model)[place]], [now[place]])
