import pathlib
import sys

import keras
import numpy as np
import pytest

import keras_weightmods as kwm
from keras_weightmods.core import keras_compat
from keras_weightmods.core.restored import RestoredOnError
from keras_weightmods.saving import description
from tests import models
from tests.faults.states import model_state


def changed(model):
    """Change all that a method may change in a model."""
    first, last = model.layers
    last.enable_lora(2)
    first.kernel.assign(keras.ops.ones(first.kernel.shape))
    first.kernel.constraint = keras.constraints.NonNeg()
    first.trainable = False
    keras_compat.attributes(first)["noted"] = []
    keras_compat.attributes(first)["_build_shapes_dict"].clear()
    kernel = first.kernel
    name = keras_compat.stored_name(first, "kernel")
    keras_compat.remove_variable(first, kernel, name)
    keras_compat.release_value(kernel, "It is gone.")
    keras_compat.track_torch_parameters(model)
    first.__class__ = type("Other", (keras.layers.Dense,), {})
    keras.name_scope("inside").__enter__()
    keras.StatelessScope().__enter__()
    model.optimizer = None


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_error_all_is_as_it_was(error):
    model = models.mlp()
    model.compile("sgd", "mse")
    model_state(model)  # On torch it lists the parameters once.
    before, kernel = model_state(model), model.layers[0].kernel
    value = np.array(kernel)

    with pytest.raises(error):
        with RestoredOnError(model, values=[kernel], released=[kernel]):
            changed(model)
            raise error

    assert model_state(model) == before
    assert model.layers[0].kernel is kernel
    models.assert_same_bits([np.array(kernel)], [value])
    assert keras.Variable(0.0, name="probe").path == "probe"


@pytest.mark.one_backend
def test_a_file_leaves_no_scope_of_keras_open(tmp_path, monkeypatch):
    """Ctrl-C as one of them ends; torch's would make all models empty."""
    path = tmp_path / "model"
    model = models.make_sparse(models.mlp())
    kwm.save_model(model, path)
    kwm.pack(model)

    def interrupted(*_):
        keras.name_scope("left").__enter__()
        keras.StatelessScope().__enter__()
        raise KeyboardInterrupt

    monkeypatch.setattr(description, "build", interrupted)
    for call in (
        lambda: kwm.save_model(model, path),
        lambda: kwm.load_model(path),
        lambda: kwm.export(model, tmp_path / "m.pt2"),
        lambda: kwm.merge([path, path], tmp_path / "merged"),
    ):
        with pytest.raises(KeyboardInterrupt):
            call()
        assert not keras_compat.in_stateless_scope()
        assert keras.Variable(0.0, name="probe").path == "probe"


def test_without_an_error_nothing_is_given_back():
    model = models.mlp()
    with RestoredOnError(model):
        model.layers[0].enable_lora(2)
    assert len(model.weights) == 6


@pytest.mark.one_backend
def test_a_second_interrupt_does_not_stop_it():
    class Interrupted:
        interrupts = 2

        def __array__(self, dtype=None, copy=None):
            return np.zeros(2)

        def assign(self, value):
            self.interrupts -= 1
            if self.interrupts >= 0:
                raise KeyboardInterrupt
            self.value = value

    variable = Interrupted()
    with pytest.raises(RuntimeError):
        with RestoredOnError(values=[variable]):
            raise RuntimeError
    assert variable.value.tolist() == [0, 0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_copies_on_disk_are_the_same_bits(dtype):
    given = np.array([[1e30, -0.0, 1e-40], [1.5, -3.0, 7.0]])
    given = np.minimum(given, 9) if dtype == "int32" else given
    variables = [
        keras.Variable(each, dtype=dtype, trainable=False)
        for each in (given, given[:, :1].T, 3)
    ]
    before = [np.array(keras.ops.convert_to_numpy(v)) for v in variables]
    undo = RestoredOnError(values=variables, on_disk=True)
    with pytest.raises(RuntimeError):
        with undo:
            # In any order, and also within the scope.
            for _ in range(2):
                for variable in variables:
                    variable.assign(keras.ops.zeros_like(variable.value))
                undo.give_values_back()
            for variable in variables[::-1]:
                variable.assign(keras.ops.zeros_like(variable.value))
            raise RuntimeError
    after = [keras.ops.convert_to_numpy(v) for v in variables]
    models.assert_same_bits(after, before)


@pytest.mark.one_backend
@pytest.mark.skipif(
    keras.backend.backend() != "torch",
    reason="only torch's variables have gradients",
)
def test_the_gradients_of_torch_are_given_back():
    model = models.mlp()
    first, last = model.layers
    first.kernel.value.grad = given = keras.ops.ones(first.kernel.shape)
    with pytest.raises(RuntimeError):
        with RestoredOnError(model):
            keras.ops.sum(
                model(np.ones((1, *model.input_shape[1:])))
            ).backward()
            assert last.kernel.value.grad is not None
            raise RuntimeError
    assert first.kernel.value.grad is given
    assert last.kernel.value.grad is None


@pytest.mark.one_backend
@pytest.mark.skipif(sys.platform != "linux", reason="has no full device")
def test_a_full_disk_says_which_folder(monkeypatch):
    model = models.mlp(8, 16, 4)
    full = pathlib.Path("/dev/full")
    monkeypatch.setattr("tempfile.TemporaryFile", lambda: full.open("w+b", 0))

    with pytest.raises(OSError, match="TMPDIR"):
        RestoredOnError(model, values=model.variables, on_disk=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_come_back_from_disk_bit_for_bit(dtype):
    """A NaN, too, and as often as they are asked for."""
    layer = keras.layers.Dense(3, dtype=dtype)
    layer.build((None, 2))
    layer.kernel.assign([[1, -0.0, np.nan], [np.inf, 1 / 3, 1e-30]])
    value = np.array(layer.kernel)
    with RestoredOnError(layer, values=[layer.kernel], on_disk=True) as undo:
        for _ in range(2):
            layer.kernel.assign(np.zeros((2, 3)))
            found = models.numpy(undo.value_of(layer.kernel))
            models.assert_same_bits([found], [value.astype("float32")])
            undo.give_values_back()
            models.assert_same_bits([np.array(layer.kernel)], [value])
        assert undo.value_of(layer.bias) is layer.bias.value
