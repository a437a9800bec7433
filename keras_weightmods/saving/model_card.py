"""Model cards: what a model is and how it was made, in Markdown beside it."""

import collections
import contextlib
import dataclasses
import datetime
import importlib
import json
import math
import numbers
import os
import pathlib
import re
import shlex
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from keras_weightmods.saving.atomic_file import check_filepath, replacing
from keras_weightmods.utils import checks
from keras_weightmods.utils.report import Report, size_text
from keras_weightmods.version import __version__

# The last line of a card. A file without it is not replaced.
_MARK = "<!-- Written by keras_weightmods, which may replace this file. "
_MARK += "Delete this line to keep it. -->"
# What a file is -> the code that loads it.
_LOADS = {
    "save_model": """import keras_weightmods as kwm

model = kwm.load_model({name})""",
    "keras": """import keras
import keras_weightmods

model = keras.models.load_model({name})""",
    "tf_saved_model": """import tensorflow as tf
import keras_weightmods.runtime  # for packed weights

model = tf.saved_model.load({name})""",
    "onnx": """import onnxruntime

session = onnxruntime.InferenceSession({name})""",
    "openvino": """import openvino

model = openvino.compile_model({name})""",
    "litert": """from ai_edge_litert.interpreter import Interpreter

model = Interpreter({name})""",
    "torch": """import torch
import keras_weightmods.runtime  # for packed weights

model = torch.export.load({name}).module()""",
    "transformers": """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({name})""",
    "gguf": """import keras_weightmods as kwm

model = kwm.load_gguf({name})  # or: llama-cli -m {name}""",
}
# What a file is -> the library that loads it, as Hugging Face names it.
_LIBRARIES = {
    "save_model": "keras_weightmods",
    "keras": "keras",
    "transformers": "transformers",
}


@dataclasses.dataclass(frozen=True)
class ModelCard:
    """Describe a model, for the card that is written beside its file.

    Pass it as `card=` to `save_model` or `export`. These write Markdown in the
    format of Hugging Face's model cards: `small.safetensors.md` beside
    `small.safetensors`, and `README.md` in a folder. A card has what is given
    here, the number and the formats of the weights, the bytes on disk, code
    that loads the file, the versions and the date. A file that is no such card
    is never replaced.

    Read a card before you publish it: it has the command line of your program.

    Args:
        base_model: String, what the model was made from, such as its name on
            Hugging Face. Defaults to `None`.
        license: String, the license, such as `"apache-2.0"`. Defaults to
            `None`.
        quality: Dict from strings, what was measured, to numbers or strings.
            Defaults to `None`, for nothing.
        steps: List of what was done: strings, or the reports that `quantize`,
            `sparsify`, `pack`, `merge` and others return. Defaults to none.
        command: String, the command that made the model, empty for none. By
            default, `None`, it is the command line of this process, and none
            in an interpreter or a notebook.

    Raises:
        ValueError: If an argument is something else.

    Example:

    ```python
    import os
    import tempfile
    import keras
    import keras_weightmods as kwm

    model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(4)])
    report = kwm.sparsify(model, "2:4")
    card = kwm.ModelCard(
        base_model="me/dense",
        license="mit",
        quality={"accuracy": 0.98},
        steps=[report],
    )
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "sparse.safetensors")
        kwm.save_model(model, path, card=card)
        with open(path + ".md") as file:
            assert "- Sparsify: 2:4 by magnitude" in file.read()
    ```

    Reference:
        https://huggingface.co/docs/hub/model-cards
    """

    base_model: str | None = None
    license: str | None = None
    quality: Mapping[str, Any] | None = None
    steps: Sequence[str | Report] = ()
    command: str | None = None

    def __post_init__(self) -> None:
        checks.check_string("base_model", self.base_model, optional=True)
        checks.check_string("license", self.license, optional=True)
        quality, command = self.quality, self.command
        if quality is not None and not (
            isinstance(quality, Mapping)
            and all(isinstance(key, str) for key in quality)
            and all(
                isinstance(x, str) or checks.is_number(x)
                for x in quality.values()
            )
        ):
            expected = "a dict from strings to numbers or strings, or None"
            raise checks.error("quality", expected, quality)
        if not isinstance(self.steps, (list, tuple)) or not all(
            isinstance(step, (str, Report)) for step in self.steps
        ):
            expected = "a list of strings and reports"
            raise checks.error("steps", expected, self.steps)
        if command is not None and not isinstance(command, str):
            raise checks.error("command", "a string or None", command)

    def sentences(self) -> list[str]:
        """Return what was done, each step on a line."""
        steps = (x if isinstance(x, str) else x.summary() for x in self.steps)
        return [" ".join(step.split()) for step in steps]


def path_of(filepath: str, is_folder: bool = False) -> str:
    """Return the path of the card of a model's file or folder."""
    return (
        os.path.join(filepath, "README.md") if is_folder else filepath + ".md"
    )


def check_card(card: Any) -> None:
    """Raise ValueError unless `card` is a `ModelCard` or None."""
    if card is not None and not isinstance(card, ModelCard):
        raise checks.error("card", "a `kwm.ModelCard` or None", card)


def check_path(path: str, overwrite: bool = True) -> None:
    """Raise an error if a card must not replace the file at `path`."""
    if not os.path.lexists(path):
        return
    found = pathlib.Path(check_filepath(path))
    if _MARK.encode() not in found.read_bytes():
        raise FileExistsError(
            "This package did not write the file in the model card's place, "
            f"and does not replace it. Received: {checks.shown(path)}. Move "
            "that file, or save the model under another name."
        )
    check_filepath(path, overwrite)


def warn_of_old(path: str) -> None:
    """Warn if the card of an earlier file stays there."""
    if (
        os.path.isfile(path)
        and _MARK.encode() in pathlib.Path(path).read_bytes()
    ):
        warnings.warn(
            f"{checks.shown(path)} describes the model that was saved before. "
            "Pass `card=` to replace this card, or delete it.",
            stacklevel=3,
        )


def write(
    card: ModelCard, filepath: str, size: int, model: Any, kind: str
) -> None:
    """Write the card of a file or folder that was written.

    Args:
        card: `ModelCard`.
        filepath: String, the file or folder.
        size: Int, the bytes of all its files.
        model: The Keras model in it; None to say nothing of it.
        kind: String, `"save_model"`, `"keras"` or a format of `export`.
    """
    # The command line reads files without Keras.
    import keras

    from keras_weightmods.core.reparameterization import weight_formats

    about = f"{size_text(size)} on disk."
    sizes: dict[str, list[int]] = collections.defaultdict(list)
    if model is not None:
        for shape, form in weight_formats(model):
            sizes[form].append(math.prod(shape))
        total = sum(map(sum, sizes.values()))
        about = f"A `{type(model).__name__}` of {total:,} parameters, {about}"
        rows = [(len(x), form, f"{sum(x):,}") for form, x in sizes.items()]
        table = _table(("weights", "format in Keras", "parameters"), rows)
        about += f"\n\n{table}"
    # A GGUF file has types of its own.
    forms = () if kind == "gguf" else sizes
    packed = {x for form in forms if " " in form for x in form.split()}
    head = {
        "library_name": _LIBRARIES.get(kind),
        "license": card.license,
        "base_model": card.base_model,
        "tags": ["keras-weightmods", *sorted(packed - {"dense"})],
    }
    command = _command_line() if card.command is None else card.command
    backend = keras.backend.backend()
    version = importlib.import_module(backend).__version__
    name = os.path.basename(filepath)
    code = _LOADS.get(kind, "").replace("{name}", json.dumps(name))
    quality = (
        (key, x if isinstance(x, (str, numbers.Integral)) else f"{x:.6g}")
        for key, x in (card.quality or {}).items()
    )
    sections = {
        "How to load it": code and f"```python\n{code}\n```",
        "What was done": "\n".join(f"- {x}" for x in card.sentences()),
        "Command": command and f"```bash\n{command}\n```",
        "Measured quality": card.quality
        and _table(("measure", "value"), quality),
        "Versions": f"keras_weightmods {__version__}, Keras "
        f"{keras.__version__}, {backend} {version}, on {datetime.date.today()}",
    }
    lines = [
        "---",
        # Each value as JSON is YAML too.
        *(
            f"{key}: {json.dumps(value, ensure_ascii=False)}"
            for key, value in head.items()
            if value
        ),
        f"---\n\n# {name}\n\n{about}",
        *(f"\n## {key}\n\n{value}" for key, value in sections.items() if value),
        f"\n{_MARK}\n",
    ]
    with replacing(path_of(filepath, os.path.isdir(filepath))) as path:
        pathlib.Path(path).write_text("\n".join(lines), "utf-8", "replace")


def read(filepath: str) -> ModelCard:
    """Return the card beside a file, to begin that of the next file with.

    The quality is left out: it holds for this file alone.
    """
    path = path_of(filepath)
    content = ""
    if os.path.isfile(path):
        content = pathlib.Path(path).read_text("utf-8", errors="replace")

    def found(pattern: str) -> str:
        match = re.search(pattern, content, re.MULTILINE | re.DOTALL)
        return match[1] if match else ""

    def given(key: str) -> str | None:
        value = found(rf"\A---\n(?:[^\n]+\n)*?{key}: ([^\n]+)")
        # The user may have written the line without quotes.
        with contextlib.suppress(ValueError):
            value = json.loads(value)
        return value if value and isinstance(value, str) else None

    steps = found(r"^## What was done\n\n(.*?)\n\n")
    return ModelCard(
        base_model=given("base_model"),
        license=given("license"),
        steps=re.findall("^- (.+)$", steps, re.MULTILINE),
        command=found(r"^## Command\n\n```bash\n(.*?)\n```"),
    )


def _table(heads: Sequence[str], rows: Any) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    cells = ([" ".join(f"{cell}".split()) for cell in line] for line in lines)
    bar = "\\|"
    return "\n".join(
        f"| {' | '.join(cell.replace('|', bar) for cell in line)} |"
        for line in cells
    )


def _command_line() -> str:
    """Return the command line of this process; empty in an interpreter."""
    if not hasattr(sys.modules["__main__"], "__file__"):
        return ""
    program, *arguments = sys.orig_argv
    return shlex.join([os.path.basename(program), *arguments])
