"""The gradient of distillation on torch, in the memory of its inputs.

Run eagerly, each new array of logits costs more than the numbers in it.
"""


def gradient(log_p, soft, q, labels, by_label, by_teacher):
    """Return the gradient; as `_gradient` in `ops.distillation`."""
    is_same = soft is log_p
    slope = log_p.exp_().mul_(by_label + by_teacher if is_same else by_label)
    if is_same:
        slope.addcmul_(q, by_teacher, value=-1)
    elif q is not None:
        slope.add_(soft.exp_().sub_(q).mul_(by_teacher))
    return slope.scatter_add_(1, labels.long(), -by_label)
