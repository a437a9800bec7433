"""Masks and constraints of kernels, which are not to contradict."""

import keras
from keras import ops

from keras_weightmods.core.targets import Target
from keras_weightmods.utils.checks import raise_all


def check_patterns(targets: list[Target], keep_pattern: bool) -> None:
    """Raise ValueError if masks contradict constraints or zeros that stay.

    Args:
        targets: The kernels to mask.
        keep_pattern: Bool, as in `PrincipalMaskCallback`.
    """
    constrained, others = [], []
    for target in targets:
        constraint = target.variable.constraint
        if getattr(constraint, "keeps_pattern", False):
            constrained.append(target)
        elif constraint is not None:
            others.append(f"{target.path!r} with {type(constraint).__name__}")
    raise_all(
        "A constraint acts on whole kernels, and would change entries outside "
        "of their masks. Leave these kernels out of `targets`, or take the "
        "constraints off (`layer.kernel.constraint = None`). Received:",
        others,
    )
    for target in constrained:
        variable = target.variable
        if not keep_pattern:
            raise ValueError(
                "A kernel with a constraint to a pattern has zeros that a "
                "mask may hold. Pass `keep_pattern=True`, which trains "
                "entries that are not zero, or call "
                "`SemiStructuredSparse.detach(model)` first. Received: "
                f"{target.path!r} with {type(variable.constraint).__name__}"
            )
        if ops.any(variable.constraint(variable) != variable.value):
            raise ValueError(
                "A kernel with a constraint to a pattern must be in it "
                "before masks are chosen. Call `SemiStructuredSparse."
                f"attach(model)` first. Received: {target.path!r}"
            )
    # Of a model with constraints, what has none may be dense.
    if keep_pattern and not constrained:
        for target in targets:
            if not has_zeros(target.variable):
                raise ValueError(
                    "`keep_pattern=True` is for a sparse model, whose zeros "
                    "stay zeros. Make the model sparse first, or leave this "
                    f"kernel out of `targets`. Received: {target.path!r}, "
                    "which has no zero"
                )


def has_zeros(variable: keras.Variable) -> bool:
    """Return whether an entry of a variable is zero."""
    return bool(ops.convert_to_numpy(ops.any(variable.value == 0)))
