"""save_model and load_model: the same model, or one clear error."""

import json
import os
import pathlib
import random
import warnings

import keras
import numpy as np
import pytest
from keras import ops

import keras_weightmods as kwm
from keras_weightmods.core.seam import reparameterizations
from keras_weightmods.saving import description
from keras_weightmods.saving.container import Entry, Reader, Writer


@keras.saving.register_keras_serializable("tests.saving")
class Tower(keras.Model):
    """Layers without names in containers, and an argument not in its config."""

    def __init__(self, depth=2, wide=False, **kwargs):
        super().__init__(**kwargs)
        self.depth = depth
        self.wide = wide
        self.normalization = keras.layers.Normalization()
        self.tower = [keras.layers.Dense(8) for _ in range(depth)]
        self.heads = {"out": [keras.layers.Dense(8 if wide else 4)]}

    def call(self, x):
        x = self.normalization(x)
        for layer in self.tower:
            x = ops.relu(layer(x))
        return self.heads["out"][0](x)

    def get_config(self):
        return {**super().get_config(), "depth": self.depth}


@keras.saving.register_keras_serializable("tests.saving")
class Block(keras.layers.Layer):
    """Its kernel has the path "o_proj/kernel", like that of any other."""

    def build(self, input_shape):
        self.projection = keras.layers.Dense(input_shape[-1], name="o_proj")

    def call(self, x):
        if not self.projection.built:
            with keras.name_scope("", override_parent=""):
                self.projection.build(x.shape)
        return self.projection(x)


def sequential():
    return keras.Sequential(
        [
            keras.Input((8,)),
            keras.layers.Dense(8, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(4, use_bias=False),
        ]
    )


def functional():
    x = inputs = keras.Input((8,))
    shared = keras.layers.Dense(8, name="shared")
    left, right = shared(x), keras.layers.Dense(8)(shared(x))
    x = keras.layers.Add()([left, right])
    inner = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8)])
    return keras.Model(inputs, [inner(x), left])


def tower():
    model = Tower(depth=3, wide=True)
    model.normalization.adapt(inputs_for(model))
    model(inputs_for(model))
    return model


def einsum():
    x = inputs = keras.Input((5, 8))
    x = keras.layers.EinsumDense("btd,dhk->bthk", (None, 2, 4))(x)
    x = keras.layers.EinsumDense("bthk,hkd->btd", (None, 8), bias_axes="d")(x)
    return keras.Model(inputs, x)


def recurrent():
    return keras.Sequential(
        [keras.Input((5, 8)), keras.layers.Bidirectional(keras.layers.LSTM(4))]
    )


def bfloat16():
    return keras.Sequential(
        [keras.Input((8,)), keras.layers.Dense(4, dtype="bfloat16")]
    )


def mixed():
    return keras.Sequential(
        [keras.Input((8,)), keras.layers.Dense(4, dtype="mixed_bfloat16")]
    )


def quantized():
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(8)])
    model.quantize("int8")
    return model


MODELS = {
    each.__name__: each
    for each in (
        sequential,
        functional,
        tower,
        einsum,
        recurrent,
        bfloat16,
        mixed,
        quantized,
    )
}


def inputs_for(model, batch=2):
    rng = np.random.default_rng(0)
    shape = (8,) if isinstance(model, Tower) else model.input_shape[1:]
    return rng.normal(size=(batch, *shape)).astype("float32")


def randomize(model, seed=1):
    rng = np.random.default_rng(seed)
    for weight in model.weights:
        # What `adapt` found is kept twice.
        if "float" in weight.dtype and weight.name not in ("mean", "variance"):
            weight.assign(rng.uniform(0.5, 1.5, weight.shape))


def make_sparse(model):
    for target in kwm.find_targets(model):
        kernel = ops.convert_to_numpy(target.variable.value)
        mask = kwm.ops.nm_mask(kernel, "2:4", target.contraction_axes)
        target.variable.assign(kernel * ops.convert_to_numpy(mask))


def states_of(model):
    return [
        (w.name, w.dtype, w.trainable, ops.convert_to_numpy(w).tobytes())
        for w in model.weights
    ]


def assert_same(received, expected, x):
    assert type(received) is type(expected)
    assert received.name == expected.name
    assert states_of(received) == states_of(expected)
    changes = [
        [
            (item.name, item.target.attribute, item.get_config())
            for item in reparameterizations(model)
        ]
        for model in (received, expected)
    ]
    assert changes[0] == changes[1]
    outputs = [
        keras.tree.flatten(keras.tree.map_structure(ops.convert_to_numpy, y))
        for y in (received(x), expected(x))
    ]
    for ours, theirs in zip(*outputs, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def round_trip(model, path, x=None, **kwargs):
    x = inputs_for(model) if x is None else x
    before = states_of(model)
    kwm.save_model(model, path)
    assert states_of(model) == before
    loaded = kwm.load_model(path, **kwargs)
    assert_same(loaded, model, x)
    assert os.listdir(path.parent) == [path.name]
    return loaded


@pytest.fixture
def path(tmp_path):
    (tmp_path / "files").mkdir()
    return tmp_path / "files" / "model.safetensors"


@pytest.mark.parametrize("name", MODELS)
def test_plain_models(name, path):
    model = MODELS[name]()
    if name != "quantized":
        randomize(model)
    loaded = round_trip(model, path)
    assert not loaded.compiled
    # It can be saved again, and by Keras, whose file does not have what the
    # config of a Tower forgets.
    kwm.save_model(loaded, path)
    if name != "tower":
        loaded.save(path.with_suffix(".keras"))
        again = keras.saving.load_model(path.with_suffix(".keras"))
        assert states_of(again) == states_of(model)


@pytest.mark.parametrize(
    "name", ["sequential", "functional", "tower", "einsum", "bfloat16", "mixed"]
)
def test_scaled_models(name, path):
    model = MODELS[name]()
    kwm.attach_scaling(model)
    randomize(model)
    loaded = round_trip(model, path)
    kwm.fold(loaded)
    kwm.fold(model)
    assert_same(loaded, model, inputs_for(model))


@pytest.mark.parametrize("dtype", [None, "bfloat16", "int8"])
@pytest.mark.parametrize(
    "name", ["sequential", "tower", "einsum", "bfloat16", "mixed"]
)
def test_packed_models(name, dtype, path):
    model = MODELS[name]()
    randomize(model)
    make_sparse(model)
    kwm.pack(model, dtype=dtype)
    loaded = round_trip(model, path)
    kwm.unpack(loaded)
    kwm.unpack(model)
    assert_same(loaded, model, inputs_for(model))


def test_packed_models_where_kernels_are_held_dense(path, monkeypatch):
    monkeypatch.setenv("KERAS_WEIGHTMODS_NATIVE", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for dtype in (None, "bfloat16", "int8"):
            model = sequential()
            randomize(model)
            make_sparse(model)
            kwm.pack(model, dtype=dtype)
            round_trip(model, path)


def test_packed_in_part_trainable_and_scaled_in_part(path):
    model = einsum()
    make_sparse(model)
    first, second = kwm.find_targets(model)
    kwm.attach_scaling(model, targets=[first], groups=1)
    kwm.pack(model, targets=[second], trainable=True)
    model.layers[1].trainable = False
    loaded = round_trip(model, path)
    assert [item.name for item in reparameterizations(loaded)] == [
        "scaling",
        "packed",
    ]
    assert len(loaded.trainable_weights) == len(model.trainable_weights) == 2


@pytest.mark.parametrize("first", [True, False])
def test_lora_on_changed_layers_is_kept(first, path):
    model = sequential()
    make_sparse(model)
    targets = kwm.find_targets(model)
    if first:
        model.layers[0].enable_lora(2, lora_alpha=3)
    kwm.pack(model, targets=targets[:1])
    kwm.attach_scaling(model, targets=targets[1:])
    if not first:
        model.layers[0].enable_lora(2, lora_alpha=3)
    model.layers[3].enable_lora(1)
    randomize_lora(model)
    loaded = round_trip(model, path)
    assert loaded.layers[0].lora_alpha == 3
    assert loaded.layers[3].lora_rank == 1


def randomize_lora(model):
    rng = np.random.default_rng(2)
    for weight in model.weights:
        if "lora" in weight.name:
            weight.assign(rng.normal(size=weight.shape))


def test_lora_on_plain_layers_is_merged(path):
    model = sequential()
    model.layers[0].enable_lora(2)
    randomize_lora(model)
    kwm.save_model(model, path)
    loaded = kwm.load_model(path)
    x = inputs_for(model)
    np.testing.assert_allclose(loaded.predict(x), model.predict(x), rtol=1e-5)


def test_frozen_layers_stay_frozen(path):
    model = tower()
    model.tower[1].trainable = False
    loaded = round_trip(model, path)
    assert [layer.trainable for layer in loaded.tower] == [True, False, True]


def test_equal_paths(path):
    x = inputs = keras.Input((8,))
    for _ in range(3):
        x = Block()(x)
    model = keras.Model(inputs, x)
    kernels = [w.path for w in model.weights if w.name == "kernel"]
    assert kernels == ["o_proj/kernel"] * 3
    randomize(model)
    round_trip(model, path)
    kwm.attach_scaling(model, targets=kwm.find_targets(model)[1:])
    randomize(model)
    loaded = round_trip(model, path)
    places = [
        [layer for layer in each.layers[1:] if len(layer.weights) == 3]
        for each in (model, loaded)
    ]
    assert [layer.name for layer in places[0]] == [
        layer.name for layer in places[1]
    ]


def test_the_optimizer_is_not_saved_and_the_model_stays_compiled(path):
    model = sequential()
    model.compile("adam", loss=lambda y, z: ops.mean((y - z) ** 2))
    x = inputs_for(model)
    model.fit(x, np.ones((2, 4)), verbose=0)
    loaded = round_trip(model, path)
    assert model.optimizer.built
    np.testing.assert_array_equal(loaded.predict(x), model.predict(x))
    loaded.compile("adam", "mse")
    loaded.fit(x, np.ones((2, 4)), verbose=0)


def test_saving_leaves_no_trace(path):
    model = tower()
    keras.utils.set_random_seed(3)
    expected = random.random()
    name = keras.layers.Dense(1).name
    base, _, number = name.rpartition("_")
    keras.utils.set_random_seed(3)
    kwm.save_model(model, path)
    assert random.random() == expected
    assert keras.layers.Dense(1).name == f"{base}_{int(number) + 1}"


def test_loading_does_not_initialize(path, monkeypatch):
    model = functional()
    kwm.save_model(model, path)

    def fail(self, *args, **kwargs):
        raise AssertionError("an initializer was run")

    monkeypatch.setattr(keras.initializers.GlorotUniform, "__call__", fail)
    loaded = kwm.load_model(path)
    monkeypatch.undo()
    assert_same(loaded, model, inputs_for(model))


def test_a_variable_made_of_a_value(path):
    # Keras cannot make it without a value, and the model is built with values.
    @keras.saving.register_keras_serializable("tests.saving")
    class Constant(keras.layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.factor = keras.Variable(np.ones(8), name="factor")

        def call(self, x):
            return x * self.factor

    model = keras.Sequential(
        [keras.Input((8,)), Constant(), keras.layers.Dense(4)]
    )
    randomize(model)
    round_trip(model, path)


def test_classes_that_are_not_registered(path):
    class Twice(keras.layers.Layer):
        def call(self, x):
            return 2 * x

    model = keras.Sequential([keras.Input((8,)), Twice()])
    kwm.save_model(model, path)
    with pytest.raises(ValueError, match=r"model\.json(?s:.*)Twice"):
        kwm.load_model(path)
    loaded = kwm.load_model(path, custom_objects={"Twice": Twice})
    assert_same(loaded, model, inputs_for(model))


def test_keras_names_save_model():
    model = sequential()
    kwm.attach_scaling(model)
    with pytest.raises(ValueError, match=r"keras_weightmods\.save_model"):
        model.save("nowhere.keras")
    with pytest.raises(ValueError, match=r"keras_weightmods\.save_model"):
        keras.models.clone_model(model)
    kwm.fold(model)
    make_sparse(model)
    kwm.pack(model)
    with pytest.raises(ValueError, match=r"keras_weightmods\.save_model"):
        model.save("nowhere.keras")


def test_vocabularies_are_saved(path):
    lookup = keras.layers.IntegerLookup(vocabulary=[5, 7, 9])
    inputs = keras.Input((3,), dtype="int64")
    outputs = keras.layers.Embedding(5, 2)(lookup(inputs))
    model = keras.Model(inputs, outputs)
    round_trip(model, path, np.array([[5, 9, 1]]))


@pytest.mark.parametrize(
    ("dtype", "share"), [(None, 0.54), ("bfloat16", 0.29), ("int8", 0.17)]
)
def test_the_file_of_a_packed_model_has_the_packed_size(dtype, share, path):
    model = keras.Sequential(
        [keras.Input((512,)), keras.layers.Dense(512, use_bias=False)]
    )
    make_sparse(model)
    kwm.pack(model, dtype=dtype)
    kwm.save_model(model, path)
    assert os.path.getsize(path) < share * 4 * 512 * 512 + 6000


def test_a_file_of_version_1_made_on_torch():
    """A scaled layer and one packed of each type; later releases read it."""
    model = kwm.load_model(
        pathlib.Path(__file__).parent / "data" / "version_1.safetensors"
    )
    assert [item.name for item in reparameterizations(model)] == [
        "scaling",
        "packed",
        "packed",
        "packed",
    ]
    x = np.linspace(-1, 1, 16).reshape(2, 8).astype("float32")
    expected = [
        [-0.93487412, 0.40822130, -2.0335119, 5.1786723],
        [-3.4952483, 1.2282960, -6.1796441, -2.1173186],
    ]
    y = ops.convert_to_numpy(model(x))
    np.testing.assert_allclose(y, expected, rtol=1e-4)


# What cannot be saved.


def test_wrong_arguments(tmp_path):
    model = sequential()
    for wrong in (None, "model", keras.layers.Dense(1), keras.Sequential()):
        with pytest.raises(ValueError, match="`model` must be a built"):
            kwm.save_model(wrong, tmp_path / "file")
    for wrong in (tmp_path, tmp_path / "none" / "file"):
        with pytest.raises(ValueError, match="`filepath` must name a file"):
            kwm.save_model(model, wrong)
    with pytest.raises(FileNotFoundError):
        kwm.load_model(tmp_path / "none")
    assert os.listdir(tmp_path) == []


def unlike(config):
    """A class whose rebuilt layers differ from what was saved."""

    @keras.saving.register_keras_serializable("tests.saving")
    class Unlike(keras.layers.Layer):
        def __init__(self, units=4, **kwargs):
            super().__init__(**kwargs)
            self._units = units

        def build(self, input_shape):
            self.kernel = self.add_weight((input_shape[-1], self._units))

        def call(self, x):
            return ops.matmul(x, self.kernel)

        def get_config(self):
            return {**super().get_config(), **config}

    return keras.Sequential([keras.Input((8,)), Unlike(6)])


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (lambda: unlike({}), r"weights/layers/unlike/0 .*\(8, 6\).*\(8, 4\)"),
        (lambda: unlike({"unknown": 1}), "unknown"),
        (
            lambda: keras.Sequential(
                [keras.Input((8,)), keras.layers.Lambda(lambda x: 2 * x)]
            ),
            "Lambda",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:The object being serialized includes")
def test_a_model_that_could_not_be_loaded_is_not_saved(model, match, tmp_path):
    with pytest.raises(ValueError, match=match) as error:
        kwm.save_model(model(), tmp_path / "file")
    assert "get_config" in str(error.value)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_nothing(path, monkeypatch):
    model = sequential()
    kwm.save_model(model, path)
    before = path.read_bytes()

    def full(self, name, array):
        raise OSError("No space left on device")

    randomize(model)
    monkeypatch.setattr(Writer, "write", full)
    with pytest.raises(OSError, match="No space left"):
        kwm.save_model(model, path)
    assert os.listdir(path.parent) == [path.name]
    assert path.read_bytes() == before


# Files that are whole and hostile: every hash is right.


def contents(path):
    with Reader(path, "keras_weightmods.model", (1,)) as reader:
        return {name: reader.read(name) for name in reader.entries}


def rewrite(path, arrays):
    entries = {k: Entry(v.shape, v.dtype.name) for k, v in arrays.items()}
    with Writer(path, "keras_weightmods.model", 1, entries) as writer:
        for name, array in arrays.items():
            writer.write(name, array)


def as_bytes(text):
    return np.frombuffer(text, "uint8")


def edit(change):
    """A change of the JSON in `model.json`."""

    def edited(arrays):
        described = json.loads(arrays["model.json"].tobytes())
        result = change(described)
        described = described if result is None else result
        arrays["model.json"] = as_bytes(json.dumps(described).encode())

    return edited


def put(key, value):
    return edit(lambda described: described.update({key: value}))


def layer_config(described):
    """The config of the last Dense."""
    return described["config"]["config"]["layers"][-1]["config"]


def put_layer(**values):
    return edit(lambda described: layer_config(described).update(values))


def swap(first, second):
    first[2], second[2] = "dense_1009", "dense_1008"


def replace_layer(**layer):
    def change(described):
        described["config"]["config"]["layers"][1].update(layer)

    return edit(change)


def put_change(index, value):
    def change(described):
        described["changes"][0][index] = value

    return edit(change)


KERNEL = "weights/layers/dense/stored_0"
LAST = "weights/layers/dense_1/stored_0"
HOSTILE = {
    "no description": (lambda a: a.pop("model.json"), "model.json"),
    "description no JSON": (
        lambda a: a.update({"model.json": as_bytes(b"{")}),
        "model.json",
    ),
    "description binary": (
        lambda a: a.update({"model.json": as_bytes(b"\xff\xfe")}),
        "model.json",
    ),
    "description pickled": (
        lambda a: a.update({"model.json": as_bytes(b"\x80\x04K\x01.")}),
        "model.json",
    ),
    "description floats": (
        lambda a: a.update({"model.json": np.ones(3, "float32")}),
        "model.json",
    ),
    "description bomb": (
        lambda a: a.update({"model.json": as_bytes(b"[" * 10**6)}),
        "model.json",
    ),
    "description twice": (
        lambda a: a.update({"model.json": as_bytes(b'{"a":1,"a":1}')}),
        "model.json",
    ),
    "description list": (edit(lambda d: [d]), "model.json"),
    "description empty": (edit(lambda d: {}), "model.json"),
    "description more": (put("code", "import os"), "model.json"),
    "config null": (put("config", None), "'config'"),
    "config text": (put("config", "keras.Model"), "'config'"),
    "config empty": (put("config", {}), "model.json"),
    "compiles int": (put("compiles", 1), "'compiles'"),
    "version int": (put("keras_version", 3), "'keras_version'"),
    "parts dict": (put("parts", {}), "'parts'"),
    "parts empty": (put("parts", []), "built in addition"),
    "parts rows": (put("parts", [["", "Sequential"]]), "'parts'"),
    "parts other": (
        edit(lambda d: d["parts"][2].__setitem__(1, "Conv2D")),
        "not built|built differently",
    ),
    "parts renamed": (
        edit(lambda d: d["parts"][2].__setitem__(2, "other")),
        "'other' would be named 'dense'",
    ),
    "parts swapped": (
        edit(
            lambda d: (
                [
                    row.__setitem__(2, f"dense_{9 - i}")
                    for i, row in enumerate(
                        r for r in d["parts"] if r[1] == "Dense"
                    )
                ]
                and None
            )
        ),
        "changed places",
    ),
    "changes dict": (put("changes", {}), "'changes'"),
    "changes rows": (put("changes", [["layers/dense"]]), "'changes'"),
    "changes none": (put("changes", []), KERNEL),
    "change twice": (
        edit(lambda d: d["changes"].append(d["changes"][0])),
        "one change of a weight 'kernel' in layer 'layers/dense'",
    ),
    "change of no layer": (put_change(0, "layers/none"), "layers/none"),
    "change of bias": (put_change(1, "bias"), "'bias'"),
    "change of code": (put_change(1, "__class__"), "__class__"),
    "change unknown": (put_change(2, "os.system"), r"os\.system"),
    "change packed": (put_change(2, "packed"), "layers/dense|dtype"),
    "change config": (put_change(3, {"groups": 2, "code": 1}), "groups"),
    "change empty": (put_change(3, {}), "groups"),
    "change no dict": (put_change(3, 2), "'changes'"),
    "groups 0": (put_change(3, {"groups": 0}), "groups"),
    "groups -1": (put_change(3, {"groups": -1}), "groups"),
    "groups 3": (put_change(3, {"groups": 3}), "groups"),
    "groups 1": (put_change(3, {"groups": 1}), "kernel_scale"),
    "groups true": (put_change(3, {"groups": True}), "groups"),
    "groups text": (put_change(3, {"groups": "2"}), "groups"),
    "groups huge": (put_change(3, {"groups": 10**12}), "groups"),
    "lora rows": (put("lora", [["layers/dense"]]), "'lora'"),
    "lora of no layer": (put("lora", [["none", 2, 2, True]]), "none"),
    "lora added": (put("lora", [["layers/dense", 2, 2, False]]), "stored_"),
    "lora huge": (put("lora", [["layers/dense", 10**12, 2, True]]), "stored_"),
    "lora rank -1": (put("lora", [["layers/dense", -1, 2, False]]), "."),
    "layer larger": (put_layer(units=9), LAST),
    "layer huge": (put_layer(units=10**13), LAST),
    "layer negative": (put_layer(units=-8), "units"),
    "layer text": (put_layer(units="8"), "."),
    "layer float64": (put_layer(dtype="float64"), LAST),
    "layer unknown argument": (put_layer(code=1), "code"),
    "layer unknown dtype": (put_layer(dtype="object"), "."),
    "layer os.system": (
        replace_layer(module="os", class_name="system", registered_name=None),
        "system",
    ),
    "layer eval": (
        replace_layer(
            module="builtins", class_name="eval", registered_name="eval"
        ),
        "eval",
    ),
    "layer of subprocess": (
        replace_layer(
            module="subprocess", class_name="Popen", registered_name=None
        ),
        "Popen",
    ),
    "layer of keras.utils": (
        replace_layer(module="keras.utils", class_name="get_file"),
        "get_file",
    ),
    "layer lambda": (
        replace_layer(
            module="keras.layers",
            class_name="Lambda",
            config={
                "function": {
                    "class_name": "__lambda__",
                    "config": {"value": ["4wA=", None, None]},
                }
            },
        ),
        "arbitrary code",
    ),
    "activation lambda": (
        put_layer(
            activation={
                "class_name": "__lambda__",
                "config": {"value": ["4wA=", None, None]},
            }
        ),
        "arbitrary code",
    ),
    "layer of a saved model": (
        replace_layer(
            module="keras.layers",
            class_name="TFSMLayer",
            config={"filepath": "/tmp"},
        ),
        ".",
    ),
    "layer of a pickled module": (
        replace_layer(
            module="keras.layers",
            class_name="TorchModuleWrapper",
            config={"module": "gASVBgAAAAAAAABLAS4="},
        ),
        ".",
    ),
    "layer that reads a file": (
        replace_layer(
            module="keras.layers",
            class_name="StringLookup",
            config={"vocabulary": "/etc/passwd"},
        ),
        ".",
    ),
    "function of os": (
        put_layer(
            activation={
                "module": "os",
                "class_name": "function",
                "config": "system",
                "registered_name": "system",
            }
        ),
        "system",
    ),
    "layers missing": (
        edit(lambda d: d["config"]["config"]["layers"].pop() and None),
        "not built",
    ),
    "no model": (
        edit(lambda d: d.update(config=d["config"]["config"]["layers"][1])),
        "built keras.Model",
    ),
    "weight missing": (lambda a: a.pop(KERNEL), KERNEL),
    "weight more": (
        lambda a: a.update({"weights/layers/dense/2": np.ones(1)}),
        "weights/layers/dense/2",
    ),
    "weight reshaped": (
        lambda a: a.update({KERNEL: a[KERNEL].reshape(4, 16)}),
        KERNEL,
    ),
    "weight recast": (
        lambda a: a.update({KERNEL: a[KERNEL].astype("float16")}),
        KERNEL,
    ),
    "weight as bits": (
        lambda a: a.update({KERNEL: a[KERNEL].view("int32")}),
        KERNEL,
    ),
    "weight renamed": (
        lambda a: a.update({KERNEL + "/x": a.pop(KERNEL)}),
        KERNEL,
    ),
    "entry unknown": (
        lambda a: a.update({"code.py": as_bytes(b"import os")}),
        "code.py",
    ),
    "asset of no part": (
        lambda a: a.update({"assets/layers/dense/x": as_bytes(b"x")}),
        "assets/layers/dense/x",
    ),
    **{
        f"asset {name}": (
            lambda a, name=name: a.update({name: as_bytes(b"x")}),
            "named as a file|no part|temporary",
        )
        for name in (
            "assets/../../escaped",
            "assets//escaped",
            "assets/./escaped",
            "assets/C:/escaped",
            "assets/..\\escaped",
            "assets/escaped/",
            "assets/",
            f"assets/{'x' * 300}",
        )
    },
}


@pytest.fixture(scope="module")
def scaled_file(tmp_path_factory):
    model = keras.Sequential(
        [keras.Input((8,)), keras.layers.Dense(8), keras.layers.Dense(4)],
        name="sequential",
    )
    kwm.attach_scaling(model)
    path = tmp_path_factory.mktemp("scaled") / "model"
    kwm.save_model(model, path)
    return path


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.filterwarnings("ignore")
def test_hostile_files(name, scaled_file, tmp_path, monkeypatch):
    if "pickled" in name and keras.config.backend() != "torch":
        pytest.skip("imports torch")
    change, match = HOSTILE[name]
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    arrays = contents(scaled_file)
    change(arrays)
    path = tmp_path / "file"
    rewrite(path, arrays)
    with pytest.raises(ValueError, match=match) as error:
        kwm.load_model(path)
    assert repr(str(path)) in str(error.value)
    assert sorted(os.listdir(tmp_path)) == ["file", "temporary"]
    assert os.listdir(temporary) == []


def test_rewriting_an_unchanged_file_is_accepted(scaled_file, tmp_path):
    rewrite(tmp_path / "file", contents(scaled_file))
    kwm.load_model(tmp_path / "file")


def test_altered_files_are_refused_before_anything_is_built(
    scaled_file, tmp_path, monkeypatch
):
    def fail(*args, **kwargs):
        raise AssertionError("the model was built")

    monkeypatch.setattr(description, "build", fail)
    monkeypatch.setattr(keras.saving, "deserialize_keras_object", fail)
    data = scaled_file.read_bytes()
    path = tmp_path / "file"
    mutated = [data[: len(data) * i // 50] for i in range(50)]
    for i in range(0, len(data), len(data) // 100):
        mutated.append(data[:i] + bytes([data[i] ^ 64]) + data[i + 1 :])
    for each in [*mutated, data + data]:
        path.write_bytes(each)
        with pytest.raises(ValueError, match=r"Entry|The header|The checksum"):
            kwm.load_model(path)
    assert len(mutated) > 140


def test_a_lambda_is_refused_where_keras_was_told_to_allow_it(
    scaled_file, tmp_path
):
    from keras.src.saving.serialization_lib import SafeModeScope

    arrays = contents(scaled_file)
    HOSTILE["layer lambda"][0](arrays)
    rewrite(tmp_path / "file", arrays)
    with SafeModeScope(False):
        with pytest.raises(ValueError, match="arbitrary code"):
            kwm.load_model(tmp_path / "file")


def test_other_files_are_refused(tmp_path):
    model = sequential()
    model.save(tmp_path / "model.keras")
    with pytest.raises(ValueError, match="The header"):
        kwm.load_model(tmp_path / "model.keras")
    safetensors = pytest.importorskip("safetensors.numpy")
    safetensors.save_file({"x": np.ones(3)}, tmp_path / "other")
    with pytest.raises(ValueError, match=r"format 'keras_weightmods\.model'"):
        kwm.load_model(tmp_path / "other")
