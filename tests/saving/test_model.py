"""save_model and load_model: the same model, or one clear error."""

import itertools
import json
import os
import random
import threading

import keras
import numpy as np
import pytest
from keras import ops

import keras_weightmods as kwm
from keras_weightmods import native
from keras_weightmods.core import keras_compat
from keras_weightmods.core.reparameterization import reparameterizations
from keras_weightmods.saving import bounded_json, container, description
from tests import models
from tests.backends import breadth
from tests.models import einsum_net, make_sparse, mlp, normal, outputs


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
class Constant(keras.layers.Layer):
    """Keras cannot make its variable without a value, and it says so itself."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        try:
            self.factor = keras.Variable(np.ones(8), name="factor")
        except ValueError as error:
            raise RuntimeError("no factor") from error

    def call(self, x):
        return x * self.factor


@keras.saving.register_keras_serializable("tests.saving")
class Resized(keras.layers.Layer):
    """Assigns what it saves, as KerasHub's DINOv2; it has no array yet then."""

    def build(self, input_shape):
        self.stored = self.add_weight(input_shape[-1:], name="stored")
        self.used = self.add_weight(input_shape[-1:], name="used")

    def call(self, x):
        return x * self.used

    def save_own_variables(self, store):
        self.stored.assign(self.used)
        super().save_own_variables(store)


def with_layer(layer):
    return models.sequential((8,), layer, keras.layers.Dense(4))


def sequential():
    return models.sequential(
        (8,),
        keras.layers.Dense(8, activation="relu"),
        keras.layers.BatchNormalization(),
        keras.layers.Dropout(0.5),
        keras.layers.Dense(4, use_bias=False),
    )


def functional():
    x = inputs = keras.Input((8,))
    shared = keras.layers.Dense(8, name="shared")
    left, right = shared(x), keras.layers.Dense(8)(shared(x))
    # The layer and the operation have one name in their modules.
    x = keras.layers.Add()([left, right]) + 3.0
    return keras.Model(inputs, [mlp(8, 8)(x), left])


def tower():
    model = Tower(depth=3, wide=True)
    # Before a call, in which JAX keeps tracers of what is found.
    model.normalization.adapt(inputs_for(model))
    model(inputs_for(model))
    model.tower[1].trainable = False
    return randomize(model)


def quantized():
    model = mlp(8, 8)
    model.quantize("int8")
    return model


MODELS = {
    "sequential": sequential,
    "functional": functional,
    "tower": tower,
    "einsum": lambda: einsum_net(5),
    "recurrent": lambda: models.sequential(
        (5, 8), keras.layers.Bidirectional(keras.layers.LSTM(4))
    ),
    "bfloat16": lambda: mlp(8, 4, dtype="bfloat16"),
    "mixed": lambda: mlp(8, 4, dtype="mixed_bfloat16"),
    "quantized": quantized,
    "constant": lambda: with_layer(Constant()),
    "resized": lambda: with_layer(Resized()),
}


def inputs_for(model):
    shape = (8,) if isinstance(model, Tower) else model.input_shape[1:]
    return normal(2, *shape)


def randomize(model):
    models.randomize(model)
    for layer in model.layers:
        if isinstance(layer, keras.layers.Normalization):
            layer.adapt(inputs_for(model))  # It keeps what it found twice.
        if isinstance(layer, Resized):
            layer.stored.assign(layer.used)
    return model


def randomize_lora(model):
    for i, weight in enumerate(w for w in model.weights if "lora" in w.name):
        weight.assign(normal(*weight.shape, seed=i))


def states_of(model):
    return [
        (w.name, w.dtype, w.trainable, ops.convert_to_numpy(w).tobytes())
        for w in model.weights
    ]


def changes_of(model):
    return [
        (item.name, item.target.attribute, item.get_config())
        for item in reparameterizations(model)
    ]


def assert_same(received, expected, x=None):
    x = inputs_for(expected) if x is None else x
    assert type(received) is type(expected)
    assert received.name == expected.name
    assert states_of(received) == states_of(expected)
    assert changes_of(received) == changes_of(expected)
    models.assert_same(outputs(received, x), outputs(expected, x))


def round_trip(model, path, x=None, **kwargs):
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


@breadth("name", MODELS, 1, 2)
def test_plain_models(name, path):
    model = randomize(MODELS[name]())
    loaded = round_trip(model, path)
    assert not loaded.compiled
    # It can be saved again, and by Keras, whose file does not have what the
    # config of a Tower forgets.
    kwm.save_model(loaded, path)
    if name != "tower":
        loaded.save(path.with_suffix(".keras"))
        again = keras.saving.load_model(path.with_suffix(".keras"))
        assert states_of(again) == states_of(model)


CHANGES = [
    *(("functional", None), ("mixed", "int8"), ("functional", "scaled")),
    *(("sequential", dtype) for dtype in ("scaled", None, "bfloat16", "int4")),
    *itertools.product(("tower", "einsum", "bfloat16"), ("scaled", "int8")),
    *(("held sequential", "int8"), ("held mixed", "int4")),
    *(("sequential", f"int{bits}") for bits in (2, 3, 5, 6)),
    ("held mixed", "int3"),
]


@breadth(("name", "change"), CHANGES, 0, 1)
@pytest.mark.filterwarnings("ignore")
def test_changed_models(name, change, path, monkeypatch):
    if name.startswith("held "):
        # Dense, without the library.
        monkeypatch.setattr(native, "_loaded", (None, "switched off"))
        name = name.removeprefix("held ")
    model, undo = randomize(MODELS[name]()), kwm.unpack
    if change == "scaled":
        kwm.attach_scaling(model)
        undo = kwm.fold
        randomize(model)
    else:
        kwm.pack(make_sparse(model), dtype=change)
    loaded = round_trip(model, path)
    undo(loaded)
    undo(model)
    assert_same(loaded, model)


@breadth(
    ("head", "is_native"),
    [("int8", True), ("int4", False), ("int3", True), ("int5", False)],
)
@pytest.mark.filterwarnings("ignore")
def test_packed_heads(head, is_native, path, monkeypatch):
    if not is_native:
        monkeypatch.setattr(native, "_loaded", (None, "switched off"))
    embedding = keras.layers.ReversibleEmbedding(5, 70)
    tokens = keras.Input((None,), dtype="int32")
    x = keras.layers.Dense(70, use_bias=False)(embedding(tokens))
    model = keras.Model(tokens, embedding(x, reverse=True))
    make_sparse(randomize(model))
    x = np.array([[0, 4, 2]])
    kwm.pack(model, head=head, targets=[])
    loaded = round_trip(model, path, x)
    ((name, _, config),) = changes_of(loaded)
    form = {"format": f"{head} dense", "trainable": False}
    assert (name, config) == ("packed", {**form, "activations": "int8"})
    before = contents(path)
    # With the library and without, the arrays are the same.
    monkeypatch.undo()
    again = kwm.load_model(path)
    kwm.save_model(again, path)
    before["model.json"] = contents(path)["model.json"]
    models.assert_same(contents(path), before)
    kwm.unpack(again)
    kwm.unpack(loaded)
    assert_same(again, loaded, x)


@pytest.mark.one_backend
def test_packed_in_part_trainable_and_scaled_in_part(path):
    model = make_sparse(einsum_net(5))
    first, second = kwm.find_targets(model)
    kwm.attach_scaling(model, targets=[first], groups=1)
    kwm.pack(model, targets=[second], trainable=True)
    model.layers[1].trainable = False
    loaded = round_trip(model, path)
    assert [name for name, *_ in changes_of(loaded)] == ["scaling", "packed"]
    assert len(loaded.trainable_weights) == len(model.trainable_weights) == 2


@pytest.mark.one_backend
@pytest.mark.parametrize("first", [True, False])
def test_lora_is_merged_and_on_changed_layers_kept(first, path):
    model = sequential()
    model.layers[0].enable_lora(2)
    randomize_lora(model)
    kwm.save_model(model, path)
    x = inputs_for(model)
    found = outputs(kwm.load_model(path), x)
    np.testing.assert_allclose(found, outputs(model, x), rtol=1e-5)
    model = make_sparse(sequential())
    targets = kwm.find_targets(model)
    if first:
        model.layers[0].enable_lora(2, lora_alpha=3)
    kwm.pack(model, targets=targets[:1])
    kwm.attach_scaling(model, targets=targets[1:])
    if not first:
        model.layers[0].enable_lora(2, lora_alpha=3)
    model.layers[3].enable_lora(1)
    randomize_lora(model)
    kwm.save_model(model, path)
    loaded = kwm.load_model(path)
    # LoRA comes after what changes the weights in a loaded layer.
    assert sorted(states_of(loaded)) == sorted(states_of(model))
    models.assert_same(outputs(loaded, x), outputs(model, x))
    assert loaded.layers[0].lora_alpha == 3
    assert loaded.layers[3].lora_rank == 1


class Inner(keras.Model):
    """Has a model that begins inside of another graph."""

    def __init__(self, **kwargs):
        hidden = keras.layers.Dense(8)(keras.Input((8,)))
        inner = keras.Model(hidden, keras.layers.Dense(4)(hidden))
        inputs = keras.Input((8,))
        super().__init__(inputs, inner(inputs), **kwargs)

    def get_config(self):
        return {"name": self.name}


@pytest.mark.one_backend
def test_a_class_that_is_not_registered(path):
    """It has an input that Keras names by the number of a tensor, too."""
    round_trip(Inner(), path, custom_objects={"Inner": Inner})
    with pytest.raises(ValueError, match=r"model\.json(?s:.*)Inner"):
        kwm.load_model(path)


@pytest.mark.one_backend
def test_the_optimizer_is_not_saved_and_the_model_stays_compiled(path):
    model = sequential()
    model.compile("adam", loss=lambda y, z: ops.mean((y - z) ** 2))
    x = inputs_for(model)
    model.fit(x, np.ones((2, 4)), verbose=0)
    loaded = round_trip(model, path)
    assert model.optimizer.built
    assert not loaded.compiled
    np.testing.assert_array_equal(loaded.predict(x), model.predict(x))


@pytest.mark.one_backend
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


@pytest.mark.one_backend
def test_loading_does_not_initialize(path, monkeypatch):
    kwm.save_model(functional(), path)
    monkeypatch.setattr(keras.initializers.GlorotUniform, "__call__", None)
    kwm.load_model(path)


@pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="of torch modules"
)
def test_torch_knows_the_weights_of_a_loaded_model(path):
    model = make_sparse(mlp(16, 16, 4))
    kwm.pack(model)
    kwm.save_model(model, path)
    loaded = kwm.load_model(path)
    for _ in range(2):
        state = loaded.state_dict(keep_vars=True).values()
        assert {*map(id, state)} == {id(v.value) for v in loaded.variables}
        kwm.unpack(loaded)


@pytest.mark.one_backend
def test_vocabularies_are_saved(path):
    lookup = keras.layers.IntegerLookup(vocabulary=[5, 7, 9])
    embedding = keras.layers.Embedding(5, 2)
    model = models.sequential((3,), lookup, embedding, dtype="int64")
    round_trip(model, path, np.array([[5, 9, 1]]))


@pytest.mark.one_backend
def test_another_thread_sees_no_plain_config_while_a_model_is_saved(path):
    model = mlp(8, 8)
    kwm.attach_scaling(model)
    thread = threading.Thread(target=kwm.save_model, args=(model, path))
    thread.start()
    while thread.is_alive():
        with pytest.raises(ValueError, match="fold"):
            model.layers[0].get_config()
    assert path.exists()


@pytest.mark.one_backend
def test_wrong_arguments(tmp_path):
    model = sequential()
    with pytest.raises(ValueError, match="`model` must be a built"):
        kwm.save_model(keras.Sequential(), tmp_path / "file")
    with pytest.raises(ValueError, match=r"model\.safetensors.*of Keras"):
        kwm.save_model(model, tmp_path / "model.KERAS")
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").write_text("before")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        kwm.save_model(model, tmp_path / "file", overwrite=False)
    assert (tmp_path / "file").read_text() == "before"


@keras.saving.register_keras_serializable("tests.saving")
class Unlike(keras.layers.Layer):
    """A layer that is not rebuilt as it was saved."""

    def __init__(self, units=4, more=None, **kwargs):
        super().__init__(**kwargs)
        self._units, self._more = units, more or {}

    def build(self, input_shape):
        self.kernel = self.add_weight((input_shape[-1], self._units))

    def call(self, x):
        return ops.matmul(x, self.kernel)

    def get_config(self):
        return {**super().get_config(), **self._more}


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("make_layer", "match"),
    [
        (lambda: Unlike(6), r"weights/layers/unlike/0 .*\(8, 6\).*\(8, 4\)"),
        (lambda: Unlike(6, {"unknown": 1}), "unknown"),
        (lambda: keras.layers.Lambda(lambda x: 2 * x), "Lambda"),
    ],
)
@pytest.mark.filterwarnings("ignore:The object being serialized includes")
def test_a_model_that_could_not_be_loaded_is_not_saved(
    make_layer, match, tmp_path
):
    model = models.sequential((8,), make_layer())
    with pytest.raises(ValueError, match=match) as error:
        kwm.save_model(model, tmp_path / "file")
    assert "get_config" in str(error.value)
    assert os.listdir(tmp_path) == []


# Files that are whole and hostile: every hash is right.


FORM = "keras_weightmods.model", 1


def contents(path):
    with container.Reader(path, FORM[0], FORM[1:]) as reader:
        return {name: reader.read(name) for name in reader.entries}


def drop(name):
    return lambda arrays: arrays.pop(name)


def add(name, array):
    return lambda arrays: arrays.update({name: array})


def describe(text):
    return add("model.json", np.frombuffer(text, "uint8"))


def edit(change):
    """Return a change of the JSON in `model.json`."""

    def edited(arrays):
        described = json.loads(arrays["model.json"].tobytes())
        result = change(described)
        described = result if isinstance(result, list) else described
        arrays["model.json"] = bounded_json.json_array(described)

    return edited


def put(key, value):
    return edit(lambda d: d.update({key: value}))


def put_change(index, value):
    return edit(lambda d: d["changes"][0].__setitem__(index, value))


def put_part(index, value):
    return edit(lambda d: d["parts"][2].__setitem__(index, value))


def swap_names(described):
    dense = [row for row in described["parts"] if row[1] == "Dense"]
    dense[0][2], dense[1][2] = dense[1][2], dense[0][2]


def layers_of(described):
    return described["config"]["config"]["layers"]


def many_layers(described):
    layers = layers_of(described)
    for number in range(3000):  # which Keras makes in an hour
        layers.append(json.loads(json.dumps(layers[-1])))
        layers[-1]["config"]["name"] = f"d{number}"


def put_layer(**values):
    """Change the config of the last Dense."""
    return edit(lambda d: layers_of(d)[-1]["config"].update(values))


def replace_layer(module, class_name, **values):
    """Put what the config names in the place of the first Dense."""
    values |= {"module": module, "class_name": class_name}
    return edit(lambda d: layers_of(d)[1].update(values))


def replace_by(class_name, **config):
    return replace_layer("keras.layers", class_name, config=config)


def put_kernel(change):
    return lambda arrays: arrays.update({KERNEL: change(arrays[KERNEL])})


def array_of(dtype):
    config = {"value": [0] * 9, "dtype": dtype}
    return {"class_name": "__numpy__", "config": config}


def lora_of_a_plain_layer(described):
    lora = [["layers/dense_1", 10**6, 2]]
    described.update(changes=described["changes"][:1], lora=lora)


KERNEL = "weights/layers/dense/stored_0"
MORE = "weights/layers/dense/2"
LAST = "weights/layers/dense_1/stored_0"
CODE = {"class_name": "__lambda__", "config": {"value": ["4wA=", None, None]}}
PICKLE = "gASVBgAAAAAAAABLAS4="
SYSTEM = {"module": "os", "class_name": "function", "config": "system"}
# What the error says, and changes of the arrays.
# fmt: off
HOSTILE = {
    "Entry `model.json` is missing": [drop("model.json")],
    "Entry `model.json` must be": [
        describe(b"{"), describe(b"\xff\xfe"), describe(b'{"a":1,"a":1}'),
        describe(b"\x80\x04K\x01."),  # a pickle
        add("model.json", np.ones(3, "float32")), describe(b"[" * 10**6),
        describe(b"[" + b"[]," * 10**7 + b"[]]"),
    ],
    "must have the keys": [
        edit(lambda d: [d]), edit(dict.clear), put("code", "import os"),
    ],
    "an array of the dtype": [
        put_layer(units=array_of(dtype))
        for dtype in ("V2000000000", "S500000000", "O", 3, None)
    ],
    "parts of another form": [
        put("parts", [["", "Sequential"]]), put("parts", [3]),
    ],
    "as entry `model.json` describes it": [
        put("config", "keras.Model"), put("config", {}), put("changes", [3]),
        put_change(3, 2), put("lora", [["layers/dense"]]),
        put("lora", [["layers/dense", -1, 2]]), put_layer(units="8"),
        put_layer(dtype="object"), replace_by("TFSMLayer", filepath="/tmp"),
        replace_by("TorchModuleWrapper", module=PICKLE),
        replace_by("StringLookup", vocabulary="/etc/passwd"),
    ],
    "none saved": [put("parts", [])],
    "Conv2D 'dense' saved, Dense 'dense' built": [put_part(1, "Conv2D")],
    "Dense 'other' saved": [put_part(2, "other")],
    # Whose places the weights then do not fit.
    "weights that were saved": [edit(swap_names)],
    "config of the 3 layers that were saved. It has 3003": [edit(many_layers)],
    "none built": [edit(lambda d: layers_of(d).pop())],
    r"built keras\.Model": [edit(lambda d: d.update(config=layers_of(d)[1]))],
    "one change of a weight 'kernel' in layer 'layers/dense'": [
        edit(lambda d: d["changes"].append(d["changes"][0])),
    ],
    "layers/none": [put_change(0, "layers/none")],
    "'bias'": [put_change(1, "bias")],
    "__class__": [put_change(1, "__class__")],
    r"os\.system": [put_change(2, "os.system")],
    "`format`, `trainable` and": [put_change(2, "packed")],
    "groups": [
        put_change(3, {"groups": 2, "code": 1}), put_change(3, {}),
        *(put_change(3, {"groups": n}) for n in (0, True, "2", 10**12)),
    ],
    "kernel_scale": [put_change(3, {"groups": 1})],
    "LoRA in 'none'": [put("lora", [["none", 2, 2]])],
    "LoRA in 'layers/dense_1'": [edit(lora_of_a_plain_layer)],
    "stored_": [
        put("lora", [["layers/dense", 2, 2]]),
        put("lora", [["layers/dense", 10**12, 2]]),
    ],
    LAST: [
        put_layer(units=9), put_layer(units=10**13), put_layer(dtype="float64"),
    ],
    "units": [put_layer(units=-8)],
    "code": [put_layer(code=1)],
    "system": [
        replace_layer("os", "system"),
        put_layer(activation={**SYSTEM, "registered_name": "system"}),
    ],
    "eval": [replace_layer("builtins", "eval", registered_name="eval")],
    "Popen": [replace_layer("subprocess", "Popen")],
    "get_file": [replace_layer("keras.utils", "get_file")],
    "arbitrary code": [
        replace_by("Lambda", function=CODE), put_layer(activation=CODE),
    ],
    KERNEL: [
        put("changes", []), drop(KERNEL),
        put_kernel(lambda kernel: kernel.reshape(4, 16)),
        put_kernel(lambda kernel: kernel.astype("float16")),
        put_kernel(lambda kernel: kernel.view("int32")),
        lambda a: a.update({f"{KERNEL}/x": a.pop(KERNEL)}),
    ],
    MORE: [add(MORE, np.ones(1))],
    "`more/x` is not one of a model": [add("more/x", np.ones(1))],
    "cannot be put in a temporary folder": [
        add(f"assets/{name}", np.ones(1, "uint8"))
        for name in ("../../escaped", "/escaped", "", "x" * 300)
    ],
}
# fmt: on


@pytest.fixture(scope="module")
def scaled_file(tmp_path_factory):
    model = mlp(8, 8, 4, name="sequential")
    kwm.attach_scaling(model)
    path = tmp_path_factory.mktemp("scaled") / "model"
    kwm.save_model(model, path)
    return path


@pytest.mark.one_backend
@pytest.mark.parametrize(
    ("match", "change"),
    [(match, change) for match, found in HOSTILE.items() for change in found],
)
@pytest.mark.filterwarnings("ignore")
def test_hostile_files(match, change, scaled_file, tmp_path, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    arrays = contents(scaled_file)
    change(arrays)
    path = tmp_path / "file"
    container.write_arrays(path, *FORM, arrays)
    # Also where a program has told Keras to allow code.
    with pytest.raises(ValueError, match=match) as error:
        with keras_compat.SafeModeScope(False):
            kwm.load_model(path)
    assert repr(str(path)) in str(error.value)
    assert sorted(os.listdir(tmp_path)) == ["file", "temporary"]
    assert os.listdir(temporary) == []


@pytest.mark.one_backend
@pytest.mark.filterwarnings("ignore:`pack` rounded")
def test_packed_arrays_of_other_sizes_are_refused(tmp_path):
    path, kernel = tmp_path / "file", "kernel_values"
    for bits in (4, 3):
        dense = keras.layers.Dense(20, name="dense")
        model = models.sequential((40,), dense)
        kwm.pack(model, f"int{bits}", verbose=0)
        kwm.save_model(model, path)
        arrays = contents(path)
        (name,) = [name for name in arrays if name.endswith(kernel)]
        values = arrays[name]
        assert values.shape == (2, 2, bits, 16, 4)
        for wrong in (
            *(values[:, :, :-1], values.repeat(2, axis=2), values[1:]),
            *(values.view("int8"), values.reshape(-1)),
        ):
            container.write_arrays(path, *FORM, {**arrays, name: wrong})
            with pytest.raises(ValueError, match=name):
                kwm.load_model(path)
        for wrong, match in (("int6 dense", name), ("int7 dense", "int7")):
            config = {"format": wrong, "trainable": False}
            config["activations"], other = "int8", {**arrays}
            put_change(3, config)(other)
            container.write_arrays(path, *FORM, other)
            with pytest.raises(ValueError, match=match):
                kwm.load_model(path)


@pytest.mark.one_backend
def test_a_seed_that_no_state_holds_is_refused_by_file(tmp_path):
    path = tmp_path / "file"
    dropout = keras.layers.Dropout(0.5, seed=3)
    model = models.sequential((8,), keras.layers.Dense(4), dropout)
    kwm.save_model(model, path)
    arrays = contents(path)
    put_layer(seed=10**30)(arrays)
    container.write_arrays(path, *FORM, arrays)
    with pytest.raises(ValueError, match="cannot be built as entry") as error:
        kwm.load_model(path)
    assert repr(str(path)) in str(error.value)


@pytest.mark.one_backend
def test_a_file_does_not_compile_its_model(scaled_file, tmp_path):
    arrays, path = contents(scaled_file), tmp_path / "file"
    model = mlp(8, 4)
    model.compile("adam", "mse")
    config = model.get_compile_config()
    edit(lambda d: d["config"].update(compile_config=config))(arrays)
    container.write_arrays(path, *FORM, arrays)
    assert not kwm.load_model(path).compiled


@pytest.mark.one_backend
def test_altered_files_are_refused_before_anything_is_built(
    scaled_file, tmp_path, monkeypatch
):
    monkeypatch.setattr(description, "build", None)
    monkeypatch.setattr(keras.saving, "deserialize_keras_object", None)
    data = scaled_file.read_bytes()
    path = tmp_path / "file"
    altered = [data[: len(data) * i // 20] for i in range(20)]
    for i in range(0, len(data), len(data) // 50):
        altered.append(data[:i] + bytes([data[i] ^ 64]) + data[i + 1 :])
    for each in [*altered, data + data]:
        path.write_bytes(each)
        with pytest.raises(ValueError, match=r"Entry|The header|The checksum"):
            kwm.load_model(path)


@keras.saving.register_keras_serializable("tests")
class Tied(keras.Model):
    """A functional model that multiplies by a kernel outside of a layer."""

    def __init__(self, initializer="glorot_uniform", **kwargs):
        inputs = keras.Input((8,))
        layer = keras.layers.Dense(8, kernel_initializer=initializer)
        x = layer(inputs)
        outputs = keras.ops.matmul(x, keras.ops.transpose(layer.kernel))
        super().__init__(inputs, outputs, **kwargs)
        self.initializer = initializer

    def get_config(self):
        return {"initializer": self.initializer}


@pytest.mark.one_backend
def test_a_graph_that_keeps_the_value_of_a_variable_is_refused(tmp_path):
    path = tmp_path / "model"
    with pytest.raises(ValueError, match="none of its weights"):
        kwm.save_model(Tied(), path)
    assert not path.exists()
    # One that would be the same again is fine.
    round_trip(Tied("ones"), path)
