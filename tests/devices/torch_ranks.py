"""AdamS, LIFT and LoRA on two processes of torch, by DistributedDataParallel.

    KERAS_BACKEND=torch python -m tests.devices.torch_ranks

Starts the second process itself. Each rank has half of each batch; its weights
must be those of one process with the whole.
"""

import os
import tempfile

import keras
import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

import keras_weightmods as kwm
from tests.models import mlp, normal, weights_of

X, Y = normal(16, 8), normal(16, 4, seed=1)
STEPS, RANKS = 4, 2


def main():
    with tempfile.TemporaryDirectory() as folder:
        address = f"file://{os.path.join(folder, 'ranks')}"
        mp.spawn(run, (address,), nprocs=RANKS)


def run(rank, address):
    dist.init_process_group("gloo", address, rank=rank, world_size=RANKS)
    for prepare in (adam_s, lift, lora):
        alone = trained(prepare(), slice(None), lambda model: model)
        rows = slice(rank, None, RANKS)
        parallel = trained(prepare(), rows, DistributedDataParallel)
        check(prepare.__name__, parallel, alone)
    dist.destroy_process_group()


def adam_s():
    model = mlp(8, 16, 4)
    options = {"total_steps": STEPS, "decay": "relative", "targets": model}
    model.compile(kwm.AdamS(0.01, **options), "mse")
    return model


def lift():
    model = mlp(8, 16, 4)
    model.compile(kwm.SparseAdamW(0.01), "mse")
    kwm.PrincipalMaskCallback(0.25, None, 2, seed=0).attach(model)
    return model


def lora():
    model = mlp(8, 16, 4)
    for layer in model.layers:
        layer.enable_lora(2)
    # Made anew around the layers, for torch to see the variables of LoRA.
    model = keras.Model(model.inputs, model.outputs)
    model.compile(keras.optimizers.Adam(0.01), "mse")
    return model


def trained(model, rows, wrap):
    """Train on some rows of each batch, by a loop over batches of 8."""
    module = wrap(model)
    optimizer = model.optimizer
    for step in range(STEPS):
        batch = np.arange(8) + 8 * (step % 2)
        x, y = (torch.as_tensor(a[batch[rows]]) for a in (X, Y))
        model.zero_grad()
        torch.mean((module(x) - y) ** 2).backward()
        variables = model.trainable_variables
        optimizer.apply([v.value.grad for v in variables], variables)
    return weights_of(model)


def check(name, found, expected):
    """Compare the ranks with each other, and with one process."""
    own = torch.as_tensor(np.concatenate([w.ravel() for w in found]))
    first = own.clone()
    dist.broadcast(first, 0)
    assert torch.equal(own, first), name
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6, err_msg=name)
    if dist.get_rank() == 0:
        print(f"{name}: equal to one process", flush=True)


if __name__ == "__main__":
    main()
