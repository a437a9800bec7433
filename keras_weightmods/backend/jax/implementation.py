"""See `backend.interface`."""

import jax
import jax.numpy as jnp
import numpy as np

from keras_weightmods.backend.interface import Backend


class _JAX(Backend):
    def vjp(self, function, *inputs):
        return jax.vjp(function, *inputs)

    def full_precision(self):
        return jax.default_matmul_precision("highest")

    def compiled(self, function, static=()):
        program = jax.jit(function, static_argnums=static)

        def call(*args):
            # Also where a forward pass is run op by op.
            with jax.disable_jit(False):
                return program(*args)

        return call

    def compiled_call(self, layer):
        # `Model.predict_on_batch` hands all weights out and takes them back,
        # which for a language model takes as long as a row of tokens does.
        @jax.jit
        def stateless(values, inputs):
            return layer.stateless_call(*values, inputs, training=False)[0]

        def call(inputs):
            groups = layer.trainable_variables, layer.non_trainable_variables
            return stateless([[v.value for v in g] for g in groups], inputs)

        return call

    def after(self, tensors, first):
        if not tensors:
            return tensors
        numbers = [jnp.reshape(x, (-1,))[0].astype("float32") for x in first]
        # Sorted, since XLA computes a sum anew in all that need it.
        number = jnp.sort(jnp.stack(numbers))[0]
        # Always, also where it is NaN; but XLA does not know.
        is_there = jnp.logical_not(number > jnp.abs(number))
        return [jnp.where(is_there, x, -x) for x in tensors]

    def view_of(self, tensor):
        if [device.platform for device in tensor.devices()] == ["cpu"]:
            return np.asarray(tensor)
        return None

    def tensor_of(self, array):
        # In the memory of the array where it is aligned. Without the dtype JAX
        # makes a copy.
        return jnp.asarray(array, dtype=array.dtype)

    def processes(self):
        several = jax.process_count() > 1
        return self._module("processes") if several else None


backend = _JAX()
