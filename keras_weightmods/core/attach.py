"""What the functions that reparameterize a whole model have in common."""

import dataclasses
from typing import Any

from keras_weightmods.core import seam
from keras_weightmods.core.targets import Skipped


@dataclasses.dataclass(frozen=True, eq=False)
class ReparameterizationReport:
    """What a call changed and skipped. Prints as a list.

    Attributes:
        kernels: Tuple with one summary for each kernel changed; each has
            `path` and `shape`, and prints as a line.
        skipped: Tuple of `Skipped`, path and reason.
    """

    kernels: tuple[Any, ...]
    skipped: tuple[Skipped, ...] = ()

    def __str__(self):
        return "\n".join(
            [
                f"{len(self.kernels)} kernels, {len(self.skipped)} skipped",
                *(f"  {kernel}" for kernel in self.kernels),
                *(f"  {item.path}: {item.reason}" for item in self.skipped),
            ]
        )


def attach_to_targets(model, targets, make_item, participle):
    """Reparameterizes each of `targets` that can be.

    Args:
        model: A built Keras model.
        targets: `Targets`.
        make_item: Callable from a `Target` to its `Reparameterization`, or to
            the reason, a string, why it has none.
        participle: String, what is done to a kernel, for the error message.

    Returns:
        Pair of the list of items attached and the list of `Skipped`.

    Raises:
        ValueError: If no target can be reparameterized, or as
            `seam.attach`. The model is unchanged then.
    """
    skipped = list(targets.skipped)
    items = []
    for target in targets:
        made = seam.obstacle(target) or make_item(target)
        if isinstance(made, str):
            skipped.append(Skipped(target.path, made))
        else:
            items.append(made)
    if not items:
        raise ValueError(
            f"The model has no kernel that can be {participle}. Received: "
            f"model={model.name!r}, skipped: "
            + "; ".join(f"{item.path}: {item.reason}" for item in skipped)
        )
    seam.attach(model, items)
    return items, skipped
