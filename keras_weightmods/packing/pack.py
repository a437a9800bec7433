"""Packing the weights of a finished model, and unpacking them."""

import collections
import itertools
import math
import time
import warnings
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_weightmods import native
from keras_weightmods.core import keras_compat, seam
from keras_weightmods.core.head import find_head, reversible_embeddings
from keras_weightmods.core.reparameterization import reparameterizations
from keras_weightmods.core.restored import RestoredOnError
from keras_weightmods.core.targets import resolve_targets, target_of
from keras_weightmods.core.weight_keys import weight_keys
from keras_weightmods.native.layout import (
    ACTIVATIONS,
    GROUP,
    INTEGERS,
    bits_of,
    is_grouped,
)
from keras_weightmods.ops.nm import nm_violations, packed_pattern
from keras_weightmods.ops.sparse_matmul import gpu_plan, reason_for_dense
from keras_weightmods.packing.formats import FORMATS, formats_of
from keras_weightmods.packing.packed_parameters import (
    PackedParameters,
    reason_to_skip,
)
from keras_weightmods.packing.report import PackedWeight, PackReport
from keras_weightmods.utils import checks
from keras_weightmods.utils.dtypes import bytes_of
from keras_weightmods.utils.matrix import to_stack
from keras_weightmods.utils.progress import Progress
from keras_weightmods.utils.report import Skipped, skipped_text


def pack(
    model: keras.layers.Layer,
    dtype: str | None = None,
    *,
    head: str | None = "auto",
    targets: Any = None,
    activations: str | None = None,
    trainable: bool = False,
    verbose: int = 1,
) -> PackReport:
    """Pack the weights of a finished model, in place.

    `pack(model)` stores what `kwm.quantize` has rounded to 2 to 6 bits, without
    further loss. In four bits these weights are -8 to 7 times a bfloat16 scale
    for each output unit and 64 inputs. Kernels and heads on this grid with more
    than three values take their bits and a quarter of one for each weight. 2:4
    kernels of at most four bits take 3.25 bits. Other 2:4 kernels keep their
    values. `pack(model, "int8")` and `pack(model, "int2")` to `"int6"` round
    all weights themselves, 2:4 or not.

    Layers that Keras has quantized (`model.quantize` in int8, int4, gptq or
    awq) keep their integers, less their zero points, where a format holds them.
    Integers of fewer than 8 bits get bfloat16 scales. The report names these
    layers, which are float layers from then on.

    A packed 2:4 kernel holds its kept values and two bits for the place of
    each. It takes 0.53 times the bytes of float32, 0.28 in bfloat16, 0.16 in
    int8 and 0.10 in int4. A kernel with at most 16 nonzeros in each 32 inputs,
    such as 16:32, 8:16 or 4:8, takes as much in the format "16:32", with a
    mask. A warning says what it costs: in floats it saves space in files only.
    In integers, products with a few rows are slower than those of 2:4, several
    times on AVX2 and NEON.

    `pack` takes the kernels of Dense, EinsumDense, Conv1D to Conv3D, separable
    convolutions, the experts of KerasHub's mixtures, and layers that
    `register_layer_kind` knows with their `call`. Conv1D to Conv3D multiply the
    patches of their input. The layers multiply by `ops.sparse_matmul`.

    Each layer stays the same object with the same name. Frozen weights replace
    its dense one: `kernel_values`, `kernel_meta` for a sparse kernel, and
    `kernel_scale` for integers. `layer.kernel` computes the dense kernel. Bias,
    activation and LoRA work as before: `enable_lora` before or after trains
    adapters on the packed base. `save_weights` and `load_weights` work with the
    packed arrays. `save_model` saves the whole model.

    If the compiled kernels are missing, a warning says so once. The layers then
    hold the same rounded weights in dense form. The packed arrays stay in the
    host's memory for a file.

    Under `keras.distribution`, with JAX, the packed arrays are split over
    devices as the weights are. Each device multiplies by its own part, and no
    weight is gathered. (GPUs hold the kernels dense then.)

    Packing holds the dense and the packed weights together for a while. If the
    optimizer has been built, the model is left uncompiled.

    Args:
        model: A built `keras.Model`. It is changed.
        dtype: String, the type of the packed values. `"int8"` rounds to
            multiples of max |w| / 127, with one scale for each output unit,
            which costs almost nothing. `"int4"` rounds to -8 to 7 times a
            bfloat16 scale, the best of several for each output unit and 64
            inputs. This costs quality unless `kwm.quantize` has rounded the
            weights before; a warning says by how much it changed them.
            `"int2"`, `"int3"`, `"int5"` and `"int6"` do the same with their
            bits, and store 2:4 kernels with all their zeros. `"float32"` and
            `"bfloat16"` pack 2:4 kernels only. The default, `None`, rounds
            nothing. It packs weights on the grid of few bits in the fewest of
            these, 2:4 ones in int4. Other 2:4 kernels are packed in bfloat16 if
            that is their type, else in float32.
        head: String, the type of the head of a language model, a `Dense` or a
            `keras.layers.ReversibleEmbedding` as in KerasHub: `"int8"`, with a
            scale for each token, or `"int2"` to `"int6"`, with one for each
            token and 64 inputs. It does not depend on the type of the kernels.
            With tied weights one such table serves the look-up and the logits;
            otherwise the look-up keeps its dense table. `None` leaves the head
            as it is. The default, `"auto"`, packs it like the kernels, unless
            `targets` are given or `dtype` is a float type. A `Dense` head is a
            kernel like any other.
        targets: `Targets`, a list of `Target`, or what `find_targets` takes
            as `include`; `None` for all. Those that cannot be packed are
            skipped and reported.
        activations: String, the type of the inputs that integer weights are
            multiplied by. `"int8"` rounds the inputs of these layers, in blocks
            of 32 entries, to multiples of max |x| / 127 (32 rows and more to
            bfloat16 on AMX). It is faster on a CPU; a GPU holds them dense.
            `"float32"` leaves the inputs as they are. On a CPU it works for 2:4
            kernels only. The default, `None`, means `"int8"` on a CPU and
            `"float32"` on a GPU. Weights in float32 and bfloat16 always have
            float inputs.
        trainable: Bool. If True, the kept values of 2:4 kernels get gradients,
            their places never. It needs float32 values. Defaults to False.
        verbose: 0 or 1. 0 shows no progress bar; 1 shows one once it has
            taken two seconds. Defaults to `1`.

    Returns:
        A `PackReport`: print it for a table, or take `to_dict()`.

    Raises:
        ValueError: If nothing is to be rounded and a kernel is neither 2:4 nor
            on the grid of 2 to 6 bits, or holds integers of Keras that no
            format holds. If a weight is scaled (fold first), or not finite
            where integers are asked for. If there is nothing to pack, or an
            argument is none of the above. The model is unchanged then.

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
    checks.check_model(model)
    known = dict.fromkeys(form.dtype for form in FORMATS.values())
    whole = [name for name in known if None in formats_of(name)]
    checks.check_choice("dtype", dtype, (None, *known))
    checks.check_choice("head", head, ("auto", None, *whole))
    checks.check_choice("activations", activations, (None, *ACTIVATIONS))
    checks.check_bool("trainable", trainable)
    checks.check_verbose(verbose)
    on_gpu = gpu_plan((1, 1), "float32") is not None
    if activations is None:
        activations = "float32" if on_gpu else "int8"
    kind = dtype if head == "auto" else head
    is_left = head is None or (kind and None not in formats_of(kind))
    if head == "auto" and (targets is not None or trainable):
        is_left = True
    end, before = find_head(model), bytes_of(model.weights)
    with RestoredOnError(model):
        quantized = _make_float(model)
        found = resolve_targets(model, targets)
        heads = [] if is_left else reversible_embeddings(model)
        if head not in ("auto", None) and end is not None:
            heads += [target for target in found if target.layer in end.layers]
        heads += [
            # Keras rounds the two tables of a layer together.
            target_of(target.layer, "embeddings", keys=weight_keys(model))
            for target in heads
            if target.layer in quantized
            and target.attribute == "reverse_embeddings"
        ]
        own = {target.path for target in heads}
        skipped = [skip for skip in found.skipped if skip.path not in own]
        kernels = [target for target in found if target not in heads]
        reasons = seam.shared_variables(model)
        items: list[Any] = []
        tables: list[Any] = []
        inexact: list[Any] = []
        for target in [*kernels, *heads]:
            is_head, integers = target in heads, None
            if target.layer in quantized:
                layer, _ = quantized[target.layer]
                integers = keras_compat.integers_of(layer, target.attribute)
            made = reasons.get(id(target.variable)) or reason_to_skip(target)
            made = made or _item(
                target,
                kind if is_head else dtype,
                is_head,
                trainable,
                activations,
                integers,
            )
            if made is None:
                inexact.append((target, None if inexact else integers))
            elif isinstance(made, str):
                skipped.append(Skipped(target.path, made))
            else:
                (tables if is_head else items).append(made)
        if inexact:
            raise _not_exact(inexact, len(inexact) + len(items), dtype)
        counts = collections.Counter(i.target.layer for i in (*items, *tables))
        left = {
            layer: structure
            for layer, (view, structure) in quantized.items()
            if counts[layer] < len(keras_compat.quantized_weights(view))
        }
        why = "another table of its layer is not packed"
        skipped += [
            Skipped(item.target.path, why)
            for item in tables
            if item.target.layer in left
        ]
        tables = [item for item in tables if item.target.layer not in left]
        if not tables and (head not in ("auto", None) or not items):
            missing = "head" if items else "kernel"
            raise ValueError(
                f"The model has no {missing} that can be packed: a head is a "
                "`ReversibleEmbedding`, or a `Dense` at the end of a language "
                f"model. Received: model={model.name!r}, skipped: "
                f"{skipped_text(skipped)}"
            )
        items += tables
        why_dense = reason_for_dense()
        has_products = activations != "float32" or on_gpu or why_dense
        with Progress(len(items), "kernel", verbose, began) as progress:
            for item in items:
                _check_weight(item, has_products)
            if why_dense:
                native.warn_dense(why_dense)
            for structure in left.values():
                structure.restore()
            keras_compat.drop_policies(model, quantized.keys() - left.keys())
            seam.attach(model, items, drop_optimizer=True, see=progress.add)
    _warn(items)
    return _report(model, items, skipped, before)


def unpack(model: keras.layers.Layer, verbose: int = 1) -> PackReport:
    """Give a packed model its dense weights back, in place.

    Values that were packed as float32, or as bfloat16 of a bfloat16 kernel,
    come back bit for bit. (A negative zero comes back as zero.) Others come
    back rounded, as the packed model used them. A kernel in 16 bits rounds the
    products of scales and integers once more. `pack(model)` then does not find
    the integers again, unless `quantize` has chosen them.

    The layers have their old class, list of weights and config again. The model
    is left uncompiled if its optimizer has been built. Unpacking needs memory
    for both kinds of weights for a while.

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
    before = bytes_of(model.weights)
    count = len(reparameterizations(model, PackedParameters))
    with Progress(count, "kernel", verbose) as progress:
        items = seam.fold(model, PackedParameters, progress.add)
    return _report(model, items, (), before)


def _make_float(model: Any) -> dict[Any, tuple[Any, Any]]:
    """Turn layers that Keras quantized into float layers, without values.

    Returns:
        Dict by layer of a view of what it was, and the `Structure` that gives
        that back.
    """
    found = {}
    for layer in keras_compat.layers_of(model):
        if keras_compat.quantized_weights(layer):
            view = keras_compat.view(layer)
            found[layer] = view, keras_compat.Structure([layer])
            keras_compat.make_float(layer)
    return found


def _item(
    target: Any,
    dtype: Any,
    is_head: bool,
    trainable: bool,
    activations: str,
    integers: Any,
) -> Any:
    """Return the `PackedParameters` of a weight, or the reason why not.

    None if rounding or pruning has to come first.
    """
    variable, size = target.variable, target.contraction_size
    weight = variable.value if integers is None else integers[0]
    axes = target.contraction_axes
    pattern = None if is_head else packed_pattern(weight, axes)

    def form_of(dtype: Any) -> Any:
        forms = formats_of(dtype)
        return forms.get(pattern) or forms.get(None)

    if integers is not None and not trainable:
        for name in INTEGERS if dtype is None else [dtype]:
            form = form_of(name)
            if form is None:
                continue
            item = PackedParameters(target, form, False, activations)
            if item.pack_integers(*integers):
                return item
    if integers is None and dtype is None and not trainable:
        for kind, name in itertools.product(
            dict.fromkeys((pattern, None)), filter(is_grouped, INTEGERS)
        ):
            form = formats_of(name).get(kind)
            if form is None or not _begins_on_grid(target, form):
                continue
            item = PackedParameters(target, form, False, activations)
            item.pack()
            if item.rounding_error == 0:
                return item
    if dtype is None and is_head:
        if integers is not None:
            return "no format has its integers; `head='int8'` rounds them again"
        return "not rounded; `head='int8'` or `kwm.quantize` does it"
    if dtype is None and pattern:
        is_half = variable.dtype == "bfloat16" and not trainable
        dtype = "bfloat16" if is_half else "float32"
    form = form_of(dtype)
    if form is not None:
        item = PackedParameters(target, form, trainable, activations)
        if integers is not None:
            item.pack(integers[0] * integers[1])
        return item
    return (
        f"contraction size {size} is not a multiple of 4" if size % 4 else None
    )


def _begins_on_grid(target: Any, form: Any) -> bool:
    """Return whether packing keeps the first columns of a weight exact.

    They decide nearly all cases without packing the whole. Zeros, ones and unit
    matrices lie on every grid, and nobody rounded them.
    """
    axes = target.contraction_axes, target.stack_axes
    matrix = ops.convert_to_numpy(to_stack(target.variable.value, *axes)[0])
    first = np.ascontiguousarray(matrix[:, : form.columns], np.float32)
    same = form.unpack(form.pack(first), first.shape, np)
    return np.array_equal(same, first) and any(
        np.unique(values).size > 3 for values in (first, matrix)
    )


def _not_exact(targets: Any, count: int, dtype: str | None) -> ValueError:
    """Return the error for kernels that only rounding could pack."""
    (target, integers), also = targets[0], "" if dtype else ", or rounded"
    if integers is not None:
        item = PackedParameters(target, formats_of("int8")[None], False, "int8")
        item.pack(integers[0] * integers[1])
        return ValueError(
            "`pack` keeps Keras' integers of a kernel only if a format holds "
            "them: int8 with a scale for each output unit, fewer bits with "
            f"one for each {GROUP} inputs of a unit. Received: {len(targets)} "
            f"of {count} kernels that no format holds, the first being "
            f"{target.path} {target.shape}. "
            "`kwm.pack(model, 'int8')` rounds them once more, which changes "
            f"this one by {item.rounding_error:.2%}. To leave them to Keras, "
            "say which others to pack by `targets`."
        )
    value, axes = target.variable.value, target.contraction_axes
    return ValueError(
        "The kernels must be exactly 2:4, at most two nonzeros in each group "
        f"of four, or 16:32, as 8:16 and 4:8 are{also}. Received: "
        f"{len(targets)} of {count} kernels that are not, the first being "
        f"{target.path} {target.shape}: "
        f"{int(nm_violations(value, '2:4', axes)):,} of "
        f"{math.prod(target.shape) // 4:,} groups hold more. Round them by "
        "`kwm.quantize(model, data)` first, which costs least, or by "
        "`kwm.pack(model, 'int8')`, make them 2:4 by `kwm.sparsify`, or leave "
        "them out by `targets=kwm.find_targets(model, exclude=...)`."
    )


def _check_weight(item: Any, has_products: Any) -> None:
    variable = item.target.variable
    if item.is_held and not has_products:
        raise ValueError(
            "Weights that are not 2:4 are multiplied in integers alone. "
            f"Received: activations='float32' with {variable.path!r}. Leave "
            "`activations` out, or the weight, by `targets` or `head=None`."
        )
    if item.named:
        is_finite = math.isfinite(item.rounding_error or 0)
    else:
        is_finite = ops.all(ops.isfinite(variable.value))
    if item.form.needs_finite and not is_finite:
        raise ValueError(
            f"{item.form.dtype} values need finite weights. Received: "
            f"{variable.path!r}, which holds NaN or infinity."
        )
    constraint = variable.constraint
    keeps = constraint is None or getattr(constraint, "keeps_pattern", False)
    if item.trainable and not keeps:
        raise ValueError(
            "The values of a packed kernel cannot be trained under a "
            f"constraint of the kernel. Received: {variable.path!r} with "
            f"the constraint {checks.shown(constraint)}. Set its `constraint` "
            "to None."
        )


def _warn(items: Any) -> None:
    """Warn about weights that packing rounds, slows down or cannot split."""
    errors = collections.defaultdict(list)
    for item in items:
        is_kept = item.integers == "kept" or not item.rounding_error
        if is_grouped(item.form.dtype) and not is_kept:
            errors[item.form.dtype].append(item.rounding_error)
    for dtype, found in errors.items():
        warnings.warn(
            f"`pack` rounded {len(found)} weights to {dtype}, which changed "
            f"them by {sum(found) / len(found):.1%} on average and costs "
            f"quality. `kwm.quantize(model, data, bits={bits_of(dtype)})`, "
            "without `group_size`, before `kwm.pack(model)` costs less, and "
            "`kwm.pack(model, 'int8')` next to nothing.",
            stacklevel=3,
        )
    names = "float32 16:32", "bfloat16 16:32"
    half = [item for item in items if item.form.name in names]
    if half:
        warnings.warn(
            f"{len(half)} kernels of pattern 16:32 are packed in files alone "
            "and stay dense in memory, because no kernel multiplies by their "
            f"packed floats. The first is {half[0].target.path!r}. "
            "`kwm.pack(model, 'int8')` packs them in memory too.",
            stacklevel=3,
        )
    masked = [i for i in items if i.packed and i.pattern == "16:32"]
    if masked and native.library().kwm_isa() not in native.AVX512:
        warnings.warn(
            f"{len(masked)} kernels of pattern 16:32 are packed by masks. On "
            "this CPU, without AVX-512, products of few rows take several times"
            " as long as by 2:4 or dense ones. `kwm.pack(model, 'int5')` packs "
            "the zeros too, in 5.25 bits, and values of int4 without loss.",
            stacklevel=3,
        )
    whole = [item for item in items if item.unused_axes]
    if whole:
        warnings.warn(
            f"`pack` splits {len(whole)} weights over fewer devices than their "
            "layouts do: blocks of 32 rows (64 in int2 to int6) and 16 columns "
            f"stay whole. The first is {whole[0].target.path!r}, which "
            f"{list(whole[0].unused_axes)} do not split. Leave these out by "
            "`targets`, or split other axes.",
            stacklevel=3,
        )


def _report(model: Any, items: Any, skipped: Any, before: int) -> PackReport:
    weights = tuple(
        PackedWeight(
            item.target.path,
            item.target.shape,
            item.form.dtype,
            bytes_of([item.target.variable]),
            bytes_of(item.parameters),
            item.activations,
            item.rounding_error,
            item.pattern,
            item.integers,
        )
        for item in items
    )
    after = bytes_of(model.weights)
    left = reparameterizations(model, PackedParameters)
    held = [array for i in left if i.is_held for array in i.named.values()]
    host = sum(array.nbytes for array in held)
    return PackReport(weights, tuple(skipped), before, after, host)
