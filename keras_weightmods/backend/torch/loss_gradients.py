"""The gradients of a model's loss, on torch."""

import torch


def loss_gradients(model, variables, x, y, sample_weight):
    with torch.enable_grad():
        loss = model.compute_loss(
            x, y, model(x, training=False), sample_weight, training=False
        )
        return torch.autograd.grad(loss, [v.value for v in variables])
