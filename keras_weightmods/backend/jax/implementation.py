"""See `backend.interface`."""

import importlib

import jax
import jax.numpy as jnp
import keras
import numpy as np


def vjp(function, *inputs):
    return jax.vjp(function, *inputs)


def loss_gradients(model, variables, x, y, sample_weight):
    def loss(values):
        mapping = list(zip(variables, values))
        with keras.StatelessScope(state_mapping=mapping):
            return model.compute_loss(
                x, y, model(x, training=False), sample_weight, training=False
            )

    return jax.grad(loss)([v.value for v in variables])


def full_precision():
    return jax.default_matmul_precision("highest")


def compiled(function, static=()):
    program = jax.jit(function, static_argnums=static)

    def call(*args):
        # Also where a forward pass is run op by op.
        with jax.disable_jit(False):
            return program(*args)

    return call


def fused(function):
    return function


def compiled_call(layer):
    # `Model.predict_on_batch` hands all weights out and takes them back, which
    # for a language model takes as long as a row of tokens does.
    @jax.jit
    def stateless(trainable, non_trainable, inputs):
        outputs, _ = layer.stateless_call(
            trainable, non_trainable, inputs, training=False
        )
        return outputs

    def call(inputs):
        return stateless(
            [v.value for v in layer.trainable_variables],
            [v.value for v in layer.non_trainable_variables],
            inputs,
        )

    return call


def after(tensors, first):
    if not tensors:
        return tensors
    numbers = [jnp.reshape(x, (-1,))[0].astype("float32") for x in first]
    # Sorted, since XLA computes a sum anew in all that need it.
    number = jnp.sort(jnp.stack(numbers))[0]
    # Always, also where it is NaN; but XLA does not know.
    is_there = jnp.logical_not(number > jnp.abs(number))
    return [jnp.where(is_there, x, -x) for x in tensors]


def view_of(tensor):
    if [device.platform for device in tensor.devices()] == ["cpu"]:
        return np.asarray(tensor)
    return None


def array_of(tensor):
    return keras.ops.convert_to_numpy(tensor)


def tensor_of(array):
    # In the memory of the array where it is aligned. Without the dtype JAX
    # makes a copy.
    return jnp.asarray(array, dtype=array.dtype)


def layouts():
    return _module("layouts")


def processes():
    if jax.process_count() == 1:
        return None
    return _module("processes")


def in_place():
    return None


def products():
    return _module("sparse_matmul")


def gpu_products():
    return _module("sparse_matmul_gpu")


def attention():
    return _module("attention")


def generation():
    return _module("generation")


def _module(name):
    return importlib.import_module(f"keras_weightmods.backend.jax.{name}")
