"""The gradients of a model's loss, on JAX."""

import jax
import keras


def loss_gradients(model, variables, x, y, sample_weight):
    def loss(values):
        mapping = list(zip(variables, values))
        with keras.StatelessScope(state_mapping=mapping):
            return model.compute_loss(
                x, y, model(x, training=False), sample_weight, training=False
            )

    return jax.grad(loss)([v.value for v in variables])
