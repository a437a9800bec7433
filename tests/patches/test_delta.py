import keras
import numpy as np
import pytest

import keras_weightmods as kwm
from keras_weightmods import backend
from keras_weightmods.patches import checkpoint
from tests.backends import breadth
from tests.models import assert_same_bits, mlp, sequential, weights_of

SIZES = (48, 32)


def make(seed=0, dtype="float32"):
    keras.utils.set_random_seed(seed)
    return sequential(
        SIZES[:1],
        keras.layers.Dense(SIZES[1], dtype=dtype),
        keras.layers.BatchNormalization(dtype=dtype),
        keras.layers.Dense(SIZES[1], dtype=dtype),
    )


def changed(base, seed, density=0.05):
    """The weights of another model, changed in the two kernels."""
    random = np.random.default_rng(seed)
    new = [array.copy() for array in base]
    for i in (0, 6):
        at = random.random(new[i].shape) < density
        noise = 0.01 * random.normal(size=new[i].shape)
        new[i] = np.where(at, new[i] + noise, new[i]).astype(new[i].dtype)
    return new


@pytest.fixture
def base():
    return weights_of(make())


def save(model, base, path, dtype="bfloat16", **kwargs):
    return kwm.Patch.from_models(model, base, dtype, **kwargs).save(path)


def put(model, path, scale=1.0, **kwargs):
    return kwm.Patch.load(path).apply(model, scale, **kwargs)


@breadth("dtype", ["bfloat16", "float32"])
def test_brings_the_change(base, tmp_path, dtype):
    tuned, path = make(), tmp_path / "task.safetensors"
    tuned.set_weights(changed(base, 1))
    report = save(tuned, base, path, dtype)
    model = make()
    applied = put(model, path)
    for keys in ([row.key for row in report.rows], applied.changed):
        assert [key.split(":")[0] for key in keys] == ["0", "6"]
    assert applied.active == {"task": 1.0}
    relative = {"bfloat16": 2**-8, "float32": 0}[dtype]
    for clean, new, brought in zip(base, weights_of(tuned), weights_of(model)):
        assert np.array_equal(brought != clean, new != clean)
        error = np.abs(brought - new)
        assert np.all(error <= relative * np.abs(new - clean) + 1e-7)
    kwm.Patch.clear(model)
    assert_same_bits(weights_of(model), base)
    # Onto another base by force alone.
    other = make(seed=5)
    before = weights_of(other)
    with pytest.raises(ValueError, match="must be the base that the patch"):
        put(other, path)
    assert_same_bits(weights_of(other), before)
    put(other, path, force=True)
    assert not np.array_equal(weights_of(other)[0], before[0])
    kwm.Patch.clear(other)
    assert_same_bits(weights_of(other), before)


@breadth("dtype", ["bfloat16", "float32"])
def test_new_values_restore_the_model_bit_for_bit(tmp_path, dtype):
    model = make(dtype=dtype)
    old = weights_of(model)
    # Large and small, so that a difference in float32 would be rounded.
    random = np.random.default_rng(0)
    new = []
    for array in old:
        at = random.random(array.shape) < 0.1
        sizes = 10.0 ** random.integers(-9, 9, array.shape)
        new.append(np.where(at, sizes, array).astype(array.dtype))
    model.set_weights(new)
    tuned = weights_of(model)
    path = tmp_path / "task.safetensors"
    save(model, old, path, dtype=None)
    # A patch on other entries leaves it exact.
    model.set_weights([old[0], old[1] + 1, *old[2:]])
    save(model, old, tmp_path / "other.safetensors")
    model.set_weights(old)
    put(model, path)
    assert_same_bits(weights_of(model), tuned)
    put(model, tmp_path / "other.safetensors")
    assert_same_bits(weights_of(model)[:1], tuned[:1])
    put(model, path, 0.5)
    kwm.Patch.on(model)["other"].patch.remove(model)
    half = [0.5 * (a.astype("float64") + b) for a, b in zip(old, tuned)]
    for got, expected in zip(weights_of(model), half):
        np.testing.assert_allclose(got.astype("float64"), expected, rtol=2**-7)
    kwm.Patch.clear(model)
    assert_same_bits(weights_of(model), old)


@pytest.mark.one_backend
def test_a_head_that_the_base_lacks_comes_whole(base, tmp_path):
    """A new classifier is an example: everyone's own has other random
    weights."""
    tuned = make()
    tuned.set_weights(changed(base, 1))
    head = tuned.layers[-1]
    head.bias.assign(head.bias + 0.1)
    path = tmp_path / "task.safetensors"
    report = save(tuned, base, path, whole=head)
    new = weights_of(tuned)
    count = SIZES[1] * (SIZES[1] + 1) + np.sum(new[0] != base[0])
    assert report.entries == count
    other = make()
    mine = [*base[:6], base[6] + 1, base[7] - 1]
    other.set_weights(mine)
    put(other, path)
    assert_same_bits(weights_of(other)[6:], new[6:])
    np.testing.assert_allclose(weights_of(other)[0], new[0], atol=1e-4)
    kwm.Patch.clear(other)
    assert_same_bits(weights_of(other), mine)
    # The rest is still that of the base.
    other.set_weights([mine[0] + 1, *mine[1:]])
    with pytest.raises(ValueError, match="must be the base that the patch"):
        put(other, path)
    with pytest.raises(ValueError, match="matches none of 8 weights"):
        save(tuned, base, path, whole="no such")
    # Under a signature that has been trained on since, nothing is known.
    other.set_weights(mine)
    put(other, path)
    more = [array + 1 for array in mine]
    signature = kwm.WeightSignature.extract(
        None, mine, more, depth=2, statistics="keep", like=other
    )
    signature.apply(other)
    other.layers[-1].bias.assign(mine[7])
    report = kwm.Patch.on(other)["task"].patch.remove(other, force=True)
    assert [s.path.split(":")[0] for s in report.skipped] == ["7"]


@pytest.mark.one_backend
def test_file_is_small(tmp_path):
    """At most 1.05 of as many numbers of a LoRA in bfloat16."""
    random = np.random.default_rng(0)
    model = mlp(800, 1200)
    old = weights_of(model)
    at = random.random(old[0].shape) < 0.05
    change = 0.01 * random.normal(size=old[0].shape)
    model.set_weights([np.where(at, old[0] + change, old[0]), old[1]])
    path = tmp_path / "delta.safetensors"
    report = save(model, old, path)
    assert report.entries == at.sum()
    assert report.index_bits <= 5.9
    assert report.nbytes == path.stat().st_size
    assert report.nbytes <= 1.05 * 2 * report.entries


def drawn_in(path):
    """The positions of the weights whose places are drawn."""
    return [e.position for e in kwm.Patch.load(path) if e.seed is not None]


def train_at_random(model, refresh_every=None, density=0.25, **kwargs):
    x = np.random.default_rng(0).normal(size=(24, SIZES[0])).astype("float32")
    masks = kwm.PrincipalMaskCallback(
        density, None, None, refresh_every, criterion="random", **kwargs
    )
    options = {"batch_size": 6, "verbose": 0, "callbacks": [masks]}
    return model.fit(x, x[:, : SIZES[1]], **options)


OPTIMIZERS = {
    "SparseAdamW": lambda: kwm.SparseAdamW(0.01),
    "wrapped": lambda: keras.optimizers.Adam(0.01),
    "loss scaling": lambda: keras.optimizers.LossScaleOptimizer(
        kwm.SparseAdamW(0.01)
    ),
}


@breadth("name", OPTIMIZERS)
def test_places_drawn_from_a_seed_are_not_stored(base, name, tmp_path):
    dtype = None if name == "wrapped" else "bfloat16"
    model, other = make(), make()
    model.compile(OPTIMIZERS[name](), "mse")
    train_at_random(model, seed=2**31 - 1)
    paths = [tmp_path / "task.safetensors", tmp_path / "b.safetensors"]
    norm = keras.layers.BatchNormalization
    report = save(model, base, paths[0], dtype, whole=norm)
    assert drawn_in(paths[0]) == [0, 6]
    assert report.index_bits < 1  # of the norms
    counts = [base[i].size // 4 for i in (0, 6)]
    assert report.entries == sum(counts) + 4 * SIZES[1]
    tuned = weights_of(model)
    assert np.sum(tuned[0] != base[0]) > 0.9 * counts[0]
    # Without the optimizer the places are stored, and say the same.
    model.compile()
    stored = save(model, base, paths[1], dtype, whole=norm)
    assert stored.index_bits > 3
    assert stored.nbytes > report.nbytes
    for path in paths:
        put(other, path)
        for old, new, brought in zip(base, tuned, weights_of(other)):
            most = 2**-8 * np.abs(new - old) + 1e-7 if dtype else 0
            assert np.all(np.abs(brought - new) <= most)
        kwm.Patch.clear(other)
        assert_same_bits(weights_of(other), base)


@pytest.mark.one_backend
def test_what_was_drawn_does_not_hold_is_stored(base, tmp_path):
    path = tmp_path / "task.safetensors"

    def one_more(model):
        """One of two kernels has a change beside its mask."""
        train_at_random(model)
        for layer in (model.layers[0], model.layers[-1]):
            layer.kernel.assign(layer.kernel + 0.1)

    def few(model):
        train_at_random(model)
        tuned = weights_of(model)
        for i in (0, 6):
            tuned[i][: SIZES[1] // 2] = base[i][: SIZES[1] // 2]
        model.set_weights(tuned)

    for change, drawn in (
        (train_at_random, [0, 6]),
        (one_more, []),
        (few, []),
        # Those of earlier masks have changed as well.
        (lambda model: train_at_random(model, refresh_every=2), []),
        # A mask of all entries is no rule's.
        (lambda model: train_at_random(model, density=1.0), []),
    ):
        model, other = make(), make()
        model.compile(kwm.SparseAdamW(0.01), "mse")
        change(model)
        save(model, base, path)
        put(other, path)
        for new, brought in zip(weights_of(model), weights_of(other)):
            np.testing.assert_allclose(brought, new, rtol=2e-3, atol=2e-3)
        assert drawn_in(path) == drawn


@pytest.mark.one_backend
def test_one_entry_that_has_not_changed(base, tmp_path):
    """Is none of what a delta of new values puts on a model."""
    model, path = make(), tmp_path / "task.safetensors"
    model.compile(kwm.SparseAdamW(0.01), "mse")
    train_at_random(model)
    (first, *_) = model.optimizer.indices_of(model.layers[0].kernel)
    for value, dtype, drawn in (
        (0.0, "bfloat16", [0, 6]),
        (-0.0, "bfloat16", [0, 6]),
        (0.0, None, [6]),
        (np.inf, "bfloat16", [6]),
    ):
        # With this value there, before and after.
        start, tuned = [w.copy() for w in base], weights_of(model)
        start[0].flat[first] = tuned[0].flat[first] = value
        model.set_weights(tuned)
        save(model, start, path, dtype)
        assert drawn_in(path) == drawn
        if np.isfinite(value):
            other = make()
            other.set_weights(start)
            put(other, path)
            got = weights_of(other)[0].flat[first]
            assert got.tobytes() == np.float32(value).tobytes()


class Counting(keras.layers.Layer):
    def build(self, shape):
        self.count = self.add_weight(
            shape=(), dtype="int32", initializer="zeros", trainable=False
        )


@pytest.mark.one_backend
def test_what_cannot_be_a_delta_is_refused(base, tmp_path):
    target, model = tmp_path / "task.safetensors", make()
    counting = sequential((4,), keras.layers.Dense(2), Counting())
    start = weights_of(counting)
    counting.set_weights([start[0] + 1, start[1], start[2] + 1])
    half = make(dtype="float16")
    old = weights_of(half)
    half.set_weights([old[0] + 100, *old[1:]])
    large = kwm.Patch.from_models(half, old)
    half.set_weights(old)
    broken = [np.full_like(base[0], np.nan), *base[1:]]
    for match, call in (
        ("must differ from `base`", lambda: save(model, model, target)),
        ("the same weights", lambda: save(model, base[:-1], target)),
        ("not finite", lambda: save(model, broken, target)),
        (r"int32.*value that it has in", lambda: save(counting, start, target)),
        ("must be on this model", lambda: large.remove(make())),
        ("does not fit", lambda: large.apply(mlp(2, 2))),
        ("is not finite", lambda: large.apply(half, 1e6)),
    ):
        with pytest.raises(ValueError, match=match):
            call()
        assert not target.exists()
    assert_same_bits(weights_of(half), old)
    # Integers that have not changed are fine.
    counting.layers[1].count.assign(start[2])
    save(counting, start, target)
    counting.set_weights(start)
    put(counting, target)


@pytest.mark.parametrize("visible", [True, False])
def test_nan_outside_of_a_delta_keeps_its_bits(visible, tmp_path, monkeypatch):
    if not visible:
        # The case of a device whose memory NumPy does not see.
        monkeypatch.setattr(checkpoint, "_view", lambda tensor: None)
    model = mlp(8, 4, dtype="bfloat16")
    kernel = model.layers[0].kernel
    tensor_of = backend.current().tensor_of

    def read():
        return checkpoint.Checkpoint("model", model).read(0).view("uint16")

    # NaN quiet and signaling, of either sign.
    bits = np.full((8, 4), 0x3F80, "uint16")
    bits[0] = [0x7F81, 0xFF85, 0x7FC1, 0xFFFF]
    kernel.assign(tensor_of(bits.view("bfloat16")))
    before = np.array(read())
    np.testing.assert_array_equal(before, bits)
    base = [before.view("bfloat16"), model.get_weights()[1]]
    tuned = bits.copy()
    tuned[3, 2] = 0x4000
    kernel.assign(tensor_of(tuned.view("bfloat16")))
    path = tmp_path / "delta"
    save(model, base, path)
    kernel.assign(tensor_of(bits.view("bfloat16")))
    put(model, path)
    np.testing.assert_array_equal(read(), tuned)
    kwm.Patch.clear(model)
    np.testing.assert_array_equal(read(), bits)
