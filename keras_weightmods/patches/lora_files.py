"""LoRA adapters in files: KerasHub's own, and those of peft."""

import dataclasses
import hashlib
import json
import math
import os
import re
import tempfile
from typing import Any

import numpy as np

from keras_weightmods.core import keras_compat
from keras_weightmods.patches.checkpoint import Checkpoint
from keras_weightmods.saving.atomic_file import check_filepath, replacing
from keras_weightmods.saving.bounded_json import parse_json
from keras_weightmods.utils import checks

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Weights of adapters as others name them, before the ending.
_STEMS = ("adapter_model", "adapters")
_FACTOR = re.compile(
    r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight"
)
# Settings of peft with which a change is not alpha / rank * B A alone.
_MORE_THAN_FACTORS = (
    "alora_invocation_tokens",
    "alpha_pattern",
    "arrow_config",
    "bias",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "use_dora",
    "use_qalora",
)
# Values of `init_lora_weights` that leave the base as it is.
_HARMLESS = (None, True, False, "gaussian", "eva", "orthogonal")


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
            for layer in keras_compat.layers_of(self.backbone)
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
        found, problems = [], []
        for name, (left, right) in _hub_arrays(filepath).items():
            known = name.isdecimal() and int(name) < len(self.layers)
            layer = self.layers[int(name)] if known else None
            target = self.targets.get(id(layer))
            if target is None:
                problems.append(f"layer {name}, of no kernel of the model")
                continue
            if left is not None:
                rows = math.prod(left.shape[:-1])
                left = left.reshape(rows, *left.shape[-1:])
            problem = _misfit(left, right, self.matrix_shape(target))
            if problem is not None:
                problems.append(f"{target.path}: {problem}")
                continue
            found.append(Factors(target, left, right))
        _raise_all("an adapter of this model", filepath, problems)
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
        exists = os.path.isdir(path)
        parent = path if exists else os.path.dirname(path)
        with tempfile.TemporaryDirectory(dir=parent, prefix=".") as folder:
            made = os.path.join(folder, "adapter")
            os.mkdir(made)
            save_file(arrays, os.path.join(made, _WEIGHTS), {"format": "pt"})
            with open(os.path.join(made, _CONFIG), "w") as file:
                json.dump(config, file, indent=2)
            if not exists:
                os.replace(made, path)
                return
            # A run may have left its checkpoints beside them.
            for name in (_WEIGHTS, _CONFIG):
                os.replace(os.path.join(made, name), os.path.join(path, name))

    def read(self, filepath):
        """Return the list of `Factors` in a folder; ValueError for others."""
        config = _peft_config(filepath)
        pairs: dict[str, dict[str, Any]] = {}
        unknown = []
        for key, array in _peft_arrays(filepath).items():
            match = _FACTOR.fullmatch(key)
            target: Any = None if match is None else self._target_of(match[1])
            if match is None or target is None:
                unknown.append(key)
                continue
            pair = pairs.setdefault(target.key, {"target": target})
            pair[match[2]] = array.astype("float32").T
        problems = []
        if unknown:
            count = f"{len(unknown)} tensors, as {unknown[:3]}"
            problems.append(f"{count}, that are no factors of its kernels")
        found = []
        for pair in pairs.values():
            target = pair["target"]
            left: Any = pair.get("A")
            right: Any = pair.get("B")
            problem = _misfit(left, right, self.matrix_shape(target))
            if problem is not None:
                problems.append(f"{target.path}: {problem}")
                continue
            power = 0.5 if config.get("use_rslora") else 1
            scale = config["lora_alpha"] / right.shape[0] ** power
            found.append(Factors(target, left * np.float32(scale), right))
        _raise_all("an adapter of this model", filepath, problems)
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
    if not is_hub:
        _check_folder(path)


def _check_folder(path):
    """Raise ValueError if a folder would not hold one adapter of peft."""
    for name in (_WEIGHTS, _CONFIG):
        check_filepath(os.path.join(path, name))
    others = [
        name
        for name in sorted(os.listdir(path))
        if name.partition(".")[0] in _STEMS and name != _WEIGHTS
    ]
    if others:
        expected = (
            "a folder without other weights of an adapter, which would "
            f"contradict the new ones: move {others} away, or write to "
            "another folder"
        )
        raise checks.error("filepath", expected, path)


def _raise_all(expected, filepath, problems):
    checks.raise_all(
        f"`lora` must be {expected}. Received: lora={os.fspath(filepath)!r}, "
        "with",
        problems,
    )


def _misfit(left, right, shape):
    """Return why two arrays are not the factors of a matrix; None if so."""
    shapes = [None if each is None else each.shape for each in (left, right)]
    rank = left.shape[-1] if left is not None and left.ndim else 0
    if rank and shapes == [(shape[0], rank), (rank, shape[1])]:
        return None
    first, second = shapes
    return f"shapes {first} and {second} of factors, and {shape} of the kernel"


def _hub_arrays(filepath):
    """Return {name of a layer: its two arrays, None for one that lacks}."""
    import h5py

    def read(file, path):
        found = file.get(path)
        return None if found is None else np.array(found, "float32")

    try:
        with h5py.File(filepath, "r") as file:
            return {
                name: [
                    read(file, f"lora/{name}/vars/lora_kernel_{which}")
                    for which in "ab"
                ]
                for name in file.get("lora", ())
                if name != "vars"
            }
    # What is none fails in many ways.
    except (OSError, TypeError, ValueError) as error:
        expected = f"a file of KerasHub that h5py can read ({error})"
        raise checks.error("lora", expected, os.fspath(filepath)) from error


def _peft_config(filepath):
    """Return the config of a plain LoRA of peft; ValueError for others."""
    path = os.path.join(filepath, _CONFIG)
    try:
        with open(path, "rb") as file:
            config = parse_json(file.read())
    except ValueError as error:
        expected = f"a folder of peft, with JSON in {_CONFIG} ({error})"
        raise checks.error("lora", expected, os.fspath(filepath)) from error
    plain = "a plain LoRA of peft, alpha / rank * B A over its base and no more"
    if not isinstance(config, dict):
        _raise_all(plain, filepath, [f"{_CONFIG} holds {config!r}"])
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type={config.get('peft_type')!r}, not 'LORA'")
    problems += [
        f"{name}={config[name]!r}"
        for name in _MORE_THAN_FACTORS
        if config.get(name) not in (None, False, "none", {}, [])
    ]
    init = config.get("init_lora_weights")
    if (init.lower() if isinstance(init, str) else init) not in _HARMLESS:
        problems.append(
            f"init_lora_weights={init!r}, which may change the base too: let "
            "peft convert it, where it can, by `save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...)`"
        )
    if not checks.is_finite(config.get("lora_alpha")):
        alpha = config.get("lora_alpha")
        problems.append(f"lora_alpha={alpha!r}, not a finite number")
    _raise_all(plain, filepath, problems)
    return config


def _peft_arrays(filepath):
    """Return {key: array} of a folder of peft."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(os.path.join(filepath, _WEIGHTS))
    except SafetensorError as error:
        expected = f"a folder of peft, with tensors in {_WEIGHTS} ({error})"
        raise checks.error("lora", expected, os.fspath(filepath)) from error


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
