"""The end of LoRA fine-tuning, with or without an N:M pattern to keep."""

from typing import Any

import keras
from keras import ops

from keras_weightmods.core import keras_compat, seam
from keras_weightmods.core.reparameterization import slots
from keras_weightmods.core.restored import RestoredOnError
from keras_weightmods.core.targets import find_targets
from keras_weightmods.ops import nm
from keras_weightmods.sparsity.report import ChangeReport
from keras_weightmods.utils import checks


def merge_lora(
    model: keras.Model,
    pattern: nm.Pattern | None = None,
) -> ChangeReport:
    """Add LoRA's product to the kernels, in place, and remove LoRA.

    The layers become plain again, and their kernels trainable. Without a
    pattern the model's outputs do not change. With a pattern, the zeros of
    every merged kernel stay zeros, and the product's entries there are lost. If
    memory allows, fine-tune with
    `SemiStructuredSparse.attach(model, frozen=True)` instead, which loses
    nothing at its end. To choose the places anew, merge without a pattern, then
    `sparsify`.

    The merge is in the kernel's own dtype, whatever the layer computes in. The
    model is left uncompiled if its optimizer has been built.

    Args:
        model: A built Keras model or layer. It is changed.
        pattern: String `"n:m"` or pair of ints, the pattern that the kernels
            have and keep; `None` for no pattern. Embeddings, and kernels whose
            contraction size is not a multiple of m, are merged without it.
            Defaults to `None`.

    Returns:
        A `ChangeReport` of the merged variables.

    Raises:
        ValueError: If no such layer has LoRA. If a quantized layer has it
            (merge before `quantize`), or a packed, scaled or companded one
            (`unpack` or `fold` first). If an argument is none of the above, or
            a base kernel is not N:M. The model is unchanged then.

    Example:

    ```python
    import keras
    import numpy as np
    import keras_weightmods as kwm

    model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(8)])
    kwm.SemiStructuredSparse.attach(model)
    kwm.SemiStructuredSparse.detach(model)

    model.layers[0].enable_lora(2)
    model.compile("adam", "mse")
    model.fit(np.ones((4, 16)), np.ones((4, 8)), verbose=0)
    kwm.merge_lora(model, pattern="2:4")
    kwm.assert_sparse(model, "2:4")
    ```

    Reference:
        LoRA (arXiv 2106.09685), section 4.1: `W + alpha / rank * A B`.
    """
    checks.check_model(model)
    n, m = (1, 1) if pattern is None else nm.parse_pattern(pattern)
    adapted = [
        (layer, *_adapter(layer))
        for layer in keras_compat.layers_of(model)
        if getattr(layer, "lora_enabled", False)
    ]
    if not adapted:
        raise ValueError(
            "`merge_lora` needs LoRA on some layer: call `enable_lora` and "
            f"train first. Received: model={model.name!r}, without any"
        )
    axes = {
        id(target.variable): target.contraction_axes
        for target in find_targets(model)
        if pattern is not None and target.contraction_size % m == 0
    }
    bad = [
        base.path
        for _, base, _ in adapted
        if id(base) in axes
        and int(nm.nm_violations(base.value, (n, m), axes[id(base)]))
    ]
    if bad:
        raise ValueError(
            f"`merge_lora` with a pattern needs kernels that were exactly "
            f"{n}:{m} before LoRA. Received: {len(bad)} that are not, among "
            f"them {', '.join(bad[:5])}. Merge without a pattern, and call "
            "`kwm.sparsify` to choose anew."
        )
    bases = [base for _, base, _ in adapted]
    with RestoredOnError(model, values=bases):
        for layer, base, names in adapted:
            _merge(layer, base, names, id(base) in axes)
        seam.forget_variables(model)
    return ChangeReport.of("LoRA merged", model.weights, bases)


def _merge(
    layer: Any, base: Any, names: tuple[str, str], has_pattern: bool
) -> None:
    """Add LoRA's product to one kernel, and remove LoRA from its layer."""
    # Avoid `layer.kernel`, which is rounded to the compute dtype.
    value, a, b = (
        ops.cast(each.value, "float32")
        for each in (base, *(getattr(layer, name) for name in names))
    )
    share = layer.lora_alpha / layer.lora_rank
    value = ops.add(value, ops.multiply(share, ops.matmul(a, b)))
    value = ops.cast(value, base.dtype)
    if has_pattern:
        kept = ops.not_equal(base, 0)
        value = ops.where(kept, value, ops.zeros_like(value))
    base.assign(value)
    for name in names:
        keras_compat.remove_variable(layer, getattr(layer, name), name)
    layer.lora_enabled = False
    layer.lora_rank = layer.lora_alpha = None
    # LoRA froze it.
    base.trainable = True


def _adapter(layer: Any) -> tuple[Any, tuple[str, str]]:
    """Return the variable that LoRA adapts, and the names of its factors."""
    name = "kernel" if hasattr(layer, "lora_kernel_a") else "embeddings"
    base = keras_compat.stored_variable(layer, name)
    if layer.quantization_mode is not None:
        expected = "merged before `quantize`, not into codes"
    elif slots(layer):
        expected = "merged after `unpack` or `fold`, into stored weights"
    elif base is None or not hasattr(layer, f"lora_{name}_a"):
        expected = "that of Keras' own layers"
    else:
        return base, (f"lora_{name}_a", f"lora_{name}_b")
    raise ValueError(
        f"LoRA must be {expected}. Received: layer {layer.path!r} of class "
        f"{type(layer).__name__}"
    )
