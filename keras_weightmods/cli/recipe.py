"""A recipe: what it may hold, all of it checked before a model is loaded."""

import dataclasses
import inspect
import os
import pathlib
import tempfile
from typing import Any

import keras_weightmods as kwm
from keras_weightmods.cli.files import is_model
from keras_weightmods.saving.bounded_json import parse_json
from keras_weightmods.utils import checks

# In the order in which they can be.
STAGES = ("sparsify", "cast", "quantize", "pack", "export")
_KEYS = {"model", "merge", "output", "seed", "data", "stages", "evaluate"}
# The model that a recipe has merged, in its output.
MERGED = "0-merge.safetensors"
_DATA_KEYS = {"file", "rows", "length", "self_generated"}
_EVALUATE_KEYS = {"data", "length", "batch_size"}
# Arguments of the library's calls that a recipe does not give.
_ELSEWHERE = {
    *("self", "model", "data", "verbose", "teacher", "name"),
    *("overwrite", "kwargs"),
}
_CAST_KEYS = {"epochs", "batch_size", "loss"}
_GGUF_KEYS = {"dtype", "tokenizer_from", "context_length"}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A recipe, checked.

    Attributes:
        model: String, what `load_model` of the command line takes.
        merge: Dict, the arguments of `merge` that makes it; None for none.
        output: Path of the folder to write.
        seed: Int.
        data: Dict: `file`, `rows`, `length`, `self_generated`.
        stages: Tuple of pairs: the name, and a dict of options.
        evaluate: Dict: `data`, `length`, `batch_size`; None for none.
        source: Dict, the recipe as it was read.
    """

    model: str
    merge: dict[str, Any] | None
    output: pathlib.Path
    seed: int
    data: dict[str, Any]
    stages: tuple[tuple[str, dict[str, Any]], ...]
    evaluate: dict[str, Any] | None
    source: dict[str, Any]

    @property
    def only_merges(self) -> bool:
        """Bool, whether the model is not needed once it is merged."""
        others = self.stages or self.evaluate
        asked = self.data.get("file") or self.data["self_generated"]
        return self.merge is not None and not (others or asked)

    def options_of(self, name: str) -> dict[str, Any] | None:
        """Return the options of the stage of a name; None if there is none."""
        return dict(self.stages).get(name)


def read_recipe(path: str) -> Any:
    """Return what a file of JSON or YAML holds."""
    text = pathlib.Path(path).read_text("utf-8")
    if path.endswith(".json"):
        try:
            return parse_json(text)
        except ValueError as error:
            raise ValueError(f"{path} is no valid JSON: {error}") from error
    try:
        import ruamel.yaml
    except ImportError as error:
        raise ImportError(
            "A recipe in YAML needs ruamel.yaml; one in a .json file does "
            "not. Install with: pip install 'keras-weightmods[cli]'"
        ) from error
    try:
        return ruamel.yaml.YAML(typ="safe", pure=True).load(text)
    except ruamel.yaml.error.YAMLError as error:
        raise ValueError(f"{path} is no valid YAML: {error}") from error


def check_recipe(source: Any, output: str | None = None) -> Recipe:
    """Return a `Recipe`.

    Args:
        source: What `read_recipe` returned.
        output: String, the folder to write in place of the one in it.

    Raises:
        ValueError: If anything in it is not as it should be; all problems are
            listed.
    """
    if not isinstance(source, dict):
        raise checks.error("recipe", f"an object of {sorted(_KEYS)}", source)
    problems: list[str] = []

    def attempt(where, check, *arguments, **kwargs):
        try:
            return check(*arguments, **kwargs)
        except (ValueError, TypeError, ImportError, OSError) as error:
            problems.append(f"{where}: {error}")

    attempt("recipe", _check_keys, source, _KEYS)
    found: dict[str, Any] = {
        "seed": 0,
        "data": {},
        "evaluate": None,
        "output": output,
    }
    found |= {key: source[key] for key in _KEYS & {*source}}
    if output is not None:
        found["output"] = output
    attempt("output", checks.check_string, "output", found["output"])
    merging = found.get("merge")
    if merging is None:
        attempt("model", _check_model, found.get("model"))
    else:
        attempt("merge", _check_merge, merging, found.get("model"))
        found["model"] = str(pathlib.Path(str(found["output"]), MERGED))
    attempt("seed", checks.check_int, "seed", found["seed"], 0, 2**32 - 1)
    data = {"rows": 128, "length": 256, "self_generated": 0}
    if attempt("data", _check_keys, found["data"], _DATA_KEYS):
        data |= found["data"]
        attempt("data", _check_file, "file", data.get("file"), True)
        for key, least in (("rows", 1), ("length", 3), ("self_generated", 0)):
            attempt("data", checks.check_int, key, data[key], least)
    evaluate = found["evaluate"]
    if evaluate is not None and attempt(
        "evaluate", _check_keys, evaluate, _EVALUATE_KEYS
    ):
        evaluate = {"length": 1024, "batch_size": 1, **evaluate}
        attempt("evaluate", _check_file, "data", evaluate.get("data"))
        for key in ("length", "batch_size"):
            attempt("evaluate", checks.check_int, key, evaluate[key], 1)
    has_data = bool(data.get("file") or data["self_generated"])
    stages: list[Any] = []
    if merging is None or "stages" in found:
        stages = attempt("stages", _stages, found.get("stages")) or []
    for name, options in stages:
        attempt(name, _CHECKS[name], options, has_data, dict(stages))
    checks.raise_all("The recipe cannot be run:", problems)
    return Recipe(
        found["model"],
        merging,
        pathlib.Path(found["output"]),
        found["seed"],
        data,
        tuple(stages),
        evaluate,
        source,
    )


def _stages(value):
    """Return the pairs of names and options."""
    if not isinstance(value, list) or not value:
        raise checks.error("stages", f"a list of {', '.join(STAGES)}", value)
    found = []
    for stage in value:
        if isinstance(stage, str):
            stage = {stage: None}
        if not isinstance(stage, dict) or len(stage) != 1:
            expected = "a name, or one name with its options"
            raise checks.error("stage", expected, stage)
        ((name, options),) = stage.items()
        checks.check_choice("stage", name, STAGES)
        options = {} if options is None else options
        _check_keys(options, _option_names(name))
        found.append((name, options))
    names = [name for name, _ in found]
    once = [name for name in names if name != "export"]
    order = sorted(names, key=STAGES.index)
    if names != order or len(set(once)) != len(once):
        expected = f"in the order {', '.join(STAGES)}, each once but export"
        raise checks.error("stages", expected, names)
    return found


def _option_names(stage):
    call: Any = {
        "sparsify": kwm.sparsify,
        "cast": kwm.CAST.__init__,
        "quantize": kwm.quantize,
        "pack": kwm.pack,
        "export": kwm.export,
    }[stage]
    names = {*inspect.signature(call).parameters} - _ELSEWHERE
    return names | {"cast": _CAST_KEYS, "export": _GGUF_KEYS}.get(stage, set())


def _check_keys(value, keys):
    if not isinstance(value, dict):
        raise ValueError(f"expected an object of {sorted(keys)}, not {value!r}")
    unknown = sorted(map(str, {*value} - keys))
    if unknown:
        raise ValueError(f"unknown: {unknown}. Known: {sorted(keys)}")
    return True


def _check_model(path):
    checks.check_string("model", path)
    if not is_model(path):
        raise checks.error("model", "a file or preset that is there", path)


def _check_merge(options, model):
    from keras_weightmods.merging.merge import check_merge
    from keras_weightmods.merging.methods import METHODS

    if model is not None:
        raise checks.error("model", "left out beside `merge`", model)
    names = {*inspect.signature(kwm.merge).parameters} - {"options"}
    names |= {name for each in METHODS.values() for name in each.options}
    _check_keys(options, names - {"output", "custom_objects"} - _ELSEWHERE)
    if not isinstance(options.get("models"), list):
        expected = "a list of files of `save_model`"
        raise checks.error("models", expected, options.get("models"))
    for path in options["models"]:
        _check_file("models", path)
    _check_file("base", options.get("base"), True)
    # Into no file yet: the output is a folder that may not be there.
    with tempfile.TemporaryDirectory() as folder:
        check_merge(output=os.path.join(folder, MERGED), **options)


def _check_file(name, path, optional=False):
    checks.check_string(name, path, optional)
    if path is not None and not os.path.isfile(path):
        raise checks.error(name, "a file that is there", path)


def _bound(call, options):
    """Return the options with the defaults of those that are not given."""
    parameters = inspect.signature(call).parameters.values()
    return {p.name: options.get(p.name, p.default) for p in parameters}


def _check_targets(options):
    from keras_weightmods.core import filters

    filters.excluded("targets", options.get("targets"), None, [])


def _need_data(has_data):
    if not has_data:
        raise ValueError("needs `data`: a `file`, or `self_generated` rows")


def _check_sparsify(options, has_data, stages):
    from keras_weightmods.sparsity.criteria import CRITERIA

    values = _bound(kwm.sparsify, options)
    checks.check_choice("criterion", values["criterion"], CRITERIA)
    checks.check_int("batch_size", values["batch_size"], 1)
    _check_targets(options)
    if values["criterion"] != "magnitude" or values["refine"]:
        _need_data(has_data)


def _check_cast(options, has_data, stages):
    import keras

    from keras_weightmods.ops.nm import parse_pattern

    _need_data(has_data)
    if "sparsify" in stages:
        for key in ("init", "init_refine", "init_rows", "pattern", "targets"):
            if key in options:
                raise ValueError(
                    f"`{key}` is that of the stage `sparsify` before it"
                )
    checks.check_int("epochs", options.get("epochs", 1), 1)
    checks.check_int("batch_size", options.get("batch_size", 1), 1)
    if options.get("loss") is not None:
        keras.losses.get(options["loss"])
    _check_targets(options)
    # It checks its arguments as it is made, of any model.
    size = parse_pattern(options.get("pattern", "2:4"))[1]
    tiny = keras.Sequential([keras.Input((size,)), keras.layers.Dense(size)])
    left_out = {*_CAST_KEYS, "targets"}
    given = {k: v for k, v in options.items() if k not in left_out}
    kwm.CAST(tiny, **given)


def _check_quantize(options, has_data, stages):
    _need_data(has_data)
    values = _bound(kwm.quantize, options)
    checks.check_int("bits", values["bits"], 2, 4)
    _check_targets(options)


def _check_pack(options, has_data, stages):
    from keras_weightmods.packing.pack import check_arguments

    values = _bound(kwm.pack, options)
    names = "dtype", "head", "activations", "trainable"
    check_arguments(*(values[name] for name in names))
    _check_targets(options)


def _check_export(options, has_data, stages):
    from keras_weightmods.exporting import export, gguf_file

    values = _bound(kwm.export, options)
    checks.check_choice("format", values["format"], tuple(export.ENDINGS))
    checks.check_bool("keep_packed", values["keep_packed"])
    checks.check_string("filepath", options.get("filepath"))
    ending = export.ENDINGS[values["format"]]
    name = pathlib.Path(options["filepath"])
    if name.name != str(name) or (ending and name.suffix != ending):
        expected = f"the name of a file in the output, ending in {ending!r}"
        raise checks.error("filepath", expected, options["filepath"])
    export.check_needs(values["format"], values["keep_packed"])
    if values["format"] != "gguf" and _GGUF_KEYS & {*options}:
        raise ValueError(f"{sorted(_GGUF_KEYS)} are for the format 'gguf'")
    if values["format"] == "gguf":
        checks.check_choice(
            "dtype", options.get("dtype", "f16"), gguf_file.DTYPES
        )
        length = options.get("context_length", 1)
        checks.check_int("context_length", length, 1)
        _check_file("tokenizer_from", options.get("tokenizer_from"), True)


_CHECKS = {
    "sparsify": _check_sparsify,
    "cast": _check_cast,
    "quantize": _check_quantize,
    "pack": _check_pack,
    "export": _check_export,
}
