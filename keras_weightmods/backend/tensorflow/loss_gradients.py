"""The gradients of a model's loss, on TensorFlow."""

import tensorflow as tf


def loss_gradients(model, variables, x, y, sample_weight):
    with tf.GradientTape() as tape:
        loss = model.compute_loss(
            x, y, model(x, training=False), sample_weight, training=False
        )
    return tape.gradient(loss, [v.value for v in variables])
