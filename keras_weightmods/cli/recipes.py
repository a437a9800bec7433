"""The command `run`: a recipe, stage by stage, resumed where it was."""

import importlib.metadata
import json
import math
import os
import platform
import sys
import time
import warnings
from typing import Any

import numpy as np

import keras_weightmods as kwm
from keras_weightmods.cli import files
from keras_weightmods.cli.command import QUIET, argument, command
from keras_weightmods.cli.models import perplexity_of
from keras_weightmods.cli.recipe import (
    MERGED,
    Recipe,
    check_recipe,
    read_recipe,
)
from keras_weightmods.saving.atomic_file import replacing
from keras_weightmods.saving.bounded_json import parse_json
from keras_weightmods.utils.dtypes import bytes_of
from keras_weightmods.utils.report import size_text

_STATE, _CARD, _ROWS = "state.json", "README.md", "rows.npy"


@command(
    "run",
    argument("recipe", help="a .yaml or .json file; see docs/cli.md"),
    argument("-o", "--output", help="the folder, in place of that in it"),
    argument("--check", action="store_true", help="check it, and no more"),
    QUIET,
)
def _run(args):
    """Merge models, make one sparse, train, quantize, pack, export by a recipe.

    All of the recipe is checked before a model is loaded. Run again after it
    was stopped, it goes on with the stage where it was.

    examples:
      keras-weightmods run recipe.yaml
      keras-weightmods run recipe.yaml --check
    """
    recipe = check_recipe(read_recipe(args.recipe), args.output)
    done = state_of(recipe)
    if args.check:
        names = [name for name, _ in recipe.stages]
        names = ["merge"] * (recipe.merge is not None) + names
        text = f"The recipe can be run: {', '.join(names)}"
        return text, {"stages": names, "done": [each["stage"] for each in done]}
    return Run(recipe, done, not args.quiet).finish()


def state_of(recipe: Recipe) -> list:
    """Return what is recorded of the stages that are done.

    Raises:
        FileExistsError: If there is something else at the output.
    """
    folder = recipe.output
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return []
    path = folder / _STATE
    if not path.is_file():
        raise FileExistsError(
            f"{folder} exists, and is not the output of a recipe. Remove it, "
            "or pass another --output"
        )
    state = parse_json(path.read_bytes())
    # What is still to be done may have been changed, after an error in it.
    done = max(0, len(state["done"]) - 1)
    old, new = (
        {**each, "stages": each.get("stages", [])[:done]}
        for each in (state["recipe"], _comparable(recipe))
    )
    if old != new:
        raise FileExistsError(
            f"{folder} is the output of another recipe, which is in {_STATE} "
            "there. Remove it, or pass another --output"
        )
    return state["done"]


def _comparable(recipe):
    """Return a recipe as JSON gives it back, without its output."""
    source = json.loads(json.dumps(recipe.source))
    return {key: source[key] for key in source if key != "output"}


class Run:
    """A run of a recipe.

    Args:
        recipe: `Recipe`.
        done: List of dicts, the records of the stages that are done. The
            first is of the model as it was.
        verbose: Bool, whether to show progress.
    """

    def __init__(self, recipe, done, verbose):
        self.recipe = recipe
        self.done = done
        self.verbose = verbose
        self.model: Any = None
        self.data: Any = None

    def finish(self):
        """Run what is left; return the result of the command."""
        stages = [("source", {}), *self.recipe.stages]
        self.recipe.output.mkdir(parents=True, exist_ok=True)
        if self.recipe.merge and not self.done:
            # A merge that is stopped leaves a folder that is known.
            self._write(_STATE, json.dumps(self._state(), indent=2))
        for name, options in stages[len(self.done) :]:
            self._say(f"{len(self.done)} of {len(stages) - 1}: {name}")
            began = time.perf_counter()
            if self.recipe.only_merges:
                record = {"stage": name, **self.merged()}
            else:
                self._prepare()
                began = time.perf_counter()
                record = {"stage": name, **_STAGES[name](self, dict(options))}
            if name != "export" and self.model is not None:
                record["bytes"] = bytes_of(
                    (weight.shape, weight.dtype)
                    for weight in self.model.weights
                )
                if self.recipe.evaluate:
                    record["perplexity"] = perplexity_of(
                        self.model,
                        self.recipe.evaluate["data"],
                        self.recipe.evaluate["length"],
                        self.recipe.evaluate["batch_size"],
                        self.verbose,
                    )
            record["seconds"] = round(time.perf_counter() - began, 1)
            self.done.append({**record, "options": options})
            self._write(_STATE, json.dumps(self._state(), indent=2))
        self._write(_CARD, card(self._state()))
        text = f"Wrote {self.recipe.output}: see {_CARD} there"
        return text, {**self._state(), "output": str(self.recipe.output)}

    def _prepare(self):
        """Load the model and the data, where they are not there."""
        import keras

        # For each stage, so that one that is resumed is as it would have been.
        keras.utils.set_random_seed(self.recipe.seed)
        if self.model is not None:
            return
        if self.recipe.merge and not self.done:
            self._merge()
        results = [each["file"] for each in self.done if each.get("file")]
        last = self.recipe.output / results[-1] if results else None
        self.model = files.load_model(str(last or self.recipe.model))
        if self.done:
            self.data = self._read_data()

    def _merge(self):
        """Make the model that the recipe begins with."""
        path = self.recipe.output / MERGED
        given = {"seed": self.recipe.seed, **self.recipe.merge}
        report = kwm.merge(output=path, verbose=int(self.verbose), **given)
        text = json.dumps(report.to_dict(), indent=2)
        self._write(f"{path.stem}.json", text)

    def merged(self):
        """Merge and do no more: no model of the size of the files is loaded."""
        from keras_weightmods.saving.model import open_model
        from keras_weightmods.saving.states import is_weight

        self._merge()
        path = self.recipe.output / MERGED
        with open_model(path) as reader:
            size = bytes_of(
                (entry.shape, entry.dtype)
                for name, entry in reader.entries.items()
                if is_weight(name)
            )
        return {**_file_record(path), "bytes": size}

    def _read_data(self):
        rows = self.recipe.output / _ROWS
        path = str(rows) if rows.exists() else self.recipe.data.get("file")
        options = self.recipe.data
        if path is None:
            return None
        most = None if rows.exists() else options["rows"]
        return files.read_data(self.model, path, most, options["length"])

    def source(self, options):
        """Check that the recipe fits the model; write its rows of tokens."""
        self.data = self._read_data()
        is_lm = files.is_language_model(self.model)
        count = self.recipe.data["self_generated"]
        if count and not is_lm:
            raise ValueError("`self_generated` rows are for a CausalLM")
        cast = self.recipe.options_of("cast")
        if cast is not None and not is_lm:
            _check_supervised(cast, self.data)
        if count:
            own = kwm.self_generated(
                self.model,
                count,
                self.recipe.data["length"],
                seed=self.recipe.seed,
                verbose=int(self.verbose),
            )
            self.data = own if self.data is None else self._joined(own)
        if is_lm and self.data is not None:
            with replacing(str(self.recipe.output / _ROWS)) as path:
                np.save(path, self.data)
        if self.recipe.merge:
            return _file_record(self.recipe.output / MERGED)
        return {}

    def _joined(self, own):
        if self.data.shape[1] != own.shape[1]:
            raise ValueError(
                f"`length` must be that of the rows in `file`, "
                f"{self.data.shape[1]}. Received: length={own.shape[1]}"
            )
        return np.concatenate([self.data, own])

    def sparsify(self, options):
        data = None
        if self.data is not None:
            data = files.inputs_of(self.model, self.data)
        report = kwm.sparsify(
            self.model, data=data, verbose=int(self.verbose), **options
        )
        return self._saved("sparsify", report)

    def cast(self, options):
        fit = {"epochs": 1, "batch_size": 1}
        fit |= {key: options.pop(key) for key in [*fit] if key in options}
        loss = options.pop("loss", None)
        if files.is_language_model(self.model):
            rows = self.data
            x, y = files.inputs_of(self.model, rows[:, :-1]), rows[:, 1:]
        else:
            x, y = self.data
        optimizer = None
        before = self.recipe.options_of("sparsify")
        if before is not None:
            steps = math.ceil(len(y) / fit["batch_size"]) * fit["epochs"]
            optimizer, start = self._start_from(before, steps)
            options |= start
        cast = kwm.CAST(self.model, **options)
        cast.compile(optimizer, loss=loss)
        shown = "auto" if self.verbose else 0
        cast.fit(x, y, verbose=shown, **fit)
        with warnings.catch_warnings():
            # That a later fit loses the pattern: there is none.
            warnings.filterwarnings("ignore", "The finished model is")
            self.model = cast.finalize()
        return self._saved("cast", cast.report)

    def _start_from(self, sparsify, steps):
        """Return the optimizer, and arguments, of CAST from a sparse model.

        As `CAST(init=...)` would have it, whose one-shot start is done.
        """
        from keras_weightmods.sparsity import cast_checks

        criterion = sparsify.get("criterion", "magnitude")
        refine = sparsify.get("refine")
        pattern = sparsify.get("pattern", "2:4")
        recipe = kwm.CAST.default_recipe(criterion, refine)
        recipe["learning_rate"] = cast_checks.default_schedule(
            criterion, refine, steps
        )
        start = {
            "pattern": pattern,
            "targets": sparsify.get("targets"),
            "teacher": files.load_model(self.recipe.model),
            # Of a model that has the pattern this changes nothing.
            "init": "magnitude",
        }
        return kwm.AdamS(pattern=pattern, **recipe), start

    def quantize(self, options):
        report = kwm.quantize(
            self.model,
            files.inputs_of(self.model, self.data),
            verbose=int(self.verbose),
            **options,
        )
        return self._saved("quantize", report)

    def pack(self, options):
        verbose = int(self.verbose)
        report = kwm.pack(self.model, verbose=verbose, **options)
        return self._saved("pack", report)

    def export(self, options):
        name = options.pop("filepath")
        path, verbose = self.recipe.output / name, int(self.verbose)
        kwm.export(self.model, path, verbose=verbose, **options)
        return {"exported": name}

    def _saved(self, name, report):
        """Save the model and the report; return the record of a stage."""
        start = f"{len(self.done)}-{name}"
        file = f"{start}.safetensors"
        path = self.recipe.output / file
        kwm.save_model(self.model, path, verbose=int(self.verbose))
        text = json.dumps(report.to_dict(), indent=2)
        self._write(f"{start}.json", text)
        return _file_record(path)

    def _state(self):
        return {
            "recipe": _comparable(self.recipe),
            "seed": self.recipe.seed,
            "versions": versions(),
            "done": self.done,
        }

    def _write(self, name, text):
        with replacing(str(self.recipe.output / name)) as path:
            with open(path, "w", encoding="utf-8") as file:
                file.write(text + "\n")

    def _say(self, text):
        if self.verbose:
            sys.stderr.write(f"{text}\n")


def _file_record(path):
    return {"file": path.name, "file_bytes": os.path.getsize(path)}


def _check_supervised(cast, data):
    if cast.get("loss") is None or data[1] is None:
        raise ValueError(
            "The stage `cast` needs a `loss`, and labels, `y` in a .npz file, "
            "for a model that is no language model"
        )


_STAGES = {
    name: getattr(Run, name)
    for name in ("source", "sparsify", "cast", "quantize", "pack", "export")
}


def versions():
    """Return the versions of what a run depends on."""
    import keras

    backend = keras.backend.backend()
    names = ["keras", backend, "keras-hub", "numpy"]
    found = {"keras-weightmods": kwm.__version__, "backend": backend}
    found["python"] = platform.python_version()
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def card(state):
    """Return the model card, in Markdown, of a run that is done."""
    recipe, done = state["recipe"], state["done"]
    files = [each["file"] for each in done if each.get("file")]
    is_measured = any("perplexity" in each for each in done)
    columns = ["stage", "options", "weights", "file", "seconds"]
    columns += ["perplexity"] * is_measured
    rows = []
    for each in done:
        options = ", ".join(f"{k}={v!r}" for k, v in each["options"].items())
        size = size_text(each["file_bytes"]) if "file" in each else ""
        file = each.get("file") or each.get("exported") or recipe["model"]
        row = [
            each["stage"],
            options,
            size_text(each["bytes"]) if "bytes" in each else "",
            f"`{file}` {size}".strip(),
            f"{each['seconds']:.1f}",
        ]
        if is_measured:
            value = each.get("perplexity")
            row.append("" if value is None else f"{value:.3f}")
        rows.append(row)
    table = [columns, ["---"] * len(columns), *rows]
    lines = ["| " + " | ".join(row) + " |" for row in table]
    used = [f"- {name} {value}" for name, value in state["versions"].items()]
    parts = [
        f"# {recipe.get('model', 'Merged models')}, changed",
        "Written by `keras-weightmods run`. What was done, in this order, with "
        "the size of the weights after it:",
        "\n".join(lines),
    ]
    if is_measured:
        parts.append(f"Perplexity on `{recipe['evaluate']['data']}`.")
    if files:
        parts += [
            "The result is read by",
            "```py\nimport keras_weightmods as kwm\n\n"
            f'model = kwm.load_model("{files[-1]}")\n```',
        ]
    parts += [
        f"Seed {state['seed']}; with",
        "\n".join(used),
        "The recipe:",
        f"```json\n{json.dumps(recipe, indent=2)}\n```",
    ]
    return "\n\n".join(parts)
