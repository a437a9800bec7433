"""The update of SparseAdamW on torch, in place.

A new tensor for every kernel would cost a copy of the model at each step.
"""

import torch


@torch.no_grad()
def update(optimizer, variable, gradient, indices, state, weight_decay):
    """Updates one variable and its two moments.

    Args:
        optimizer: A built `SparseAdamW`.
        variable: `keras.Variable`.
        gradient: Tensor, compact where there are indices.
        indices: `keras.Variable` with the entries to update; None for all.
        state: Pair of `keras.Variable`, the moments.
        weight_decay: Float.
    """
    weight = variable.value.data
    flat = weight.contiguous().view(-1)
    places = None if indices is None else indices.value.data.long()
    entries = flat if places is None else flat.index_select(0, places)
    count = int(optimizer.iterations) + 1.0
    # The kernel of `torch.optim.AdamW(fused=True)`, whose public form would
    # count the steps by itself.
    torch._fused_adamw_(
        [entries],
        [gradient.to(entries.dtype).reshape(-1)],
        [moment.value.data.view(-1) for moment in state[:1]],
        [moment.value.data.view(-1) for moment in state[1:]],
        [],
        [torch.tensor(count, device=weight.device)],
        lr=float(optimizer.learning_rate),
        weight_decay=weight_decay,
        beta1=optimizer.beta_1,
        beta2=optimizer.beta_2,
        eps=optimizer.epsilon,
        amsgrad=False,
        maximize=False,
    )
    if places is not None:
        flat.index_copy_(0, places, entries)
    if flat.data_ptr() != weight.data_ptr():
        weight.copy_(flat.view(weight.shape))
