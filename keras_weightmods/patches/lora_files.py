"""LoRA adapters in files: KerasHub's own, and those of peft."""

import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from typing import Any

import numpy as np

from keras_weightmods.core import keras_private
from keras_weightmods.patches.checkpoint import Checkpoint
from keras_weightmods.saving.atomic_file import replacing
from keras_weightmods.utils import checks

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_FACTOR = re.compile(
    r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight"
)
# Settings of peft with which a change is not alpha / rank * B A alone.
_MORE_THAN_FACTORS = (
    "alpha_pattern",
    "bias",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "use_dora",
)
_NONE = np.empty((0, 0), "float32")
_OTHER_MODEL = "must be an adapter of this model"


@dataclasses.dataclass(frozen=True, eq=False)
class Factors:
    """The change of a kernel as a product.

    Attributes:
        target: `Target` of the kernel.
        left: float32 array (K, rank).
        right: float32 array (rank, N).
    """

    target: Any
    left: np.ndarray
    right: np.ndarray


class HubFile:
    """A file of KerasHub's `save_lora_weights`.

    Keras multiplies by the last axis: of a kernel with three, the matrix is
    not the one that the layer contracts with.

    Args:
        model: A KerasHub model or backbone.
        targets: The `Target`s of the model.

    Raises:
        ValueError: If it is no such model.
    """

    def __init__(self, model, targets):
        self.backbone = getattr(model, "backbone", model)
        if not hasattr(self.backbone, "save_lora_weights"):
            expected = "a KerasHub model or backbone"
            raise checks.error("model", expected, model)
        # As KerasHub numbers them.
        self.layers = [
            layer
            for layer in keras_private.layers_of(self.backbone)
            if layer is not self.backbone and layer.weights
        ]
        self.targets = {
            id(t.layer): t for t in targets if t.attribute == "kernel"
        }

    def reason_to_skip(self, target):
        """Return why a kernel cannot have an adapter; None if it can."""
        kind = type(target.layer).__name__
        has_lora = hasattr(target.layer, "enable_lora")
        if not has_lora or not any(t is target for t in self.targets.values()):
            return f"of {kind}, which has no LoRA for it"
        if not any(layer is target.layer for layer in self.layers):
            return "outside of the backbone"
        return None

    @staticmethod
    def matrix_shape(target):
        """Return the shape of the matrix that factors make of a kernel."""
        return math.prod(target.shape[:-1]), target.shape[-1]

    def to_matrix(self, change, target):
        """Return an array of the kernel's shape as that matrix."""
        return change.reshape(self.matrix_shape(target))

    def from_matrix(self, matrix, target):
        """Undo `to_matrix`."""
        return matrix.reshape(target.shape)

    def write(self, filepath, factors, rank):
        """Write a list of `Factors`, all of that rank.

        `enable_lora` takes all layers of a name: those that have not changed
        get factors with a product of zero.
        """
        import h5py

        by_layer = {id(each.target.layer): each for each in factors}
        names = {each.target.layer.name for each in factors}
        random = np.random.default_rng(0)
        with replacing(os.path.realpath(filepath)) as path:
            with h5py.File(path, "w") as file:
                file["lora/vars/rank"] = rank
                for number, layer in enumerate(self.layers):
                    if layer.name not in names or not hasattr(
                        layer, "enable_lora"
                    ):
                        continue
                    shape = layer.kernel.shape
                    if id(layer) in by_layer:
                        left = by_layer[id(layer)].left
                        right = by_layer[id(layer)].right
                    else:
                        size = math.prod(shape[:-1])
                        left = random.normal(size=(size, rank)) / size**0.5
                        right = np.zeros((rank, shape[-1]))
                    left = left.reshape(*shape[:-1], rank)
                    group = f"lora/{number}/vars"
                    file[f"{group}/lora_kernel_a"] = left.astype("float32")
                    file[f"{group}/lora_kernel_b"] = right.astype("float32")

    def read(self, filepath):
        """Return the list of `Factors` in a file; ValueError for others."""
        import h5py

        found = []
        with h5py.File(filepath, "r") as file:
            for name, group in file.get("lora", {}).items():
                if name == "vars":
                    continue
                known = name.isdecimal() and int(name) < len(self.layers)
                layer = self.layers[int(name)] if known else None
                target = self.targets.get(id(layer))
                pair = [
                    np.array(group[f"vars/lora_kernel_{which}"], "float32")
                    for which in "ab"
                ]
                left = pair[0].reshape(-1, pair[0].shape[-1])
                shape = left.shape[0], pair[1].shape[-1]
                if target is None or shape != self.matrix_shape(target):
                    expected = f"{_OTHER_MODEL}. It holds one of layer {name}"
                    raise checks.error("lora", expected, os.fspath(filepath))
                found.append(Factors(target, left, pair[1]))
        return found


class PeftFolder:
    """A folder of peft: its config, and the factors in safetensors.

    A kernel is found among the tensors of transformers by its values, as
    KerasHub exports them: the one that holds its matrix and nothing else,
    transposed or not.

    Args:
        model: A KerasHub model or backbone that `export_to_transformers` can
            write.
        targets: The `Target`s of the model.

    Raises:
        ValueError: If KerasHub cannot export it.
    """

    def __init__(self, model, targets):
        self.task = "CAUSAL_LM" if "CausalLM" in type(model).__name__ else None
        self.backbone = getattr(model, "backbone", model)
        if not hasattr(self.backbone, "export_to_transformers"):
            expected = "a KerasHub model or backbone"
            raise checks.error("model", expected, model)
        values = Checkpoint("model", model)
        tensors = _tensors_in_transformers(self.backbone)
        self.names: dict[str, str] = {}
        self.targets: dict[str, Any] = {}
        self.is_transposed = False
        for target in targets:
            if target.stack_axes:
                continue
            matrix = self.to_matrix(values.read(position_of(target)), target)
            # (out, in) is that of a Linear, (in, out) GPT-2's own.
            for is_linear, array in ((True, matrix.T), (False, matrix)):
                name = tensors.get((array.shape, _digest(array)))
                if name is not None and name not in self.targets:
                    self.names[target.key] = name
                    self.targets[name] = target
                    self.is_transposed |= not is_linear
                    break

    def reason_to_skip(self, target):
        """Return why a kernel cannot have an adapter; None if it can."""
        if target.key in self.names:
            return None
        return (
            "not one tensor of transformers is this kernel and nothing else, "
            "or several have its values, as in a model that was not trained"
        )

    @staticmethod
    def matrix_shape(target):
        """Return the shape of the matrix that factors make of a kernel."""
        axes = target.contraction_axes, target.output_axes
        rows, columns = (math.prod(target.shape[i] for i in x) for x in axes)
        return rows, columns

    def to_matrix(self, change, target):
        """Return an array of the kernel's shape as that matrix."""
        order = (*target.contraction_axes, *target.output_axes)
        return change.transpose(order).reshape(self.matrix_shape(target))

    def from_matrix(self, matrix, target):
        """Undo `to_matrix`."""
        order = (*target.contraction_axes, *target.output_axes)
        change = matrix.reshape([target.shape[axis] for axis in order])
        return change.transpose(np.argsort(order))

    def write(self, filepath, factors, rank):
        """Write a list of `Factors`, all of that rank."""
        from safetensors.numpy import save_file

        arrays, modules = {}, []
        for each in factors:
            name = self.names[each.target.key].removesuffix(".weight")
            modules.append(name)
            for which, array in (("A", each.left), ("B", each.right)):
                key = f"base_model.model.{name}.lora_{which}.weight"
                arrays[key] = np.ascontiguousarray(array.T, "float32")
        config = {
            "peft_type": "LORA",
            "task_type": self.task,
            "base_model_name_or_path": None,
            "r": rank,
            "lora_alpha": rank,
            "lora_dropout": 0.0,
            "bias": "none",
            "fan_in_fan_out": self.is_transposed,
            "inference_mode": True,
            "target_modules": modules,
        }
        path = os.path.realpath(filepath)
        parent = os.path.dirname(path)
        with tempfile.TemporaryDirectory(dir=parent, prefix=".") as folder:
            made = os.path.join(folder, "adapter")
            os.mkdir(made)
            save_file(arrays, os.path.join(made, _WEIGHTS), {"format": "pt"})
            with open(os.path.join(made, _CONFIG), "w") as file:
                json.dump(config, file, indent=2)
            if os.path.isdir(path):
                shutil.rmtree(path)
            os.replace(made, path)

    def read(self, filepath):
        """Return the list of `Factors` in a folder; ValueError for others."""
        from safetensors.numpy import load_file

        with open(os.path.join(filepath, _CONFIG)) as file:
            config = json.load(file)
        more = [
            f"{name}={config[name]!r}"
            for name in _MORE_THAN_FACTORS
            if config.get(name) not in (None, False, "none", {}, [])
        ]
        if config.get("peft_type") != "LORA" or more:
            expected = "a plain LoRA of peft, alpha / rank * B A and no more"
            received = config.get("peft_type"), *more
            raise checks.error("lora", expected, received)
        pairs: dict[str, dict[str, Any]] = {}
        for key, array in load_file(os.path.join(filepath, _WEIGHTS)).items():
            match = _FACTOR.fullmatch(key)
            target: Any = None if match is None else self._target_of(match[1])
            if match is None or target is None:
                expected = f"{_OTHER_MODEL}. It holds {key!r}"
                raise checks.error("lora", expected, os.fspath(filepath))
            pair = pairs.setdefault(target.key, {"target": target})
            pair[match[2]] = array.astype("float32").T
        found = []
        for pair in pairs.values():
            target = pair["target"]
            left, right = (pair.get(which, _NONE) for which in "AB")
            shape = left.shape[0], right.shape[-1]
            if shape != self.matrix_shape(target):
                expected = f"{_OTHER_MODEL}. It has {shape} of {target.path!r}"
                raise checks.error("lora", expected, os.fspath(filepath))
            rank = right.shape[0]
            power = 0.5 if config.get("use_rslora") else 1
            scale = config["lora_alpha"] / rank**power
            found.append(Factors(target, left * np.float32(scale), right))
        return found

    def _target_of(self, module):
        """Return the target of a module of an adapter, or None."""
        # An adapter may be of the model without its head.
        found = [
            target
            for name, target in self.targets.items()
            if f".{name}".endswith(f".{module}.weight")
        ]
        return found[0] if len(found) == 1 else None


FORMATS: dict[str, Any] = {"keras_hub": HubFile, "peft": PeftFolder}


def position_of(target):
    """Return the place of a target in the weights of its model."""
    return int(target.key.partition(":")[0])


def format_of(filepath):
    """Return the name of the format that a file or folder has."""
    path = checks.check_path("lora", filepath)
    if os.path.isfile(os.path.join(path, _CONFIG)):
        return "peft"
    if os.path.isfile(path) and path.endswith(".lora.h5"):
        return "keras_hub"
    expected = (
        f"a folder of peft, with {_CONFIG}, or a file of KerasHub that ends in "
        ".lora.h5"
    )
    raise checks.error("lora", expected, path)


def check_path(filepath, format, overwrite):
    """Raise an error where an adapter of a format cannot be written."""
    path = os.path.abspath(checks.check_path("filepath", filepath))
    is_hub = format == "keras_hub"
    if is_hub and not path.endswith(".lora.h5"):
        raise checks.error("filepath", "one that ends in .lora.h5", path)
    if not os.path.isdir(os.path.dirname(path)):
        raise checks.error("filepath", "in a folder that exists", path)
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise FileExistsError(
            "Pass `overwrite=True` to replace what is there. Received: "
            f"filepath={path!r}, overwrite=False"
        )
    is_ours = os.path.isfile(path)
    if not is_hub:
        names = os.listdir(path) if os.path.isdir(path) else None
        is_ours = names is not None and (not names or _CONFIG in names)
    if not is_ours:
        expected = "nothing yet, or an adapter of this format"
        raise checks.error("filepath", expected, path)


def _tensors_in_transformers(backbone):
    """Return {(shape, SHA-256): name} of the matrices that KerasHub exports."""
    with tempfile.TemporaryDirectory() as folder:
        backbone.export_to_transformers(folder)
        path = os.path.join(folder, "model.safetensors")
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            found: dict[Any, Any] = {}
            for name, entry in header.items():
                if len(entry["shape"]) != 2:
                    continue
                first, last = entry["data_offsets"]
                file.seek(8 + length + first)
                digest = hashlib.sha256(file.read(last - first)).hexdigest()
                key = tuple(entry["shape"]), digest
                # Which of several equal ones is which, nothing tells.
                found[key] = None if key in found else name
    return found


def _digest(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
