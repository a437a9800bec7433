"""Packing of the 2:4 kernels of a finished model, and back."""

import collections
import math
import time
import warnings
from typing import Any

import keras
from keras import ops

from keras_weightmods import native
from keras_weightmods.core import keras_compat, seam
from keras_weightmods.core.head import reversible_embeddings
from keras_weightmods.core.reparameterization import reparameterizations
from keras_weightmods.core.targets import resolve_targets
from keras_weightmods.native.layout import ACTIVATIONS, INTEGERS
from keras_weightmods.ops.nm import nm_violations
from keras_weightmods.ops.sparse_matmul import gpu_plan, reason_for_dense
from keras_weightmods.packing import (
    packed_dense,
    packed_embedding,
    packed_mixed,
    packed_stack,
    recurrent,
)
from keras_weightmods.packing.packed_parameters import PackedParameters
from keras_weightmods.packing.report import PackedWeight, PackReport
from keras_weightmods.utils import checks
from keras_weightmods.utils.dtypes import bytes_of
from keras_weightmods.utils.progress import Progress
from keras_weightmods.utils.report import Skipped


def pack(
    model: keras.layers.Layer,
    dtype: str | None = None,
    *,
    targets: Any = None,
    dense: str | None = None,
    head: str | None = None,
    activations: str | None = None,
    trainable: bool = False,
    verbose: int = 1,
) -> PackReport:
    """Pack the kernels of a finished model, in place.

    The kernels of Dense, EinsumDense, Conv1D to Conv3D (which then multiply
    the patches of their input), the cells of LSTM, GRU and SimpleRNN (on torch
    with `use_cudnn=False`) and the experts of KerasHub's mixtures (on a
    GPU these are held dense) that are exactly 2:4 are replaced by their
    kept values and two bits for the place of each: 0.53 times the bytes
    of float32, 0.28 with `dtype="bfloat16"`, 0.16 with `dtype="int8"`, 0.10
    with `dtype="int4"`. Their layers multiply by these with
    `ops.sparse_matmul`. Each layer stays the
    same object with the same name; the dense weight is gone from it, and it
    has `kernel_values`, `kernel_meta` and, for int8 and int4, `kernel_scale`
    instead, frozen weights like any other. `layer.kernel` gives the dense
    kernel, computed anew each time.

    Bias, activation and LoRA work as before: `enable_lora` before or after
    trains adapters on the packed base. `save_weights` and `load_weights` hold
    and take the packed arrays; `save_model` saves the whole model.

    Where the compiled kernels are missing, a warning says so once and the
    layers hold the kernels dense, rounded alike, with checkpoints alike.

    Under `keras.distribution`, with JAX, the packed arrays are split over
    devices as the weights are, and each device multiplies by its own part: no
    weight is gathered. (On GPUs the kernels are held dense then.) Nothing of
    this has yet been run on a GPU.

    Packing holds the dense and the packed weights for a while. A built
    optimizer has state of weights that are gone, so the model is left
    uncompiled then.

    Args:
        model: A built `keras.Model`. It is changed.
        dtype: String, type of the kept values. `"bfloat16"` rounds them;
            `"int8"` rounds to multiples of max |w| / 127, one scale for each
            output unit; `"int4"` to -8 to 7 times a bfloat16 scale, the best
            of several for each output unit and 64 inputs. This rounds each
            value by itself, which costs quality in int4: a 2:4 SmolLM2-135M
            went from a perplexity of 72 to 91 on prose, and to 72.5 in int8.
            The report has the rounding errors. By default, `None`, they are
            kept as they are: bfloat16 for a bfloat16 kernel, float32 for any
            other.
        targets: `Targets`, a list of `Target`, or what `find_targets` takes
            as `include`; `None` for all. Those that are no kernels of Dense,
            EinsumDense, an ungrouped convolution, a recurrent cell or
            KerasHub's experts, or do not divide into groups of four, are
            skipped and reported.
        dense: `"int8"` or `"int4"` packs the kernels that are not 2:4 as well:
            all their weights in integers, rounded as by `dtype`, and multiplied
            by int8 activations, in 8.1 or 4.25 bits a weight. So a model can be
            sparse in part, or not at all. Of a kernel with some blocks of 16
            output units that are 2:4, a quarter or more, these are packed by
            `dtype`, and the others so. By default, `None`, such a kernel is
            an error.
        head: `"int8"` or `"int4"` rounds the embeddings that serve as the
            head as well (`keras.layers.ReversibleEmbedding` with tied weights,
            as in KerasHub's language models) and serves both the look-up and
            the logits from one table: int8 with a scale for each row, or int4
            with a bfloat16 scale for each 64 entries of a row. int8 costs next
            to nothing; int4 took the dense SmolLM2-135M from a perplexity of
            32.8 to 37.7, unless `quantize_sparse(head=True)` has rounded it
            before, see the guide. By default, `None`, they stay as they are.
        activations: String, what weights in int8 and int4 are multiplied by,
            the head too. `"int8"` rounds the inputs of these layers, in blocks
            of 32 entries to multiples of max |x| / 127, and multiplies
            integers, which is faster. On a CPU, with int8 values, that moved
            the perplexity of the same model by less than 0.2 %, with int4 by
            0.4 %. On a GPU it is for 2:4 kernels in int8 (all others are held
            dense) and rounds whole rows, which costs more, see the guide.
            `"float32"` leaves the inputs as they are. By default, `None`, it
            is `"int8"` on a CPU and `"float32"` on a GPU. Weights in float32
            and bfloat16 always have inputs in float.
        trainable: Bool. If True, the kept values get gradients, their places
            never; float32 values only. Defaults to False.
        verbose: 0 or 1. 0 shows no progress bar; 1 shows one once it has
            taken two seconds. Defaults to `1`.

    Returns:
        A `PackReport`: print it for a table, or take `to_dict()`.

    Raises:
        ValueError: If a kernel is not exactly 2:4 and `dense` is `None`; if one
            is not finite where int8 or int4 is asked for; if a weight is
            scaled (fold first); if there is nothing to pack; or if an argument
            is none of the above. The model is unchanged then.

    Example:

    ```python
    import keras
    import numpy as np
    import keras_weightmods as kwm

    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(32)])
    kwm.SemiStructuredSparse.attach(model)
    x = np.random.normal(size=(2, 64)).astype("float32")
    before = model.predict(x, verbose=0)

    report = kwm.pack(model)
    assert report.totals["packed_share"] < 0.54
    assert np.allclose(model.predict(x, verbose=0), before, atol=1e-5)
    ```
    """
    began = time.perf_counter()
    check_arguments(dtype, dense, head, activations, trainable)
    checks.check_verbose(verbose)
    if activations is None:
        # Rounding whole rows costs more there, so it is to be asked for.
        on_gpu = gpu_plan((1, 1), "float32", "int8") is not None
        activations = "float32" if on_gpu else "int8"
    elif activations == "float32" and dense and not reason_for_dense():
        raise ValueError(
            "Kernels that are not 2:4 are multiplied in integers alone. "
            f"Received: dense={dense!r}, activations='float32'. Leave "
            "`activations` out, or these kernels."
        )
    resolved = resolve_targets(model, targets)
    held = {**_shared_variables(model), **recurrent.read_whole(model)}
    kernels, left = _sort_out(resolved, _reason_to_skip, held)
    integers: list[Any] = []
    if dense:
        kernels = [t for t in kernels if not _violations(t)]
        sparse = {target.key for target in kernels}
        integers, left = _sort_out(
            [target for target in resolved if target.key not in sparse],
            packed_dense.integers_reason_to_skip,
            held,
        )
    skipped = [*resolved.skipped, *left]
    tables: list[Any] = []
    if head is not None:
        found = reversible_embeddings(model)
        tables, left = _sort_out(found, packed_embedding.reason_to_skip, held)
        paths = {target.path for target in found}
        skipped = [s for s in skipped if s.path not in paths] + left
    if not tables and (head is not None or not (kernels or integers)):
        missing = "kernel" if head is None else "tied embedding and head"
        reasons = "; ".join(f"{skip.path}: {skip.reason}" for skip in skipped)
        raise ValueError(
            f"The model has no {missing} that can be packed. Received: "
            f"model={model.name!r}, skipped: {reasons}"
        )
    items = [
        _packed(
            t,
            dtype or _lossless(t),
            trainable,
            activations if dtype in INTEGERS else "float32",
        )
        for t in kernels
    ]
    items += [_in_integers(t, dtype, dense, activations) for t in integers]
    embeddings = [
        packed_embedding.packed_embedding(t, head, activations) for t in tables
    ]
    seam.check_unattached([*items, *embeddings])
    before = _model_bytes(model)
    count = len(items) + len(embeddings)
    with Progress(count, "kernel", verbose, began) as progress:
        _check_kernels(items)
        items += embeddings
        _check_finite(items)
        reason = reason_for_dense()
        if reason:
            native.warn_dense(reason)
        _warn_about_undivided(items)
        seam.attach(model, items, drop_optimizer=True, see=progress.add)
    return _report(model, items, skipped, before)


def unpack(model: keras.layers.Layer, verbose: int = 1) -> PackReport:
    """Give a packed model its dense weights back, in place.

    They are bit for bit what was packed where the values are float32, or
    bfloat16 of a bfloat16 kernel; otherwise what rounding made of it. (A
    negative zero comes back as zero.) The layers are again what they were:
    class, list of weights, config. If the model's optimizer has been built,
    the model is left uncompiled.

    Args:
        model: A Keras model. One without packed weights is left as it is.
        verbose: As in `pack`.

    Returns:
        A `PackReport`.

    Example:

    ```python
    import keras
    import numpy as np
    import keras_weightmods as kwm

    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(32)])
    kwm.SemiStructuredSparse.attach(model)
    before = model.get_weights()

    kwm.pack(model)
    kwm.unpack(model)
    for old, new in zip(before, model.get_weights()):
        assert np.array_equal(old, new)
    ```
    """
    checks.check_model(model)
    checks.check_verbose(verbose)
    before = _model_bytes(model)
    count = len(reparameterizations(model, PackedParameters))
    with Progress(count, "kernel", verbose) as progress:
        items = seam.fold(model, PackedParameters, progress.add)
    return _report(model, items, (), before)


def _reason_to_skip(target: Any) -> Any:
    kind = packed_stack if target.stack_axes else packed_dense
    return kind.reason_to_skip(target)


def _packed(target: Any, *args: Any) -> Any:
    if target.stack_axes:
        return packed_stack.packed_stack(target, *args)
    return packed_dense.packed_kernel(target, *args)


def _in_integers(target: Any, dtype: Any, dense: Any, activations: Any) -> Any:
    """Pack what is not 2:4, at least not in all columns."""
    blocks = None
    if packed_dense.reason_to_skip(target) is None:
        blocks = packed_mixed.dense_blocks(target)
    if not blocks:
        return packed_dense.integer_kernel(target, dense, activations)
    kept = dtype or _lossless(target)
    activations = activations if kept in INTEGERS else "float32"
    return packed_mixed.mixed_kernel(target, kept, dense, blocks, activations)


def check_arguments(
    dtype: Any = None,
    dense: Any = None,
    head: Any = None,
    activations: Any = None,
    trainable: Any = False,
) -> None:
    """Raise ValueError for arguments that `pack` does not take."""
    packed_dense.check_values("float32" if dtype is None else dtype, trainable)
    checks.check_choice("dense", dense, (None, *INTEGERS))
    checks.check_choice("head", head, (None, *INTEGERS))
    checks.check_choice("activations", activations, (None, *ACTIVATIONS))
    if activations == "int8" and not {dtype, dense, head} & {*INTEGERS}:
        raise ValueError(
            "int8 activations need int8 or int4 weights. Received: "
            f"activations='int8', dtype={dtype!r}, dense={dense!r}, "
            f"head={head!r}"
        )
    if dense and trainable:
        raise ValueError(
            "Integers cannot be trained, so `dense` and `trainable` exclude "
            f"each other. Received: dense={dense!r}, trainable=True"
        )


def _sort_out(targets: Any, reason_to_skip: Any, held: dict[int, str]) -> Any:
    """Those that can be packed, and the others as `Skipped`.

    `held` has reasons of their own for some variables, by their ids.
    """
    packable, skipped = [], []
    for target in targets:
        reason = reason_to_skip(target) or held.get(id(target.variable))
        if reason is None:
            packable.append(target)
        else:
            skipped.append(Skipped(target.path, reason))
    return packable, skipped


def _shared_variables(model: Any) -> dict[int, str]:
    """{id: reason} of the variables that several layers hold as their own."""
    held = collections.Counter(
        key
        for layer in keras_compat.layers_of(model)
        for key in {id(v) for v in keras_compat.own_variables(layer)}
    )
    return {
        key: "shared by several layers"
        for key, count in held.items()
        if count > 1
    }


def _lossless(target: Any) -> str:
    return "bfloat16" if target.variable.dtype == "bfloat16" else "float32"


def _check_kernels(items: list[Any]) -> None:
    bad = []
    for item in items:
        target = item.target
        constraint = target.variable.constraint
        keeps = constraint is None or getattr(
            constraint, "keeps_pattern", False
        )
        if item.trainable and not keeps:
            raise ValueError(
                "The values of a packed kernel cannot be trained under a "
                f"constraint of the kernel. Received: {target.path!r} with "
                f"the constraint {constraint!r}. Set its `constraint` to None."
            )
        count = _violations(target) if item.pattern == "2:4" else 0
        if count:
            groups = math.prod(target.shape) // 4
            line = f"{target.path} {target.shape}: {count:,} of {groups:,}"
            bad.append((count, f"\n  {line} groups"))
    if bad:
        bad.sort(reverse=True)
        listed = "".join(line for _, line in bad[:10])
        raise ValueError(
            "The kernels must be exactly 2:4, at most two nonzeros in each "
            f"group of four along the contraction. Received: {len(bad)} of "
            f"{len(items)} kernels with groups that hold more:{listed}\nMake "
            "them 2:4 first, or pack them in integers by `dense='int8'`, or "
            "leave them out by `targets=find_targets(model, exclude=...)`."
        )


def _violations(target: Any) -> int:
    kernel, axes = target.variable.value, target.contraction_axes
    return int(nm_violations(kernel, "2:4", axes))


def _warn_about_undivided(items: Any) -> None:
    """Warn where devices will hold more of a weight than of the dense one."""
    found = [
        f"{item.target.path!r} by {list(item.unused_axes)}"
        for item in items
        if item.unused_axes
    ]
    if found:
        warnings.warn(
            f"`pack` splits {len(found)} weights over fewer devices than their "
            "layouts do, since the blocks of the packed format, of 32 rows (64 "
            "in int4) and 16 columns, do not divide there. Leave them out by "
            "`targets`, or split them by other axes. Not split are: "
            + "; ".join(found[:5]),
            stacklevel=3,
        )


def _check_finite(items: Any) -> None:
    for item in items:
        value = item.target.variable.value
        dtype = item.value_dtype
        if isinstance(item, packed_mixed.MixedKernel):
            dtype = item.dense
        if dtype in INTEGERS and not ops.all(ops.isfinite(value)):
            raise ValueError(
                f"{dtype} values need finite weights. Received: "
                f"{item.target.path!r}, which holds NaN or infinity."
            )


def _report(model: Any, items: Any, skipped: Any, before: int) -> PackReport:
    weights = tuple(
        PackedWeight(
            item.target.path,
            item.target.shape,
            item.value_dtype,
            bytes_of([(item.target.shape, item.dtype)]),
            bytes_of((p.shape, p.dtype) for p in item.parameters),
            item.activations,
            item.rounding_error,
            item.pattern,
        )
        for item in items
    )
    return PackReport(weights, tuple(skipped), before, _model_bytes(model))


def _model_bytes(model: Any) -> int:
    return bytes_of((weight.shape, weight.dtype) for weight in model.weights)
