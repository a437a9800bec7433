import contextlib
import importlib.metadata
import json
import os
import pathlib
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
from tests.backends import breadth

BACKEND = keras.backend.backend()
X = models.normal(1, 64)
FLOATS = "float32"  # int8 activations are not exported


@contextlib.contextmanager
def left_alone(model):
    """Assert that an export changes nothing of a model."""
    optimizer = getattr(model, "optimizer", None)
    before = models.weights_of(model), list(map(id, model.weights))
    items = list(map(id, reparameterizations(model)))
    expected = models.outputs(model, X)
    yield expected
    assert list(map(id, model.weights)) == before[1]
    assert list(map(id, reparameterizations(model))) == items
    models.assert_same_bits(models.weights_of(model), before[0])
    models.assert_same(models.outputs(model, X), expected)
    assert getattr(model, "optimizer", None) is optimizer


def packed(dtype="int8", **kwargs):
    model = models.make_sparse(models.mlp(64, 32, 8))
    kwargs = {"activations": FLOATS, **kwargs}
    kwm.pack(model, dtype=dtype, **kwargs)
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
    "onnx": (by_onnxruntime, "onnxruntime"),
    "openvino": (by_openvino, "openvino"),
    "litert": (by_litert, "tensorflow"),
    "torch": (by_torch, "torch"),
}


def skip_where_it_cannot_be_run(format):
    needed = module.FORMATS[format].needs.get(BACKEND)
    if needed is None:
        pytest.skip(f"{format} is not written on {BACKEND}")
    for name in (*needed, RUNNERS[format][1]):
        pytest.importorskip(name)


@pytest.mark.parametrize("format", RUNNERS)
def test_a_packed_model_runs_dense(format, tmp_path):
    skip_where_it_cannot_be_run(format)
    model = packed()
    path = tmp_path / ("model" + module.FORMATS[format].ending)
    with left_alone(model) as expected:
        with pytest.warns(UserWarning, match="2 packed weights .* dense form"):
            kwm.export(model, path, format=format)
        found = RUNNERS[format][0](str(path))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    sidecar = {"openvino": ["model.bin"]}.get(format, [])
    assert sorted(os.listdir(tmp_path)) == sorted([path.name, *sidecar])


@pytest.mark.parametrize("format", ["tf_saved_model", "torch"])
def test_packed_kernels_are_kept_where_they_can_be(format, tmp_path):
    skip_where_it_cannot_be_run(format)
    model = packed(activations="int8")
    path = tmp_path / ("model" + module.FORMATS[format].ending)
    if (format, BACKEND) not in (
        ("tf_saved_model", "tensorflow"),
        ("torch", "torch"),
    ):
        with pytest.raises(ValueError, match="kept in 'tf_saved_model'"):
            kwm.export(model, path, format=format, keep_packed=True)
        return
    with left_alone(model) as expected:
        if importlib.metadata.version(BACKEND).startswith("2.9."):
            with pytest.raises(ValueError, match=r"Upgrade.*torch 2\.9"):
                kwm.export(model, path, format=format, keep_packed=True)
            assert not path.exists()
            return
        kwm.export(model, path, format=format, keep_packed=True)
        found = RUNNERS[format][0](str(path))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("keep_packed", [False, True])
def test_a_language_model(keep_packed, tmp_path):
    pytest.importorskip("keras_hub")
    format = "torch" if BACKEND == "torch" else "tf_saved_model"
    skip_where_it_cannot_be_run(format)
    if keep_packed and BACKEND == "jax":
        pytest.skip("a SavedModel of JAX has no packed kernels")
    model = models.causal_lm("llama3", tie_word_embeddings=True)
    # The dense form has inputs in floats.
    dense = {} if keep_packed else {"head": None, "activations": FLOATS}
    kwm.pack(models.make_sparse(model), "int8", **dense)
    ids = np.array([[3, 1, 4, 1, 5]], "int32")
    x = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    expected = models.outputs(model, x)
    specs = {n: keras.InputSpec("int32", (1, 5), name=n) for n in x}
    path = str(tmp_path / ("model" + module.FORMATS[format].ending))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*dense form")
        kwm.export(
            model,
            path,
            format,
            keep_packed=keep_packed,
            input_signature=[specs],
        )
    if format == "torch":
        import torch

        inputs = {name: torch.from_numpy(each) for name, each in x.items()}
        found = models.numpy(torch.export.load(path).module()(inputs))
    else:
        import tensorflow as tf

        loaded = tf.saved_model.load(path)
        found = loaded.serve(x).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)


@breadth("dtype", [None, "int4"], 1)
def test_the_scope_of_dense_weights_leaves_no_trace(dtype):
    model = models.make_sparse(models.mlp(64, 32, 8))
    kwm.pack(model, dtype=dtype)
    for layer in model.layers:
        layer.enable_lora(2)
    model.compile("adam", "mse")
    y = np.ones((1, 8), "float32")
    model.fit(X, y, verbose=0)
    steps = int(model.optimizer.iterations)
    with left_alone(model):
        with module.seam.stored_weights(model) as items:
            assert len(items) == 2
            assert not reparameterizations(model)
            kernels = [w for w in model.weights if w.name == "kernel"]
            assert len(kernels) == 2
    model.fit(X, y, verbose=0)
    assert int(model.optimizer.iterations) == steps + 1


def test_an_error_leaves_the_model_and_the_folder(tmp_path, monkeypatch):
    format = {"jax": "tf_saved_model"}.get(BACKEND, "openvino")
    skip_where_it_cannot_be_run(format)
    model = packed()
    path = tmp_path / ("model" + module.FORMATS[format].ending)

    def fail(self, path, *args, **kwargs):
        pathlib.Path(path).touch()
        raise RuntimeError("in the middle")

    monkeypatch.setattr(keras.Model, "export", fail)
    with left_alone(model), pytest.warns(UserWarning, match="dense form"):
        with pytest.raises(RuntimeError, match="in the middle"):
            kwm.export(model, path, format=format)
    assert os.listdir(tmp_path) == []


def refused(error, match, model, *args, **kwargs):
    with pytest.raises(error, match=match):
        kwm.export(model, *args, **kwargs)


def test_what_is_refused(tmp_path, monkeypatch):
    model = packed()
    path = tmp_path / "model"
    refused(ValueError, "`format` must be one of", model, path, "h5")
    refused(ValueError, "ending '.onnx'", model, path, "onnx")
    refused(ValueError, "a folder that exists", model, path / "x" / "y")
    refused(ValueError, "a built", keras.Sequential(), path)
    refused(ValueError, "KerasHub model", model, path, "transformers")
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").touch()
    refused(ValueError, "a folder that was exp", model, full, "transformers")
    file = tmp_path / "model.gguf"
    file.touch()
    refused(FileExistsError, "overw", model, file, "gguf", overwrite=False)
    missing = {"litert_torch", "tf2onnx", "jax2onnx", "onnx", "gguf"}
    find = module.importlib.util.find_spec
    monkeypatch.setattr(
        module.importlib.util,
        "find_spec",
        lambda name: None if name in missing else find(name),
    )
    for format in ("onnx", "gguf"):
        path = tmp_path / f"model.{format}"
        refused(ImportError, "Install with: pip install", model, path, format)
    if BACKEND != "torch":
        path = tmp_path / "model.pt2"
        refused(ValueError, "is written on torch alone", model, path, "torch")
    assert sorted(os.listdir(tmp_path)) == ["full", "model.gguf"]


@pytest.mark.one_backend
def test_a_model_that_was_loaded_and_never_called(tmp_path):
    skip_where_it_cannot_be_run("onnx")
    model, path = packed(), tmp_path / "model.safetensors"
    kwm.save_model(model, path)
    onnx = tmp_path / "model.onnx"
    with pytest.warns(UserWarning, match="dense form"):
        kwm.export(kwm.load_model(path), onnx, "onnx")
    expected = models.outputs(model, X)
    np.testing.assert_allclose(by_onnxruntime(onnx), expected, atol=1e-5)


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
def test_a_format_from_outside(tmp_path, monkeypatch, capsys):
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
    assert [len(each) for each in json.loads(path.read_text())] == [
        64,
        32,
        32,
        8,
    ]
    kwm.save_model(model, tmp_path / "model.safetensors")
    line = "export model.safetensors --format json --set digits=2 -o a.json"
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="dense form"):
        assert cli.main(line.split()) == 0
    assert (tmp_path / "a.json").read_bytes() == path.read_bytes()
