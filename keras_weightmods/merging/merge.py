"""merge: one model of several, in memory or out of core."""

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np

from keras_weightmods import backend
from keras_weightmods.core.restored import RestoredOnError
from keras_weightmods.merging import choices, mergekit
from keras_weightmods.merging.methods import METHODS, mean, moved_mean
from keras_weightmods.merging.sources import (
    Source,
    source_problems,
    weights_of,
)
from keras_weightmods.merging.task import Task
from keras_weightmods.patches.entry import FLOATS
from keras_weightmods.patches.ledger import check_unpatched
from keras_weightmods.patches.tensors import is_finite
from keras_weightmods.saving import container, states
from keras_weightmods.saving import model as model_file
from keras_weightmods.saving.atomic_file import check_filepath, unfinished
from keras_weightmods.utils import checks
from keras_weightmods.utils.dtypes import numpy_dtype
from keras_weightmods.utils.progress import Progress
from keras_weightmods.utils.report import Report, Skipped, Table


@dataclasses.dataclass(frozen=True)
class MergedWeight:
    """A weight that was merged.

    Attributes:
        path: String, of its variable.
        shape: Tuple of ints.
        weights: Tuple of floats, one for each model.
    """

    path: str
    shape: tuple[int, ...]
    weights: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class MergeReport(Report):
    """The result of `merge`. Prints as a table.

    Attributes:
        method: String.
        output: String, the file, or the name of the model.
        merged: Tuple of `MergedWeight`.
        skipped: Tuple of `Skipped`: weights that come from the base, or from
            the first model if there is no base.
    """

    method: str
    output: str
    merged: tuple[MergedWeight, ...]
    skipped: tuple[Skipped, ...] = ()

    def tables(self) -> Iterable[Table]:
        """The `Table`s to print."""
        rows = []
        for each in self.merged:
            weights = " ".join(f"{x:g}" for x in each.weights)
            rows.append((each.path, each.shape, weights))
        title = f"{self.method}: {len(rows)} weights merged into {self.output}"
        yield Table(title, rows, "weight shape weights_of_the_models")


def merge(
    models: Any,
    output: Any,
    method: str = "linear",
    weights: Sequence[Any] | None = None,
    *,
    base: Any = None,
    seed: int = 0,
    include: Any = None,
    exclude: Any = None,
    overwrite: bool = True,
    custom_objects: dict[str, Any] | None = None,
    verbose: int = 1,
    **options: Any,
) -> MergeReport:
    r"""Merge models of one architecture into one.

    Let x_i be a weight of model i, d_i its change from the base, and w_i the
    weight given to the model. The merged weight is

    - `"linear"`: sum w_i x_i / sum w_i (model soups, arXiv 2203.05482);
    - `"slerp"`: for two models, the point on the arc between them at the share
      w_2 / (w_1 + w_2) of its angle (Shoemake, Animating Rotation with
      Quaternion Curves, SIGGRAPH 1985). Parallel weights are merged on the
      straight line;
    - `"task_arithmetic"`: base + scale * sum w_i d_i (arXiv 2212.04089);
    - `"ties"` (arXiv 2306.01708): base + scale * sum w_i d_i / sum w_i. It
      trims each d_i to the share `density` of its largest entries, in each
      weight by itself. The sums take only the trimmed entries that have the
      sign of their weighted sum;
    - `"dare"` (arXiv 2311.03099): task arithmetic on a random share `density`
      of the entries of each d_i, times 1 / density; `"dare_ties"`: the same
      entries, merged as TIES does;
    - `"della"` (arXiv 2406.11617): TIES on randomly drawn entries, divided by
      their probability. The probability rises from `density - epsilon` for the
      smallest of the inputs of an output to `density + epsilon` for the
      largest;
    - `"breadcrumbs"` (arXiv 2312.06795): task arithmetic on a part of each d_i.
      It drops the share `gamma` of the largest entries, and keeps the share
      `density` of the largest of the rest;
    - `"model_stock"` (arXiv 2403.19522): base + t * mean d_i, with t = N c / (1
      + (N - 1) c) and c the mean cosine of two of the N d_i, in [0, 1];
    - `"iso_c"` (arXiv 2502.04959): base + scale * s U V^T for a kernel as a
      matrix, with U S V^T = sum w_i d_i and s the mean of S. Other weights get
      the mean of d_i;
    - what `register_merge_method` has added.

    Moving statistics of batch normalization move from those of the base towards
    the models' weighted average. The share of the way is the sum of the
    weights, in [0, 1]. Negative weights count as 0 in that average, and `scale`
    does not count. Without a base, and where TIES divides by the weights, the
    result is that average. Without a base it has equal weights where one is
    negative.

    Weights that are not trained come from the base, or from the first model if
    there is no base. Kernels of `SpectralNormalization` are merged as they are
    stored; the next steps of training bring their norm back to 1.

    Files of `save_model` are merged out of core: an array at a time, and with
    most methods in pieces of it, so no model is in memory. A `.keras` file is
    loaded. `"della"` holds a kernel of each model in memory, `"iso_c"` a few
    copies of one. The merge is computed in float32 (float64 for float64) and
    rounded once to the dtype of the base.

    Args:
        models: List of built Keras models, of files of `save_model` or of
            `.keras` files. Or a config of mergekit, as a dict or the path of
            its YAML, whose models are such files. A config stands for `method`,
            `weights`, `base` and the options.
        output: The path of the file of `save_model` to write, or the model that
            gets the merged weights, which may be one of the others. A file gets
            the config and the assets of `base`, or of the first model if there
            is no base.
        method: String, see above. Defaults to `"linear"`.
        weights: List with one element for each model. An element is a number;
            or a list of numbers, a gradient from the first layer with a kernel
            to the last one, in the order of execution and linear in between; or
            a dict from regexes to these. The first regex found in the
            variable's path counts, and `""` matches all. Each regex must match
            a path, and each path a regex. Defaults to ones.
        base: Model or file that the models were trained from. All methods but
            `"linear"` and `"slerp"` use it.
        seed: Int, the seed of random entries. Defaults to 0.
        include: Regex or list of regexes for the paths of the variables to
            merge. The others come from the base. Defaults to all.
        exclude: The same, for variables that come from the base. Defaults to
            none.
        overwrite: Bool, whether to replace a file. Defaults to `True`.
        custom_objects: As in `load_model`, to build the model in a file.
        verbose: 0 or 1. 0 shows no progress bar; 1 shows one once it has
            taken two seconds. Defaults to `1`.
        **options: What a method takes, numbers or the other forms of a weight:
            `scale`, of the merged change, 1 by default; `density` in (0, 1],
            the share of entries to keep, with `gamma` at most 1, 0.2 by default
            for TIES, 0.1 for DARE, 0.3 for DELLA and 0.15 for breadcrumbs;
            `gamma` in [0, 1), of breadcrumbs, 0.01 by default; `epsilon` in
            [0, 1), of DELLA, 0.1 by default.

    Returns:
        A `MergeReport`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If an argument is outside of its range, or the method does
            not take it. If the models have other weights or layers, or packed
            or quantized ones. All of this is checked before a weight is read.
            If a file is altered, or if weights, also those that are kept, or
            the result are not finite. No file is written then, and no model
            changed.
        FileExistsError: If the file exists and `overwrite` is `False`.

    Example:

    ```python
    import keras
    import numpy as np
    import keras_weightmods as kwm

    def dense():
        return keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])

    base, first, second, merged = dense(), dense(), dense(), dense()
    kwm.merge([first, second], merged, "ties", [1, 0.5], base=base, verbose=0)
    kwm.merge([first, second], merged, weights=[1, 3], verbose=0)
    a, b, c = (m.get_weights()[0] for m in (first, second, merged))
    assert np.allclose(c, (a + 3 * b) / 4, atol=1e-6)
    ```
    """
    if isinstance(models, (dict, str, os.PathLike)):
        given = {"method": method, "weights": weights, "base": base, **options}
        for name, value in given.items():
            if value is not None and (name, value) != ("method", "linear"):
                expected = "left out: the config of mergekit has it"
                raise checks.error(name, expected, value)
        options = mergekit.arguments_of(models)
        named = ("models", "method", "weights", "base")
        models, method, weights, base = (options.pop(x, None) for x in named)
    options = _checked(models, method, weights, base, options)
    chosen = METHODS[method]
    checks.check_int("seed", seed, 0)
    checks.check_verbose(verbose)
    to_file = isinstance(output, (str, os.PathLike))
    if to_file:
        check_filepath(output, overwrite)
        if os.fspath(output).endswith(".keras"):
            expected = "a file of `save_model`, which ends in .safetensors"
            raise checks.error("output", expected, output)
    with (
        RestoredOnError(),
        Progress(1, "weight", verbose) as progress,
        contextlib.ExitStack() as stack,
    ):

        def opened(argument, model):
            source = Source(argument, model, custom_objects)
            stack.callback(source.close)
            return source

        sources = [opened(f"models[{i}]", x) for i, x in enumerate(models)]
        template = sources[0] if base is None else opened("base", base)
        target = template
        if not to_file:
            target = opened("output", output)
            check_unpatched("output", output)
        everything = list(dict.fromkeys([template, *sources, target]))
        checks.raise_all(
            "The models cannot be merged:",
            source_problems(everything, template),
        )
        found = weights_of(template)
        kept = choices.kept(found, include, exclude)
        if weights is None:
            weights = [1.0] * len(models)
        numbers = choices.numbers(method, weights, options, found, kept)
        for source in everything:
            if source.reader is not None:
                source.reader.check_data()
        progress.total = len(found) - len(kept)

        def parts(number, weight):
            """Yield what the output has of a weight, flattened."""
            dtype = target.entries[weight.name].dtype
            if weight.name in kept:
                whole = slice(0, int(np.prod(weight.shape)))
                values = template.reading(weight.name)(whole)
                yield _rounded(values, dtype, weight)
                return
            shares, given = numbers[weight.name]
            task = Task(
                shape=weight.shape,
                read=_reading(weight, [*sources, template]),
                weights=shares,
                options=given,
                # Derived from the weight's place in the model.
                seed=(seed, number),
                axes=weight.axes,
            )
            compute = chosen.function
            if weight.is_statistic:
                is_whole = chosen.weights == "votes"
                moved = partial(moved_mean, is_whole=is_whole)
                compute = moved if chosen.needs_base else mean
            for _, values in compute(task):
                yield _rounded(values, dtype, weight)
            progress.add()

        if to_file:
            reader = template.reader
            if reader is None:
                # The file of a model in memory gets its config and assets.
                folder = os.path.dirname(os.path.abspath(output))
                made = stack.enter_context(unfinished(folder))
                path = os.path.join(made, "model")
                model_file.save_model(template.model, path, verbose=0)
                reader = opened("base", path).reader
            form = model_file.FORMAT, model_file.VERSION
            others = itertools.filterfalse(states.is_weight, reader.entries)
            arrays = itertools.chain(
                ((name, reader.read(name)) for name in others),
                ((w.name, parts(i, w)) for i, w in enumerate(found)),
            )
            container.write(output, *form, reader.entries, arrays, overwrite)
        else:
            merged = [np.concatenate([*parts(*w)]) for w in enumerate(found)]
            variables = [target.variables[weight.name] for weight in found]
            with RestoredOnError(values=variables):
                for weight, variable, array in zip(found, variables, merged):
                    array = array.reshape(weight.shape)
                    if weight.name not in kept:
                        array = backend.current().tensor_of(array)
                    variable.assign(array)
    return MergeReport(
        method=method,
        output=os.fspath(output) if to_file else output.name,
        merged=tuple(
            MergedWeight(w.path, w.shape, numbers[w.name][0])
            for w in found
            if w.name not in kept
        ),
        skipped=tuple(
            Skipped(w.path, kept[w.name]) for w in found if w.name in kept
        ),
    )


def _checked(
    models: Any,
    method: str,
    weights: Any,
    base: Any,
    options: dict[str, Any],
) -> dict[str, Any]:
    """Return the options of a method, and check the arguments against it."""
    checks.check_choice("method", method, tuple(METHODS))
    chosen = METHODS[method]
    if not isinstance(models, (list, tuple)) or not models:
        raise checks.error("models", "a list of models or of files", models)
    least, most = chosen.models
    if not least <= len(models) <= (most or len(models)):
        count = f"{least}" if least == most else f"at least {least}"
        expected = f"{count} models for method {method!r}"
        raise checks.error("models", expected, f"{len(models)} models")
    if (base is None) == chosen.needs_base:
        expected = f"None for method {method!r}, which takes no changes"
        if base is None:
            expected = f"what the models were trained from, for {method!r}"
        raise checks.error("base", expected, base)
    options = {k: v for k, v in options.items() if v is not None}
    for name in options.keys() - chosen.options.keys():
        takers = [each for each, x in METHODS.items() if name in x.options]
        expected = f"left out for method {method!r}"
        if takers:
            expected += f": it is for {', '.join(takers)}"
        raise checks.error(name, expected, options[name])
    if weights is not None:
        if chosen.weights == "none":
            raise checks.error("weights", f"None for {method}", weights)
        checks.check_list("weights", weights, len(models), "elements")
    return {**chosen.options, **options}


def _reading(weight: Any, sources: list[Source]) -> Any:
    """Return `Task.read` of a weight; the last source is the base."""
    wide = np.dtype("float64" if weight.dtype == "float64" else "float32")
    readers = [source.reading(weight.name) for source in sources]

    def read(number, part):
        values = readers[number](part)
        if not is_finite(values):
            raise ValueError(
                "Weights must be finite to be merged. Received: NaN or "
                f"infinity in {weight.path!r} of `{sources[number].argument}`"
            )
        return values.astype(wide, copy=False)

    return read


def _rounded(values: Any, dtype: str, weight: Any) -> Any:
    """Return values in the dtype that the output has of a weight."""
    with np.errstate(over="ignore"):
        array = values.astype(numpy_dtype(dtype), copy=False)
    if dtype not in FLOATS or is_finite(array):
        return array
    # State that is not trained, such as a mask, may be infinite.
    if weight.kept and not is_finite(values):
        return array
    raise ValueError(
        f"The result must be finite in {dtype}. Received: one that is not, of "
        f"{weight.path!r}"
    )
