"""merge: one model of several, in memory or out of core."""

import contextlib
import dataclasses
import inspect
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from keras_weightmods.backend import backend_module
from keras_weightmods.patches import merge_sources, merge_weights
from keras_weightmods.patches.checkpoint import FLOATS
from keras_weightmods.patches.ledger import ledger_of
from keras_weightmods.patches.merge_methods import (
    METHODS,
    Options,
    Task,
    mean,
    moved_mean,
)
from keras_weightmods.patches.merge_sources import ModelSource, Weight
from keras_weightmods.patches.merge_weights import ELECTED, WITHOUT_BASE
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
        count = len(self.merged)
        yield Table(
            f"{self.method}: {count} weights merged into {self.output}",
            ("weight", "shape", "weights of the models"),
            tuple(
                (
                    w.path,
                    shape_text(w.shape),
                    " ".join(f"{x:g}" for x in w.weights),
                )
                for w in self.merged
            ),
        )


def merge(
    models: Sequence[Any],
    output: Any,
    method: str = "linear",
    weights: Sequence[Any] | None = None,
    *,
    base: Any = None,
    density: Any = None,
    scale: float | None = None,
    gamma: float | None = None,
    epsilon: float | None = None,
    seed: int = 0,
    include: Any = None,
    exclude: Any = None,
    overwrite: bool = True,
    custom_objects: dict[str, Any] | None = None,
    verbose: int = 1,
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
      mean of d_i for all that is no kernel.

    Moving statistics of batch normalization go from those of the base to the
    average of the models' with the weights, by the sum of the weights, in
    [0, 1], of the way; negative ones count as 0 in that average, and `scale`
    does not count. Without a base, and where TIES divides by the weights, they
    are that average, without a base with equal weights where one is negative.
    What is not trained is taken from the base, or from the first model where
    there is none.

    Files are merged out of core: an array at a time, by most methods in
    pieces of it, so that no model is in memory. `"della"` has a kernel of each
    model in memory, `"iso_c"` a few copies of one. Everything is computed in
    float32 (float64 for float64) and rounded once to the dtype of the base.

    Args:
        models: List of built Keras models, or of files of `save_model`.
        output: The path of the file to write, or the model that gets the
            merged weights, which may be one of the others. For a path, `base`
            (the first model where there is none) must be a file, whose config
            and assets it gets.
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
        scale: Float, of the merged change. Defaults to 1.
        gamma: Float in [0, 1), for breadcrumbs. Defaults to 0.01.
        epsilon: Float, for DELLA. Defaults to 0.1.
        seed: Int, of random entries. Defaults to 0.
        include: Regex or list of regexes for the paths of the variables to
            merge; the others are taken from the base. Defaults to all.
        exclude: The same, of those to take from the base. Defaults to none.
        overwrite: Bool, whether to replace a file. Defaults to `True`.
        custom_objects: As in `load_model`, to build the model in a file.
        verbose: 0 or 1. 0 shows no progress bar; 1 shows one once it has
            taken two seconds. Defaults to `1`.

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
    options = {
        "method": method,
        "weights": weights,
        "base": base,
        "density": density,
        "scale": scale,
        "gamma": gamma,
        "epsilon": epsilon,
        "seed": seed,
        "include": include,
        "exclude": exclude,
        "overwrite": overwrite,
        "custom_objects": custom_objects,
        "verbose": verbose,
    }
    checks.check_verbose(verbose)
    with (
        Progress(1, "weight", verbose) as progress,
        _planned(models, output, options) as plan,
    ):
        progress.total = len(plan.tasks)
        _run(plan, method, output, overwrite, progress)
    is_file = isinstance(output, (str, os.PathLike))
    return MergeReport(
        method=method,
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


def check_merge(models: Any, output: Any, **options: Any) -> None:
    """Raise what `merge` would raise before it reads a weight."""
    parameters = inspect.signature(merge).parameters.values()
    defaults = {p.name: p.default for p in parameters}
    del defaults["models"], defaults["output"]
    with _planned(models, output, {**defaults, **options}):
        pass


@dataclasses.dataclass(frozen=True, eq=False)
class _Plan:
    """What is to be merged, checked as far as it can be without the data.

    Attributes:
        weights: List of `Weight`, of all arrays.
        tasks: Dict from the names of those that are merged to `Task`.
        kept: Dict from the names of the others to why.
        sources: List of all models that are read.
        template: That of the base, or the first model.
        target: `ModelSource` to write to; `template` for a file.
    """

    weights: list[Weight]
    tasks: dict[str, Task]
    kept: dict[str, str]
    sources: list[Any]
    template: Any
    target: Any


@contextlib.contextmanager
def _planned(
    models: Any, output: Any, given: dict[str, Any]
) -> Iterator[_Plan]:
    """Yield the `_Plan` of a merge, while its files are open."""
    method, base, weights = (given[k] for k in ("method", "base", "weights"))
    models = _check_models(models, method, base)
    options = _options(method, given)
    density = given["density"]
    if density is None:
        density = merge_weights.DENSITIES.get(method, 1.0)
    if weights is not None and method == "model_stock":
        raise checks.error("weights", "None for model_stock", weights)
    is_list = isinstance(weights, (list, tuple)) or (
        isinstance(weights, np.ndarray) and weights.ndim > 0
    )
    if weights is not None and (not is_list or len(weights) != len(models)):
        expected = f"a list of {len(models)} elements"
        raise checks.error("weights", expected, weights)
    checks.check_int("seed", given["seed"], 0)
    to_file = isinstance(output, (str, os.PathLike))
    if to_file:
        check_filepath(output, given["overwrite"])
    with contextlib.ExitStack() as stack:

        def opened(argument, model):
            source = merge_sources.open_source(argument, model)
            stack.callback(source.close)
            return source

        sources = [
            opened(f"models[{i}]", each) for i, each in enumerate(models)
        ]
        template = sources[0] if base is None else opened("base", base)
        target = template if to_file else opened("output", output)
        _check_output(output, target, template, to_file)
        everything = list(dict.fromkeys([template, *sources, target]))
        checks.raise_all(
            "The models cannot be merged:",
            merge_sources.source_problems(everything, template),
        )
        built = template.model(given["custom_objects"])
        found = merge_sources.weights_of(template, built)
        kept = merge_weights.kept(found, given["include"], given["exclude"])
        specs = [1.0] * len(models) if weights is None else list(weights)
        shares = merge_weights.shares(method, specs, found, kept)
        densities = merge_weights.resolved("density", density, found)
        merge_weights.check_densities(method, densities, options)
        tasks = {
            weight.name: Task(
                shape=weight.shape,
                read=_reader(weight, sources, template),
                weights=shares[weight.name],
                density=densities[weight.name],
                options=options,
                # By the weight's place in the model.
                seed=(given["seed"], number),
                axes=weight.axes,
            )
            for number, weight in enumerate(found)
            if weight.name not in kept
        }
        yield _Plan(found, tasks, kept, everything, template, target)


def _check_models(models, method, base):
    checks.check_choice("method", method, tuple(METHODS))
    if not isinstance(models, (list, tuple)) or not models:
        raise checks.error("models", "a list of models or of files", models)
    if method == "slerp" and len(models) != 2:
        expected = 'two models for method "slerp"'
        raise checks.error("models", expected, f"{len(models)} models")
    if method == "model_stock" and len(models) < 2:
        expected = 'two models or more for method "model_stock"'
        raise checks.error("models", expected, f"{len(models)} models")
    if (base is None) != (method in WITHOUT_BASE):
        expected = f"what the models were trained from, for method {method!r}"
        if base is not None:
            expected = f"None for method {method!r}, which takes no changes"
        raise checks.error("base", expected, base)
    return list(models)


def _options(method, given):
    """Return the `Options`; raise ValueError for what a method ignores."""
    takes = {
        "density": [*merge_weights.DENSITIES],
        "scale": [*{*METHODS} - {*WITHOUT_BASE, "model_stock"}],
        "gamma": ["breadcrumbs"],
        "epsilon": ["della"],
    }
    for name, methods_of in takes.items():
        value = given[name]
        if value is not None and method not in methods_of:
            methods = ", ".join(sorted(methods_of))
            expected = f"None for method {method!r}: it is for {methods}"
            raise checks.error(name, expected, value)
    bounds = {
        "scale": {},
        "gamma": {"least": 0, "below": 1},
        "epsilon": {"least": 0, "below": 1},
    }
    return Options(
        **{
            name: checks.check_float(name, given[name], **each)
            for name, each in bounds.items()
            if given[name] is not None
        }
    )


def _check_output(output, target, template, to_file):
    if to_file:
        if isinstance(template, ModelSource):
            expected = (
                f"a file, as `output` is one: save `{template.argument}` "
                "first, or merge into a model"
            )
            received = f"a model in memory, {template.model(None).name!r}"
            raise checks.error(template.argument, expected, received)
        return
    if not isinstance(target, ModelSource):
        raise checks.error("output", "a path or a built Keras model", output)
    if ledger_of(output).patches:
        raise ValueError(
            "`output` must be without patches, which could not be taken off "
            "again. Call `kwm.Patch.clear(model)` first. Received: "
            f"output={output.name!r} with {list(ledger_of(output).patches)}"
        )


def _reader(weight, sources, base):
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


def _run(
    plan: _Plan,
    method: str,
    output: Any,
    overwrite: bool,
    progress: Progress,
) -> None:
    """Merge, and write the file or give the model its weights."""
    found, tasks = plan.weights, plan.tasks
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
        if weight.name not in tasks:
            whole = slice(0, int(np.prod(weight.shape)))
            yield rounded(weight, template.part(weight.name, whole))
            return
        compute = METHODS[method]
        if weight.is_statistic:
            compute = partial(moved_mean, is_whole=method in ELECTED)
            if method in WITHOUT_BASE:
                compute = mean
        for _, values in compute(tasks[weight.name]):
            yield rounded(weight, values)
        progress.add()

    if isinstance(target, ModelSource):
        merged = {w.name: np.concatenate(list(parts(w))) for w in found}
        for weight in found:
            array = merged[weight.name].reshape(weight.shape)
            if weight.name in tasks:
                array = backend_module("host_memory").tensor_of(array)
            target.variables[weight.name].assign(array)
        return
    reader = template.reader
    with model_file.merged_writer(reader, output, overwrite) as writer:
        for name in reader.entries:
            if not states.is_weight(name):
                writer.write(name, reader.read(name))
        for weight in found:
            writer.write_parts(weight.name, parts(weight))
