"""merge: one model of several, in memory or out of core."""

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from keras_weightmods import backend
from keras_weightmods.merging import choices, mergekit
from keras_weightmods.merging.methods import (
    METHODS,
    MergeMethod,
    Task,
    mean,
    moved_mean,
)
from keras_weightmods.merging.sources import (
    ModelSource,
    Weight,
    open_source,
    source_problems,
    weights_of,
)
from keras_weightmods.patches.checkpoint import FLOATS
from keras_weightmods.patches.ledger import ledger_of
from keras_weightmods.patches.tensors import is_finite
from keras_weightmods.saving import model as model_file
from keras_weightmods.saving import states
from keras_weightmods.saving.atomic_file import check_filepath
from keras_weightmods.utils import checks
from keras_weightmods.utils.dtypes import numpy_dtype
from keras_weightmods.utils.progress import Progress
from keras_weightmods.utils.report import Report, Skipped, Table, shape_text


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
            rows.append((each.path, shape_text(each.shape), weights))
        yield Table(
            f"{self.method}: {len(rows)} weights merged into {self.output}",
            ("weight", "shape", "weights of the models"),
            tuple(rows),
        )


def merge(
    models: Any,
    output: Any,
    method: str = "linear",
    weights: Sequence[Any] | None = None,
    *,
    base: Any = None,
    density: Any = None,
    seed: int = 0,
    include: Any = None,
    exclude: Any = None,
    overwrite: bool = True,
    custom_objects: dict[str, Any] | None = None,
    verbose: int = 1,
    **options: float,
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
    there is none.

    Files of `save_model` are merged out of core: an array at a time, by most
    methods in pieces of it, so that no model is in memory; a `.keras` file is
    loaded. `"della"` has a kernel of each model in memory, `"iso_c"` a few
    copies of one. Everything is computed in float32 (float64 for float64) and
    rounded once to the dtype of the base.

    Args:
        models: List of built Keras models, of files of `save_model` or of
            `.keras` files. Or a config of mergekit, a dict or the path of its
            YAML, whose models are such files: it stands for `method`,
            `weights`, `base`, `density` and the options.
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
        density: Number in (0, 1], or one of the other forms of a weight: the
            share of entries to keep, with `gamma` at most 1. Defaults to 0.2
            for TIES, 0.1 for DARE, 0.3 for DELLA and 0.15 for breadcrumbs.
        seed: Int, of random entries. Defaults to 0.
        include: Regex or list of regexes for the paths of the variables to
            merge; the others are taken from the base. Defaults to all.
        exclude: The same, of those to take from the base. Defaults to none.
        overwrite: Bool, whether to replace a file. Defaults to `True`.
        custom_objects: As in `load_model`, to build the model in a file.
        verbose: 0 or 1. 0 shows no progress bar; 1 shows one once it has
            taken two seconds. Defaults to `1`.
        **options: Floats that a method takes: `scale`, of the merged change,
            1 by default; `gamma` in [0, 1), of breadcrumbs, 0.01 by default;
            `epsilon` in [0, 1), of DELLA, 0.1 by default.

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
    given = {
        "method": method,
        "weights": weights,
        "base": base,
        "density": density,
        **options,
    }
    if isinstance(models, (dict, str, os.PathLike)):
        defaults = {"method": "linear"}
        for name, value in given.items():
            if value != defaults.get(name):
                expected = "left out: the config of mergekit has it"
                raise checks.error(name, expected, value)
        given = dict.fromkeys(given) | mergekit.arguments_of(models)
        models = given.pop("models")
    checks.check_verbose(verbose)
    given |= {
        "seed": seed,
        "include": include,
        "exclude": exclude,
        "overwrite": overwrite,
        "custom_objects": custom_objects,
    }
    with (
        Progress(1, "weight", verbose) as progress,
        _planned(models, output, **given) as plan,
    ):
        progress.total = len(plan.tasks)
        _run(plan, output, overwrite, progress)
    is_file = isinstance(output, (str, os.PathLike))
    return MergeReport(
        method=given["method"],
        output=os.fspath(output) if is_file else output.name,
        merged=tuple(
            MergedWeight(w.path, w.shape, plan.tasks[w.name].weights)
            for w in plan.weights
            if w.name in plan.tasks
        ),
        skipped=tuple(
            Skipped(w.path, plan.kept[w.name])
            for w in plan.weights
            if w.name in plan.kept
        ),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Plan:
    """What is to be merged, checked as far as it can be without the data.

    Attributes:
        method: `MergeMethod`.
        weights: List of `Weight`, of all arrays.
        tasks: Dict from the names of those that are merged to `Task`.
        kept: Dict from the names of the others to why.
        sources: List of all models that are read.
        template: That of the base, or the first model.
        target: `ModelSource` to write to; `template` for a file.
    """

    method: MergeMethod
    weights: list[Weight]
    tasks: dict[str, Task]
    kept: dict[str, str]
    sources: list[Any]
    template: Any
    target: Any


@contextlib.contextmanager
def _planned(
    models: Any,
    output: Any,
    method: str,
    weights: Any,
    base: Any,
    density: Any,
    seed: int,
    include: Any,
    exclude: Any,
    overwrite: bool,
    custom_objects: Any,
    **options: Any,
) -> Iterator[_Plan]:
    """Yield the `_Plan` of a merge, while its files are open."""
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
    if density is not None and chosen.density is None:
        raise _not_taken("density", density, method)
    if density is None:
        density = 1.0 if chosen.density is None else chosen.density
    numbers = dict(chosen.options)
    for name, value in options.items():
        if name not in numbers:
            raise _not_taken(name, value, method)
        if value is not None:
            bounds: Any = chosen.bounds.get(name, {})
            numbers[name] = checks.check_float(name, value, **bounds)
    if weights is not None:
        if chosen.weights == "none":
            raise checks.error("weights", f"None for {method}", weights)
        is_list = isinstance(weights, (list, tuple)) or (
            isinstance(weights, np.ndarray) and weights.ndim > 0
        )
        if not is_list or len(weights) != len(models):
            expected = f"a list of {len(models)} elements"
            raise checks.error("weights", expected, weights)
    checks.check_int("seed", seed, 0)
    to_file = isinstance(output, (str, os.PathLike))
    if to_file:
        check_filepath(output, overwrite)
        if os.fspath(output).endswith(".keras"):
            expected = "a file of `save_model`, which ends in .safetensors"
            raise checks.error("output", expected, output)
    with contextlib.ExitStack() as stack:

        def opened(argument, model, as_file=False):
            source = open_source(argument, model, custom_objects)
            stack.callback(source.close)
            if as_file and isinstance(source, ModelSource):
                # The file of a model in memory gets its config and assets.
                folder = os.path.dirname(os.path.abspath(output))
                made = tempfile.TemporaryDirectory(dir=folder, prefix=".")
                path = os.path.join(stack.enter_context(made), "model")
                model_file.save_model(source.model(None), path, verbose=0)
                source = open_source(argument, path, custom_objects)
                stack.callback(source.close)
            return source

        sources = [
            opened(f"models[{i}]", each, to_file and base is None and i == 0)
            for i, each in enumerate(models)
        ]
        template = sources[0]
        if base is not None:
            template = opened("base", base, to_file)
        target = template
        if not to_file:
            target = opened("output", output)
            _check_output(output, target)
        everything = list(dict.fromkeys([template, *sources, target]))
        checks.raise_all(
            "The models cannot be merged:",
            source_problems(everything, template),
        )
        found = weights_of(template, template.model(custom_objects))
        kept = choices.kept(found, include, exclude)
        specs = [1.0] * len(models) if weights is None else list(weights)
        shares = choices.shares(chosen, method, specs, found, kept)
        densities = choices.resolved("density", density, found)
        for value in {*densities.values()} if chosen.density else ():
            checks.check_float("density", value, above=0, most=1)
            problem = chosen.problem and chosen.problem(value, numbers)
            if problem:
                raise checks.error("density", problem, value)
        tasks = {
            weight.name: Task(
                shape=weight.shape,
                read=_reader(weight, sources, template),
                weights=shares[weight.name],
                density=densities[weight.name],
                options=numbers,
                # By the weight's place in the model.
                seed=(seed, number),
                axes=weight.axes,
            )
            for number, weight in enumerate(found)
            if weight.name not in kept
        }
        yield _Plan(chosen, found, tasks, kept, everything, template, target)


def _not_taken(name: str, value: Any, method: str) -> ValueError:
    """Return the error for an argument that a method does not take."""
    takers = [
        each
        for each, found in METHODS.items()
        if (found.density if name == "density" else found.options.get(name))
        is not None
    ]
    expected = f"left out for method {method!r}"
    if takers:
        expected += f": it is for {', '.join(takers)}"
    return checks.error(name, expected, value)


def _check_output(output: Any, target: Any) -> None:
    if not isinstance(target, ModelSource):
        raise checks.error("output", "a path or a built Keras model", output)
    on_model = [*ledger_of(output).patches]
    if on_model:
        raise ValueError(
            "`output` must be without patches, which could not be taken off "
            "again. Call `kwm.Patch.clear(model)` first. Received: "
            f"output={output.name!r} with {on_model}"
        )


def _reader(weight: Weight, sources: list[Any], base: Any) -> Any:
    """Return `Task.read` of a weight."""
    wide = np.dtype("float64" if weight.dtype == "float64" else "float32")

    def read(number, part):
        source = base if number < 0 else sources[number]
        values = source.part(weight.name, part)
        if not is_finite(values):
            raise ValueError(
                "Weights must be finite to be merged. Received: NaN or "
                f"infinity in {weight.path!r} of `{source.argument}`"
            )
        return values.astype(wide, copy=False)

    return read


def _run(plan: _Plan, output: Any, overwrite: bool, progress: Progress) -> None:
    """Merge, and write the file or give the model its weights."""
    template, target = plan.template, plan.target
    for source in plan.sources:
        source.check_data()

    def rounded(weight, values):
        """Return values in the dtype that the output has of a weight."""
        dtype = target.entries[weight.name].dtype
        with np.errstate(over="ignore"):
            array = values.astype(numpy_dtype(dtype), copy=False)
        # A state that is not trained may be infinite, as a mask is.
        if (
            dtype in FLOATS
            and not is_finite(array)
            and not (weight.kept and not is_finite(values))
        ):
            raise ValueError(
                f"The result must be finite in {dtype}. Received: "
                f"one that is not, of {weight.path!r}"
            )
        return array

    def parts(weight):
        """Yield what the output has of a weight, flattened, in its dtype."""
        if weight.name not in plan.tasks:
            whole = slice(0, int(np.prod(weight.shape)))
            yield rounded(weight, template.part(weight.name, whole))
            return
        compute = plan.method.function
        if weight.is_statistic and not plan.method.needs_base:
            compute = mean
        elif weight.is_statistic:
            is_whole = plan.method.weights == "votes"
            compute = partial(moved_mean, is_whole=is_whole)
        for _, values in compute(plan.tasks[weight.name]):
            yield rounded(weight, values)
        progress.add()

    if isinstance(target, ModelSource):
        merged = {w.name: np.concatenate([*parts(w)]) for w in plan.weights}
        for weight in plan.weights:
            array = merged[weight.name].reshape(weight.shape)
            if weight.name in plan.tasks:
                array = backend.current().tensor_of(array)
            target.variables[weight.name].assign(array)
        return
    reader = plan.template.reader
    with model_file.merged_writer(reader, output, overwrite) as writer:
        for name in reader.entries:
            if not states.is_weight(name):
                writer.write(name, reader.read(name))
        for weight in plan.weights:
            writer.write_parts(weight.name, parts(weight))
