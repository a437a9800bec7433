import numpy as np
import pytest

from keras_weightmods.merging import methods, task
from keras_weightmods.merging.methods import METHODS
from keras_weightmods.merging.task import Task
from tests.merging import references

# NumPy alone.
pytestmark = pytest.mark.one_backend

SHAPE = (6, 2, 5)
# An EinsumDense that contracts the first axis, and one of experts.
AXES = {"dense": ((0,), ()), "experts": ((0,), (1,)), "none": None}
WEIGHTS = (1.0, 0.5, 2.0)


@pytest.fixture(params=[task.PIECE, 7], ids=["whole", "pieces"])
def arrays(request, monkeypatch):
    """Three models, and the base behind them."""
    monkeypatch.setattr(task, "PIECE", request.param)
    return make()


def make(dtype="float64"):
    random = np.random.default_rng(0)
    base = random.normal(size=SHAPE)
    common = random.normal(size=SHAPE)
    return [
        (base + common * (i < 3) + (i < 3) * random.normal(size=SHAPE)).astype(
            dtype
        )
        for i in range(4)
    ]


def merged(method, arrays, weights=WEIGHTS, axes=None, **options):
    arrays = [*arrays[: len(weights)], arrays[-1]]
    task = Task(
        shape=SHAPE,
        read=lambda number, part: arrays[number].reshape(-1)[part],
        weights=weights,
        options={**METHODS[method].options, "density": 1.0, **options},
        seed=(),
        axes=axes,
    )
    parts = list(METHODS[method].function(task))
    stops = [0, *(part.stop for part, _ in parts)]
    assert [part.start for part, _ in parts] == stops[:-1]
    assert stops[-1] == task.size
    return np.concatenate([values for _, values in parts]).reshape(SHAPE)


def check(got, expected):
    expected = np.reshape(expected, SHAPE)
    np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)


def changes(arrays):
    return [(x - arrays[-1]).reshape(-1) for x in arrays[:-1]]


def test_linear_and_task_arithmetic(arrays):
    expected = np.average(arrays[:-1], axis=0, weights=WEIGHTS)
    check(merged("linear", arrays), expected)
    flat = [x.reshape(-1) for x in arrays]
    expected = references.task_arithmetic(flat[-1], flat[:-1], WEIGHTS, 0.7)
    check(merged("task_arithmetic", arrays, scale=0.7), expected)


@pytest.mark.parametrize("density", [0.02, 0.3, 1.0])
def test_ties(arrays, density):
    expected = references.ties(changes(arrays), density, WEIGHTS)
    # Magnitudes are ranked in float32.
    got = merged("ties", arrays, density=density, scale=0.7)
    check(got, arrays[-1].reshape(-1) + 0.7 * np.array(expected))


@pytest.mark.parametrize("method", ["dare", "dare_ties"])
def test_dare(arrays, method):
    dropped = []
    for number, change in enumerate(changes(arrays)):
        uniform = np.random.default_rng(number).random(change.size)
        dropped.append(references.dare(change, 0.6, uniform))
    expected = references.ties(dropped, 1.0, WEIGHTS)
    if method == "dare":
        expected = np.tensordot(WEIGHTS, dropped, 1)
    got = merged(method, arrays, density=0.4)
    check(got, arrays[-1].reshape(-1) + expected)


@pytest.mark.parametrize(("density", "gamma"), [(0.3, 0.1), (1, 0), (0.6, 0.4)])
def test_breadcrumbs(arrays, density, gamma):
    kept = [
        references.breadcrumbs(change, density, gamma)
        for change in changes(arrays)
    ]
    got = merged("breadcrumbs", arrays, density=density, gamma=gamma)
    check(got, arrays[-1].reshape(-1) + np.tensordot(WEIGHTS, kept, 1))


@pytest.mark.parametrize("kind", AXES)
def test_della(kind, arrays):
    pruned = []
    for number, change in enumerate(changes(arrays)):
        # The entries that one output sums over, as rows.
        rows = change.reshape(12, 5)
        if kind != "none":
            rows = np.moveaxis(change.reshape(SHAPE), 0, -1).reshape(10, 6)
        uniform = np.random.default_rng(number).random(rows.shape, "float32")
        rows = np.array(references.della(rows, 0.5, 0.3, uniform))
        if kind != "none":
            rows = np.moveaxis(rows.reshape(2, 5, 6), -1, 0)
        pruned.append(rows.reshape(-1))
    expected = references.ties(pruned, 1.0, WEIGHTS)
    got = merged("della", arrays, density=0.5, axes=AXES[kind], epsilon=0.3)
    expected = np.reshape(arrays[-1].reshape(-1) + expected, SHAPE)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_della_keeps_the_expectation_and_more_of_what_is_large():
    rows = np.random.default_rng(0).normal(size=(1, 50))
    keep = methods.keep_probabilities(rows, 0.4, 0.3)
    assert keep.mean() == pytest.approx(0.4)
    order = np.argsort(np.abs(rows[0]))
    np.testing.assert_allclose(
        keep[0][order], np.linspace(0.1, 0.7, 50), rtol=1e-6
    )
    # Equal sizes go by their place.
    rows = np.array([[2, -1, 1, 0, -2], [0, 0, 0, 0, 0]], "float32")
    keep = methods.keep_probabilities(rows, 0.5, 0.2)
    expected = [[0.6, 0.4, 0.5, 0.3, 0.7], [0.3, 0.4, 0.5, 0.6, 0.7]]
    np.testing.assert_allclose(keep, expected, rtol=1e-6)


@pytest.mark.parametrize("count", [2, 3])
def test_model_stock(arrays, count):
    flat = [x.reshape(-1) for x in arrays]
    expected = references.model_stock(flat[-1], flat[:count])
    check(merged("model_stock", arrays, (1.0,) * count), expected)


def test_limits():
    first, *_, base = make()
    same = [first, first, first, base]
    check(merged("model_stock", same), first)
    # Opposite changes have nothing in common.
    opposite = [first, 2 * base - first, base]
    check(merged("model_stock", opposite, (1, 1)), base)
    # Weights of zero have no vote.
    check(merged("ties", same, (2.0, 0.0, 0.0)), first)
    check(merged("ties", same, (0.0,) * 3), base)
    # SLERP keeps the norm, and takes a line where they are parallel.
    x, y = (a / np.linalg.norm(a) for a in (first, base))
    got = merged("slerp", [x, y, x], (1.0, 1.0))
    assert np.linalg.norm(got) == pytest.approx(1)
    check(merged("slerp", [x, 3 * x, x], (1.0, 1.0)), 2 * x)
    check(merged("slerp", [x, 0 * x, x], (1.0, 1.0)), x / 2)


@pytest.mark.parametrize("weights", [(3.0, 1.0), (0.0, 1.0), (1.0, 0.0)])
def test_slerp(arrays, weights):
    x, y = (a.reshape(-1) for a in arrays[:2])
    expected = references.slerp(x, y, weights[1] / sum(weights))
    check(merged("slerp", arrays, weights), expected)


@pytest.mark.parametrize("kind", AXES)
def test_iso_c(kind):
    arrays = make()
    total = np.tensordot(WEIGHTS, changes(arrays), 1)
    if kind == "none":
        expected = total / sum(WEIGHTS)
    elif kind == "dense":
        expected = references.iso_c(total.reshape(6, 10))
    else:
        stack = total.reshape(SHAPE)
        stack = [references.iso_c(stack[:, i]) for i in range(2)]
        expected = np.stack(stack, axis=1)
    got = merged("iso_c", arrays, axes=AXES[kind], scale=0.7)
    check(got, arrays[-1].reshape(-1) + 0.7 * np.reshape(expected, -1))


@pytest.mark.parametrize("method", METHODS)
def test_merging_a_model_with_itself(method):
    """Gives that model, where nothing is dropped or made isotropic."""
    first, *_, base = make("float32")
    weights = (0.5, 0.5)
    got = merged(method, [first, first, base], weights, gamma=0, epsilon=0)
    assert got.dtype == "float32"
    if method == "iso_c":
        return
    np.testing.assert_allclose(got, first, rtol=1e-5, atol=1e-6)


def test_kth_largest(monkeypatch):
    random = np.random.default_rng(0)
    numbers = random.normal(size=999).astype("float32")
    numbers[::3] = numbers[0]  # ties
    numbers[1::50] = 0
    rows = [numbers, random.normal(size=999), numbers * 3]
    rows.append(np.zeros(999))  # the base
    order = [np.sort(np.abs(x).astype("float32"))[::-1] for x in rows[:-1]]
    counts = (1, 2, 333, 500, 998, 999)
    monkeypatch.setattr(task, "PIECE", 250)
    each = Task((999,), lambda i, part: rows[i][part], (1, 1, 1), {}, ())
    found = each.kth_largest(*counts)
    assert found == [[row[count - 1] for row in order] for count in counts]
