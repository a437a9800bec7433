"""The decisions of `quantize`, in files from which the same call continues."""

import collections
import contextlib
import dataclasses
import json
import pathlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import keras
from keras import ops

from keras_weightmods.backend import whole
from keras_weightmods.calibration.block_reconstruction import ReconstructedBlock
from keras_weightmods.core import keras_compat
from keras_weightmods.core.targets import Target
from keras_weightmods.ops.rounding import Grid
from keras_weightmods.patches.checkpoint import Checkpoint
from keras_weightmods.quantization.grid_weights import GridScales
from keras_weightmods.quantization.report import QuantizedKernel
from keras_weightmods.saving.bounded_json import json_array
from keras_weightmods.saving.container import Reader, write_arrays
from keras_weightmods.saving.file_kinds import metadata_of
from keras_weightmods.utils import checks
from keras_weightmods.utils.progress import Progress
from keras_weightmods.version import __version__

_FORMAT, _VERSION = "keras_weightmods.quantize", 1
_JSON, _FILES = "step.json", "quantize-*.safetensors"


class Record:
    """The decisions of a call of `quantize`, and the files of its steps.

    Args:
        folder: String or path, where each step is written and those of an
            interrupted call are read; None for neither.
        model: A built Keras model or layer, as it was given.
        batches: List of pairs (inputs, sample weights or None), or None where
            the model writes them.
        targets: List of the `Target` to round.
        arguments: Dict, of JSON, of the arguments that decide.
        verbose: 0 or 1, whether to show progress.

    Attributes:
        rows: Dict by key of the `QuantizedKernel`, in the order of rounding.
        scales: Dict by key of the `GridScales`; where scales are not trained,
            only until they are written.
        blocks: List of the `ReconstructedBlock`.

    Raises:
        ValueError: If there can be no such folder, or it holds steps of
            another call.
    """

    def __init__(
        self,
        folder: Any,
        model: Any,
        batches: Any,
        targets: Sequence[Target],
        arguments: dict[str, Any],
        verbose: Any,
    ) -> None:
        self.rows: dict[str, QuantizedKernel] = {}
        self.scales: dict[str, GridScales] = {}
        self.blocks: list[ReconstructedBlock] = []
        self._trains_scales = "scales" in arguments["refine"]
        self._steps: set[str] = set()
        self._folder: Any = None
        if folder is None:
            return
        self._folder = pathlib.Path(checks.check_path("resume", folder))
        try:
            self._folder.mkdir(exist_ok=True)
        except OSError as error:
            expected = "a folder, or a new one in a folder that exists"
            raise checks.error("resume", expected, folder) from error
        data = [x for x in keras.tree.flatten(batches) if x is not None]
        data = [ops.convert_to_numpy(x) for x in data]
        with Progress(len(model.weights), "weight", verbose) as progress:
            weights = Checkpoint("model", model).fingerprint(see=progress.add)
        # The same weights may be used in another compute type.
        layers = keras_compat.layers_of(model)
        kinds = [f"{type(x).__name__} {x.compute_dtype}" for x in layers]
        facts = {
            **arguments,
            "backend": keras.backend.backend(),
            "data": Checkpoint("data", data).fingerprint() if data else None,
            "model": [weights, collections.Counter(kinds)],
            "targets": [*map(_place, targets)],
            "version of keras_weightmods": __version__,
        }
        self._facts = json.loads(json.dumps(facts))
        for path in sorted(self._folder.glob(_FILES)):
            name = path.stem.removeprefix("quantize-")
            try:
                with self._reader(name) as reader:
                    found = reader.read_json(_JSON)["facts"]
            except (ValueError, OSError) as error:
                warnings.warn(
                    "A step of `quantize` cannot be read, and is done again. "
                    f"{error}",
                    stacklevel=3,
                )
                continue
            # Compare their text: 4 bits are not a mean of 4.0.
            other = [
                name
                for name, fact in self._facts.items()
                if repr(found.get(name)) != repr(fact)
            ]
            if other:
                raise ValueError(
                    "`resume` continues the same call. Received: "
                    f"resume={checks.shown(str(folder))}, with steps of a call "
                    f"that differs in {', '.join(other)}. Repeat that call, or "
                    "pass another folder to begin anew."
                )
            self._steps.add(name)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """Return the JSON value of `make`, or its value in an earlier call."""
        if name in self._steps:
            with self._reader(name) as reader:
                return reader.read_json(_JSON)["step"]
        step = make()
        self._write(name, step)
        return step

    def keep(
        self, targets: Sequence[Target], block: ReconstructedBlock | None = None
    ) -> None:
        """Write the decisions on kernels, and on their block."""
        own = {target.key: target for target in targets}
        rows, tensors = {}, {}
        for key in filter(own.__contains__, self.rows):
            place, scales = _place(own[key]), self.scales[key]
            row = dataclasses.astuple(self.rows[key])[3:]
            rows[place] = row, dataclasses.astuple(scales.grid)
            tensors[f"{place}/values"] = own[key].variable
            tensors[f"{place}/scales"] = scales.scales
        step = rows, block and dataclasses.astuple(block)
        self._write(_place(targets[0]), step, tensors)
        if not self._trains_scales:
            for key in own:
                self.scales.pop(key, None)

    def recall(self, targets: Sequence[Target]) -> list[Any]:
        """Change kernels as an earlier call did.

        Returns:
            List of pairs, of those of `targets` that were changed, and their
            rows.
        """
        pairs = []
        own = {_place(target): target for target in targets}
        for name in filter(self._steps.__contains__, own):
            with self._reader(name) as reader:
                rows, block = reader.read_json(_JSON)["step"]
                for place, (row, grid) in rows.items():
                    target = own[place]
                    target.variable.assign(reader.read(f"{place}/values"))
                    scales = reader.read(f"{place}/scales")
                    self.scales[target.key] = GridScales(
                        target, ops.convert_to_tensor(scales), Grid(*grid)
                    )
                    about = target.key, target.path, target.shape
                    self.rows[target.key] = QuantizedKernel(*about, *row)
                    pairs.append((target, self.rows[target.key]))
            if block:
                self.blocks.append(ReconstructedBlock(*block))
        return pairs

    def _reader(self, name: str) -> Reader:
        return Reader(self._path(name), _FORMAT, (_VERSION,))

    def _write(self, name: str, step: Any, tensors: Any = None) -> None:
        if self._folder is None:
            return
        arrays = {key: whole(x) for key, x in (tensors or {}).items()}
        arrays[_JSON] = json_array({"facts": self._facts, "step": step})
        write_arrays(self._path(name), _FORMAT, _VERSION, arrays)
        self._steps.add(name)

    def _path(self, name: str) -> Any:
        return self._folder / _FILES.replace("*", name)


def remove_record(folder: str) -> None:
    """Remove the steps in a folder, and the folder if it is then empty."""
    path = pathlib.Path(folder)
    for file in path.glob(_FILES):
        if metadata_of(file).get("format") == _FORMAT:
            file.unlink()
    with contextlib.suppress(OSError):
        path.rmdir()


def _place(target: Target) -> str:
    """Return the place of a kernel; its path may have changing numbers."""
    return target.key.partition(":")[0]
