"""Configs of mergekit, as arguments of `merge`."""

import re
from typing import Any

from keras_weightmods.merging.methods import METHODS
from keras_weightmods.saving.bounded_json import parse_json
from keras_weightmods.utils import checks

# Keys that do not affect weights, or that the files here know themselves.
_PASSED_OVER = {
    *("chat_template", "dtype", "name", "out_dtype", "tokenizer"),
    "tokenizer_source",
}
_KEYS = {"base_model", "merge_method", "models", "parameters"}
# Methods that divide by the sum of the weights in mergekit by default.
_DIVIDE = ("linear", "ties", "della")
_MOST_BYTES, _MOST_VALUES, _MOST_LEVELS = 2**20, 100_000, 20


def arguments_of(config: Any) -> dict[str, Any]:
    """Return the arguments of `merge` for a config of mergekit.

    Args:
        config: Dict, or the path of a file of YAML. Its models are files that
            `merge` reads; a filter is searched for in the paths of variables.

    Raises:
        ValueError: If it is no such config, or says what `merge` cannot do.
    """
    if isinstance(config, dict):
        return _arguments_of(config)
    path = checks.check_path("config", config)
    try:
        return _arguments_of(_read(path))
    except ValueError as error:
        raise ValueError(f"{checks.cut(path)}: {error}") from error


def _arguments_of(config: dict[Any, Any]) -> dict[str, Any]:
    _check_size(config)
    unknown = {*config} - _KEYS - _PASSED_OVER
    names = {each.mergekit or name: name for name, each in METHODS.items()}
    given = config.get("merge_method")
    if unknown or not isinstance(given, str) or given not in names:
        expected = (
            f"a config with `models` and a `merge_method` of {sorted(names)}, "
            f"and of the keys {sorted(_KEYS)}"
        )
        raise checks.error("config", expected, config)
    method = names[given]
    chosen, base = METHODS[method], config.get("base_model")
    rows = config.get("models")
    if not isinstance(rows, list) or not all(
        isinstance(row, dict) and "model" in row for row in rows
    ):
        raise checks.error("models", "a list of `model: FILE`", rows)
    # The base may be among them. It then does not count as a model.
    rows = [
        row
        for row in rows
        if not (chosen.needs_base and row["model"] == base)
        or row.get("parameters")
    ]
    if not rows:
        raise checks.error("models", "a list of one or more", rows)
    found: dict[str, Any] = {"method": method}
    found["models"] = models = [row["model"] for row in rows]
    found["base"] = base if chosen.needs_base else None
    shared, *own = (each.get("parameters") or {} for each in (config, *rows))
    for each in (shared, *own):
        if not isinstance(each, dict):
            raise checks.error("parameters", "names and their values", each)
    divides = shared.get("normalize", given in _DIVIDE)
    ours = chosen.weights in ("mean", "votes")
    is_arc = method == "slerp"
    if chosen.weights != "none" and not is_arc and bool(divides) != ours:
        expected = f"{str(ours).lower()} for {given!r}"
        raise checks.error("normalize", expected, divides)
    if is_arc and "t" in shared:
        share = shared["t"]
        rest = _spec(share, lambda t: 1 - checks.check_float("t", t))
        found["weights"] = [rest, _spec(share)]
        if base == models[-1]:
            found["weights"].reverse()
    elif chosen.weights != "none":
        everywhere = shared.get("weight", 1.0)
        weights = [each.get("weight", everywhere) for each in own]
        found["weights"] = [_spec(weight) for weight in weights]
    # Here one number is for all models.
    done = {"normalize", "t"} if is_arc else {"normalize"}
    for name in ({*shared} - done).union(*own) - {"weight"}:
        values = [each.get(name, shared.get(name)) for each in own]
        if any(value != values[0] for value in values):
            raise checks.error(name, "the same for all models", values)
        found["scale" if name == "lambda" else name] = _spec(values[0])
    return found


def _spec(value: Any, change: Any = lambda number: number) -> Any:
    """Return a number, a gradient or filters as `merge` takes them."""
    if not isinstance(value, list):
        return change(value)
    if not all(isinstance(each, dict) for each in value):
        return [change(each) for each in value]
    if not all(
        "value" in each and isinstance(each.get("filter"), str | None)
        for each in value
    ):
        expected = "numbers, or a list of `filter: STRING` and `value: NUMBER`"
        raise checks.error("parameters", expected, value)
    # Both use the first that fits.
    return {
        re.escape(each.get("filter") or ""): _spec(each["value"], change)
        for each in value
    }


def _check_size(config: Any) -> None:
    """Raise ValueError for values too large or too nested for a config.

    An alias in YAML can stand for a value of any size, or for itself.
    """
    left, count = [(config, 0)], 0
    while left:
        value, depth = left.pop()
        count += 1
        if count > _MOST_VALUES or depth > _MOST_LEVELS:
            expected = (
                f"of at most {_MOST_VALUES} values in {_MOST_LEVELS} levels"
            )
            raise checks.error("config", expected, config)
        if isinstance(value, dict):
            left += [(each, depth + 1) for each in value.values()]
        elif isinstance(value, (list, tuple)):
            left += [(each, depth + 1) for each in value]


def _read(path: str) -> Any:
    """Return what a file of YAML or JSON holds, a dict."""
    if not path.endswith((".yml", ".yaml", ".json")):
        expected = "a list of models, or mergekit's .yml, .yaml or .json file"
        raise checks.error("models", expected, path)
    with open(path, "rb") as file:
        text = file.read(_MOST_BYTES + 1)
    if len(text) > _MOST_BYTES:
        raise ValueError(f"It has more than {_MOST_BYTES} bytes")
    try:
        if path.endswith(".json"):
            found = parse_json(text)
        else:
            found = _parse_yaml(text)
    except ImportError as error:
        what = "A config in YAML, unlike one in JSON,"
        raise checks.not_installed(what, "ruamel.yaml", error) from error
    # YAML's errors do not derive from Python's.
    except Exception as error:
        raise ValueError(f"It cannot be read: {checks.cut(error)}") from error
    if not isinstance(found, dict):
        raise checks.error("config", "an object", found)
    return found


def _parse_yaml(text: bytes) -> Any:
    """Return the value of a YAML text that does not take long to read."""
    import ruamel.yaml

    depth = 0
    for event in ruamel.yaml.YAML(typ="safe", pure=True).parse(text):
        depth += isinstance(event, ruamel.yaml.CollectionStartEvent)
        depth -= isinstance(event, ruamel.yaml.CollectionEndEvent)
        if depth > _MOST_LEVELS:
            raise ValueError(f"more than {_MOST_LEVELS} levels")
        # Each merge of merges copies more.
        tag = str(getattr(event, "tag", None))
        if getattr(event, "value", None) == "<<" or tag.endswith(":merge"):
            raise ValueError("a merge key `<<`: write out what it stands for")
    return ruamel.yaml.YAML(typ="safe", pure=True).load(text)
