import contextlib
import json
import os
import pathlib
import threading
import warnings

import keras
import numpy as np
import pytest

import keras_weightmods as kwm
from keras_weightmods.cli import main as cli
from keras_weightmods.core.reparameterization import reparameterizations
from keras_weightmods.exporting import export as module
from keras_weightmods.ops.sparse_matmul import reason_for_dense
from tests import models

BACKEND = keras.backend.backend()
X = models.normal(1, 64)
FLOATS = "float32"  # int8 activations are not exported


@contextlib.contextmanager
def left_alone(model):
    """Assert that an export changes nothing of a model."""

    def parts():
        optimizer = getattr(model, "optimizer", None)
        found = *model.weights, *reparameterizations(model), optimizer
        return list(map(id, found))

    before, weights = parts(), models.weights_of(model)
    yield (expected := models.outputs(model, X))
    assert parts() == before
    models.assert_same_bits(models.weights_of(model), weights)
    models.assert_same(models.outputs(model, X), expected)


def packed(dtype="int8"):
    model = models.make_sparse(models.mlp(64, 32, 8))
    kwm.pack(model, dtype=dtype, activations=FLOATS)
    return model


def by_tensorflow(path):
    import tensorflow as tf

    loaded = tf.saved_model.load(path)
    return loaded.serve(X).numpy()


def by_onnxruntime(path):
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    return session.run(None, {session.get_inputs()[0].name: X})[0]


def by_openvino(path):
    import openvino

    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    return openvino.compile_model(path, "CPU", exact)(X)[0]


def by_litert(path):
    import tensorflow as tf

    runner = tf.lite.Interpreter(path)
    runner.allocate_tensors()
    runner.set_tensor(runner.get_input_details()[0]["index"], X)
    runner.invoke()
    return runner.get_tensor(runner.get_output_details()[0]["index"])


def by_torch(path):
    import torch

    loaded = torch.export.load(path).module()
    return loaded(torch.from_numpy(X)).detach().numpy()


RUNNERS = {
    "tf_saved_model": (by_tensorflow, "tensorflow"),
    "torch": (by_torch, "torch"),
    "onnx": (by_onnxruntime, "onnxruntime"),
    "openvino": (by_openvino, "openvino"),
    "litert": (by_litert, "tensorflow"),
}


@pytest.mark.parametrize(
    "format",
    [
        *("tf_saved_model", "torch"),
        pytest.param("onnx", marks=pytest.mark.one_backend),
        pytest.param("openvino", marks=pytest.mark.heavy),
        pytest.param("litert", marks=pytest.mark.heavy),
    ],
)
def test_a_packed_model_runs_dense(format, tmp_path):
    needed = module.FORMATS[format].needs.get(BACKEND)
    if needed is None:
        pytest.skip(f"{format} is not written on {BACKEND}")
    for name in (*needed, RUNNERS[format][1]):
        pytest.importorskip(name)
    model = packed()
    path = tmp_path / ("model" + module.FORMATS[format].ending)
    with left_alone(model) as expected:
        exported = model
        if format == "onnx":
            # One that was never called.
            kwm.save_model(model, tmp_path / "model.safetensors")
            exported = kwm.load_model(tmp_path / "model.safetensors")
            os.remove(tmp_path / "model.safetensors")
        with pytest.warns(UserWarning, match="2 packed weights .* dense form"):
            kwm.export(exported, path, format=format)
        found = RUNNERS[format][0](str(path))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    sidecar = {"openvino": ["model.bin"]}.get(format, [])
    assert sorted(os.listdir(tmp_path)) == sorted([path.name, *sidecar])


# tests/test_runtime.py has packed kernels of Dense layers, on TensorFlow too.
@pytest.mark.skipif(BACKEND != "torch", reason="the format is torch's")
@pytest.mark.parametrize("keep_packed", [False, True])
def test_a_language_model(keep_packed, tmp_path):
    pytest.importorskip("keras_hub")
    torch = pytest.importorskip("torch", "2.10" if keep_packed else None)
    model = models.causal_lm("llama3", tie_word_embeddings=True)
    # The dense form has inputs in floats.
    dense = {} if keep_packed else {"head": None, "activations": FLOATS}
    kwm.pack(models.make_sparse(model), "int8", **dense)
    ids = np.array([[3, 1, 4, 1, 5]], "int32")
    x = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    expected = models.outputs(model, x)
    specs = {n: keras.InputSpec("int32", (1, 5), name=n) for n in x}
    path = str(tmp_path / "model.pt2")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*dense form")
        options = {"keep_packed": keep_packed, "input_signature": [specs]}
        kwm.export(model, path, "torch", **options)
    inputs = {name: torch.from_numpy(each) for name, each in x.items()}
    found = models.numpy(torch.export.load(path).module()(inputs))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.one_backend
def test_another_thread_sees_the_packed_model_meanwhile(tmp_path, monkeypatch):
    model, seen = packed("int4"), []
    for layer in model.layers:
        layer.enable_lora(2)
    model.compile("adam", "mse")
    y = np.ones((1, 8), "float32")
    model.fit(X, y, verbose=0)

    def state():
        parts = *map(type, model.layers), *model.weights, *model.layers
        return list(map(id, parts)), models.outputs(model, X).tolist()

    def writer(dense):
        assert not reparameterizations(dense)
        expected = models.outputs(model, X)
        np.testing.assert_allclose(
            models.outputs(dense, X), expected, atol=1e-5
        )

        def write(path, progress):
            thread = threading.Thread(target=lambda: seen.append(state()))
            thread.start()
            thread.join()
            pathlib.Path(path).touch()

        return write

    looking = module.ExportFormat(writer, ".pt2")
    monkeypatch.setitem(module.FORMATS, "torch", looking)
    before, steps = state(), int(model.optimizer.iterations)
    with left_alone(model), pytest.warns(UserWarning, match="dense form"):
        kwm.export(model, tmp_path / "model.pt2", "torch")
    assert seen == [before]
    model.fit(X, y, verbose=0)
    assert int(model.optimizer.iterations) == steps + 1


@keras.saving.register_keras_serializable("tests.exporting")
class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = keras.layers.Dense(4)

    def call(self, x):
        return self.dense(x)


def with_a_preprocessor_of_its_own():
    normalization = keras.layers.Normalization(mean=1.0, variance=4.0)
    model = models.sequential((64,), normalization, keras.layers.Dense(4))
    model.preprocessor = normalization
    return model


@pytest.mark.one_backend
@pytest.mark.parametrize("make", [Subclassed, with_a_preprocessor_of_its_own])
def test_copies_of_models_that_are_no_plain_graph(make, tmp_path):
    model, path = make(), tmp_path / "model.pt2"
    model(X)
    kwm.pack(models.make_sparse(model), activations=FLOATS)
    with (
        left_alone(model) as expected,
        pytest.warns(UserWarning, match="dense"),
    ):
        kwm.export(model, path, "torch")
    np.testing.assert_allclose(by_torch(path), expected, atol=1e-5)


@pytest.mark.one_backend
def test_a_model_that_cannot_be_copied_is_refused(tmp_path):
    class Unregistered(keras.layers.Dense):
        def __init__(self, size, **kwargs):
            super().__init__(size.value, **kwargs)

    class Size:
        value = 8

    class WithoutConfig(Subclassed):
        def __init__(self, size):
            super().__init__()

    layer = Unregistered(Size())
    for model, match in (
        (models.sequential((64,), layer), r"built again.*kwm\.unpack"),
        (WithoutConfig(Size()), r"(?s)get_config.*kwm\.unpack"),
    ):
        model(X)
        kwm.pack(models.make_sparse(model))
        with left_alone(model), pytest.raises(ValueError, match=match):
            kwm.export(model, tmp_path / "model.pt2", "torch")
    assert os.listdir(tmp_path) == []


@pytest.mark.one_backend
def test_an_error_leaves_the_model_and_the_folder(tmp_path, monkeypatch):
    def fail(path, progress):
        pathlib.Path(path).touch()
        raise RuntimeError("in the middle")

    failing = module.ExportFormat(lambda model: fail, ".pt2")
    monkeypatch.setitem(module.FORMATS, "torch", failing)
    model = packed()
    with left_alone(model), pytest.warns(UserWarning, match="dense form"):
        with pytest.raises(RuntimeError, match="in the middle"):
            kwm.export(model, tmp_path / "model.pt2", "torch")
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(BACKEND != "torch", reason="the format is torch's")
def test_a_full_disk_is_told(tmp_path):
    resource = pytest.importorskip("resource")
    (path := tmp_path / "model.pt2").touch()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Where torch began to write, it would end this process.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(OSError, match=r"model\.pt2"):
            kwm.export(models.mlp(64, 8), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.listdir(tmp_path) == ["model.pt2"]
    assert path.read_bytes() == b""


@pytest.mark.one_backend
def test_files_of_two_exports_never_stand_together(tmp_path, monkeypatch):
    moves, move = [], os.replace

    def writer(model, stop=9):
        def write(path, progress):
            for ending in (".xml", ".bin"):
                pathlib.Path(path).with_suffix(ending).write_text(f"{stop}")

        return write

    def replace(start, end):
        moves.append(sorted(p.name for p in tmp_path.glob("model.*")))
        if len(moves) == stop:
            raise KeyboardInterrupt
        move(start, end)

    two = module.ExportFormat(writer, ".xml")
    monkeypatch.setitem(module.FORMATS, "openvino", two)
    model, path = models.mlp(64, 8), tmp_path / "model.xml"
    kwm.export(model, path)
    names = ["model.bin", "model.xml"]
    monkeypatch.setattr(os, "replace", replace)
    for stop in (1, 2, 3, 4, 9):
        moves.clear()
        if stop < 9:
            with pytest.raises(KeyboardInterrupt):
                kwm.export(model, path, stop=stop)
        else:
            kwm.export(model, path, stop=stop)
        assert sorted(os.listdir(tmp_path)) == names
        assert len({(tmp_path / name).read_text() for name in names}) == 1
    assert moves == [names, names[:1], [], names[:1]]


@pytest.mark.one_backend
def test_what_is_refused(tmp_path, monkeypatch):
    model, unbuilt = packed(), keras.Sequential()
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").touch()
    (tmp_path / "model.gguf").touch()
    other = module.ExportFormat(None, ".tflite", {"none": ()})
    monkeypatch.setitem(module.FORMATS, "other", other)
    find = module.importlib.util.find_spec
    missing = {"onnx", "tf2onnx", "jax2onnx", "gguf"}
    monkeypatch.setattr(
        module.importlib.util,
        "find_spec",
        lambda name: None if name in missing else find(name),
    )
    kept, hub = {"keep_packed": True}, "transformers"
    for match, given, name, format, options in (
        ("`format` must be one of", model, "model", "h5", {}),
        ("ending '.onnx'", model, "model", "onnx", {}),
        # A folder of such a name would be taken for the file.
        ("a folder, with none of the endings .*.gguf", model, "a.pt2", hub, {}),
        ("one of the endings .*'.*a.h5'", model, "a.h5", None, {}),
        ("one of the endings .*'.*a.keras'", model, "a.keras", None, {}),
        ("pip install gguf", model, "a.gguf", None, {}),
        ("a folder that exists", model, "x/y", hub, {}),
        ("a built", unbuilt, "model", hub, {}),
        ("KerasHub model", model, "model", hub, {}),
        ("that was exp", model, "full", hub, {}),
        ("overw", model, "model.gguf", "gguf", {"overwrite": False}),
        ("pip install .*onnx", model, "a.onnx", "onnx", {}),
        ("pip install gguf", model, "model.gguf", "gguf", {}),
        ("kept in these .*'onnx' on torch", model, "a.tflite", "litert", kept),
        ("is written on", model, "a.tflite", "other", {}),
    ):
        errors = ValueError, ImportError, FileExistsError
        with pytest.raises(errors, match=match):
            kwm.export(given, tmp_path / name, format, **options)
    assert sorted(os.listdir(tmp_path)) == ["full", "model.gguf"]


@pytest.mark.heavy
@pytest.mark.skipif(
    BACKEND == "torch" or bool(reason_for_dense()),
    reason="torch runs the compiled kernels from a file, or there are none",
)
def test_keras_own_export_writes_no_packed_kernels_where_it_cannot(tmp_path):
    # No file that would compute something else: the calls are refused.
    format, match = {
        "jax": ("tf_saved_model", "custom calls"),
        "tensorflow": ("litert", "custom_call"),
    }[BACKEND]
    path = tmp_path / ("model" + module.FORMATS[format].ending)
    model = packed()
    with pytest.raises(Exception, match=match):
        model.export(str(path), format=format, verbose=False)
    assert not path.is_file()
    assert {"export", "get_config", "save_to_preset"}.isdisjoint(vars(model))


@pytest.mark.one_backend
def test_a_format_from_outside(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "FORMATS", dict(module.FORMATS))

    def writer(model, digits=3):
        def write(path, progress):
            values = [np.round(w, digits).tolist() for w in model.get_weights()]
            pathlib.Path(path).write_text(json.dumps(values))
            progress.add()

        return write

    kwm.register_export_format("json", writer, ending=".json")
    with pytest.raises(ValueError, match="another name"):
        kwm.register_export_format("json", writer)
    model, path = packed(), tmp_path / "model.json"
    with left_alone(model), pytest.warns(UserWarning, match="dense form"):
        kwm.export(model, path, "json", digits=2)
    sizes = [len(each) for each in json.loads(path.read_text())]
    assert sizes == [64, 32, 32, 8]
    kwm.save_model(model, tmp_path / "model.safetensors")
    line = "export model.safetensors --set digits=2 -o a.json"
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="dense form"):
        assert cli.main(line.split()) == 0
    assert (tmp_path / "a.json").read_bytes() == path.read_bytes()
