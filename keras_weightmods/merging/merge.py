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
    """What `merge` did. Prints as a table.

    Attributes:
        method: String.
        output: String, the file, or the name of the model.
        merged: Tuple of `MergedWeight`.
        skipped: Tuple of `Skipped`: what is as in the base, or in the first
            model where there is no base.
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

    With d_i what model i has changed of the base, and w_i its weight, the
    merged weight is

    - `"linear"`: sum w_i x_i / sum w_i, of the models themselves (model soups,
      arXiv 2203.05482);
    - `"slerp"`: of two models, on the arc between them (Shoemake, Animating
      Rotation with Quaternion Curves, SIGGRAPH 1985), at the share
      w_2 / (w_1 + w_2) of its angle; on the straight line where they are
      parallel;
    - `"task_arithmetic"`: base + scale * sum w_i d_i (arXiv 2212.04089);
    - `"ties"` (arXiv 2306.01708): of each d_i the `density` of its entries
      that are largest, in each weight by itself; of these the weighted mean
      of those that have the sign of their weighted sum:
      base + scale * sum w_i d_i / sum w_i over these;
    - `"dare"` (arXiv 2311.03099): as task arithmetic, of each d_i a share
      `density` of the entries drawn at random, times 1 / density;
      `"dare_ties"`: the same entries, merged as TIES does;
    - `"della"` (arXiv 2406.11617): merged as TIES does, of entries drawn with
      the probability `density - epsilon` for the smallest of the inputs of an
      output to `density + epsilon` for the largest, divided by it;
    - `"breadcrumbs"` (arXiv 2312.06795): as task arithmetic, of each d_i
      without the share `gamma` of its largest entries the `density` that are
      the largest then;
    - `"model_stock"` (arXiv 2403.19522): base + t * mean d_i, with
      t = N c / (1 + (N - 1) c) and c the mean cosine of two of the N d_i, in
      [0, 1];
    - `"iso_c"` (arXiv 2502.04959): base + scale * s U V^T, with
      U S V^T = sum w_i d_i of a kernel as a matrix and s the mean of S; the
      mean of d_i for all that is no kernel;
    - what `register_merge_method` has added.

    Moving statistics of batch normalization go from those of the base to the
    average of the models' with the weights, by the sum of the weights, in
    [0, 1], of the way; negative ones count as 0 in that average, and `scale`
    does not count. Without a base, and where TIES divides by the weights, they
    are that average, without a base with equal weights where one is negative.
    What is not trained is taken from the base, or from the first model where
    there is none. Kernels of `SpectralNormalization` are merged as they are
    stored: their norm is 1 again after the next steps of training.

    Files of `save_model` are merged out of core: an array at a time, by most
    methods in pieces of it, so that no model is in memory; a `.keras` file is
    loaded. `"della"` has a kernel of each model in memory, `"iso_c"` a few
    copies of one. Everything is computed in float32 (float64 for float64) and
    rounded once to the dtype of the base.

    Args:
        models: List of built Keras models, of files of `save_model` or of
            `.keras` files. Or a config of mergekit, a dict or the path of its
            YAML, whose models are such files: it stands for `method`,
            `weights`, `base` and the options.
        output: The path of the file of `save_model` to write, or the model
            that gets the merged weights, which may be one of the others. The
            config and the assets of a file are those of `base`, or of the
            first model where there is none.
        method: String, see above. Defaults to `"linear"`.
        weights: List with one element for each model: a number; a list of
            numbers, a gradient from the first layer with a kernel to the last
            one, in the order of execution and linear in between; or a dict
            from regexes, searched for in the variable's path, to these, of
            which the first that is found counts (`""` is found in all; each
            must be found in one). Defaults to ones.
        base: Model or file, what the models were trained from. For all
            methods but `"linear"` and `"slerp"`.
        seed: Int, of random entries. Defaults to 0.
        include: Regex or list of regexes for the paths of the variables to
            merge; the others are taken from the base. Defaults to all.
        exclude: The same, of those to take from the base. Defaults to none.
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
        ValueError: If an argument is outside of its range, or one that the
            method does not take; if the models have other weights or layers,
            packed or quantized ones; all of this before a weight is read. If
            a file is altered, or weights or the result are not finite, those
            that are kept too. No file is written then, and no model changed.
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
                # By the weight's place in the model.
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
    """Return the options that a method takes; check these arguments by it."""
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
    # A state that is not trained may be infinite, as a mask is.
    if weight.kept and not is_finite(values):
        return array
    raise ValueError(
        f"The result must be finite in {dtype}. Received: one that is not, of "
        f"{weight.path!r}"
    )
