"""Patches as LoRA adapters of peft, and the way back."""

import hashlib
import json
import os
import re
import tempfile
import warnings
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from keras import ops

from keras_weightmods.core.reparameterization import reparameterizations
from keras_weightmods.core.targets import find_targets
from keras_weightmods.ops.low_rank import choose_method, low_rank_factors
from keras_weightmods.patches.checkpoint import Checkpoint, bytes_of
from keras_weightmods.patches.entry import (
    FLOATS,
    PatchEntry,
    Replacing,
    Sparse,
)
from keras_weightmods.patches.files import DIFFERENCES
from keras_weightmods.patches.ledger import check_unpatched
from keras_weightmods.patches.report import LoraKernel, LoraReport
from keras_weightmods.patches.tensors import is_finite, rebuilt_pieces
from keras_weightmods.saving.atomic_file import replace_all, unfinished
from keras_weightmods.saving.bounded_json import parse_json
from keras_weightmods.utils import checks
from keras_weightmods.utils.checks import shown
from keras_weightmods.utils.dtypes import numpy_dtype
from keras_weightmods.utils.matrix import from_matrix, stack_shape, to_matrix
from keras_weightmods.utils.progress import Progress
from keras_weightmods.utils.report import Skipped, skipped_text

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Zeros fill kernels up to this rank.
_MOST_RANK = 2**14
_FACTOR = re.compile(
    r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight"
)
# The config values of peft with which a change is just alpha / rank * B A.
_PLAIN: dict[str, Any] = {
    "peft_type": ("LORA",),
    # Initializations that do not change the base.
    "use_rslora": (None, True, False),
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
    **dict.fromkeys(
        (
            *("alora_invocation_tokens", "alpha_pattern", "arrow_config"),
            *("bias", "layer_replication", "lora_bias", "modules_to_save"),
            *("trainable_token_indices", "use_dora", "use_qalora"),
        ),
        (None, False, "none", {}, []),
    ),
}
_EXPECTED = "a plain LoRA of peft, alpha / rank * B A over its base and no more"


def check_arguments(filepath: Any, rank: int, overwrite: bool) -> str:
    """Return the path of the folder; raise an error where it cannot be."""
    checks.check_int("rank", rank, 1, _MOST_RANK)
    checks.check_bool("overwrite", overwrite)
    path = os.path.realpath(checks.check_path("filepath", filepath))
    if os.path.isfile(path) or not os.path.isdir(os.path.dirname(path)):
        raise checks.error("filepath", "a folder, in one that exists", path)
    files = [os.path.join(path, name) for name in (_CONFIG, _WEIGHTS)]
    if any(map(os.path.exists, files)) and not overwrite:
        raise FileExistsError(
            "Pass `overwrite=True` to replace what is there. Received: "
            f"filepath={path!r}, overwrite=False"
        )
    return path


def write(
    patch: Any, values: Checkpoint, path: str, rank: int, progress: Progress
) -> LoraReport:
    """Write a patch as an adapter; see `Patch.to_lora`."""
    kernels = _kernels(values)
    arrays: dict[str, np.ndarray] = {}
    rows: list[LoraKernel] = []
    modules, skipped = [], []
    whole = lost = 0.0
    progress.total = 1 + len(patch)
    for entry in patch:
        progress.add()
        start = values.read(entry.position).astype("float32")
        if not isinstance(entry.tensor, Replacing):
            # Starting at zero is exact; a sum and a difference would round.
            start = np.zeros_like(start)
        change = np.empty_like(start)
        term = 1.0, entry.tensor, entry.replaced
        for _ in rebuilt_pieces(start, [term], change):
            pass
        change -= start
        size = float(np.sum(np.square(change, dtype="float64")))
        whole += size
        found = kernels.get(entry.position)
        if found is None or not size:
            reason = (
                "no kernel that is one tensor of transformers, and the only "
                "one with its values"
            )
            skipped.append(Skipped(entry.key, reason if size else "unchanged"))
            lost += size
            continue
        target, name, _ = found
        matrix = to_matrix(change, target.contraction_axes)
        left, right, rest = _factors(matrix, rank)
        for which, factor in (("A", left), ("B", right)):
            key = f"base_model.model.{name}.lora_{which}.weight"
            arrays[key] = np.ascontiguousarray(factor.T, "float32")
        modules.append(name)
        rows.append(LoraKernel(target.key, target.shape, (rest / size) ** 0.5))
        lost += rest
    if not rows:
        raise ValueError(
            "The patch must have changes that an adapter can hold. Left out: "
            f"{skipped_text(skipped)}. Received: {patch!r}"
        )
    is_causal = "CausalLM" in type(values.model).__name__
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if is_causal else None,
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        # A Linear has (out, in), GPT-2 has (in, out).
        "fan_in_fan_out": any(is_plain for *_, is_plain in kernels.values()),
        "inference_mode": True,
        "target_modules": modules,
    }
    os.makedirs(path, exist_ok=True)
    with unfinished(path) as folder:
        # The config last: without it there is no adapter.
        for name, content in (
            (_WEIGHTS, safetensors.numpy.save(arrays, {"format": "pt"})),
            (_CONFIG, json.dumps(config, indent=2).encode()),
        ):
            with open(os.path.join(folder, name), "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        replace_all(folder, [_WEIGHTS, _CONFIG])
    error = (lost / whole) ** 0.5
    if skipped:
        warnings.warn(
            f"The adapter lacks the changes of {len(skipped)} of the patch's "
            f"{len(patch)} weights, and {error:.1%} of the change in all. The "
            "report lists them.",
            stacklevel=3,
        )
    return LoraReport(path, rank, tuple(rows), error, tuple(skipped))


def changes(
    model: Any, lora: Any, dtype: str | None, verbose: int
) -> dict[str, Any]:
    """Return the fields of the patch of an adapter; see `Patch.from_lora`."""
    checks.check_choice("dtype", dtype, (*DIFFERENCES, None))
    checks.check_verbose(verbose)
    path = checks.check_path("lora", lora)
    with Progress(1, "weight", verbose) as progress:
        values = Checkpoint("model", model)
        config, arrays = _read(path)
        alpha, power = _scale_of(config, path)
        pairs = _pairs(arrays, _kernels(values), path)
        _check_ranks(config, {x.shape[1] for _, x, _ in pairs.values()}, path)
        # Each weight is read for the hash, and these again.
        progress.total = len(values.infos) + len(pairs)
        entries, problems = [], []
        for position, (target, left, right) in sorted(pairs.items()):
            progress.add()
            axes = target.contraction_axes
            with np.errstate(over="ignore", invalid="ignore"):
                scale = np.float32(alpha / left.shape[1] ** power)
                matrix = left * scale @ right
            change = from_matrix(matrix, target.shape, axes)
            change = ops.convert_to_numpy(change).reshape(-1)
            places = np.flatnonzero(change)
            numbers: Any = change[places]
            if dtype is not None:
                tensor = Sparse(places, numbers.astype(numpy_dtype(dtype)))
            else:
                base = values.read(position).reshape(-1)[places]
                numbers = base.astype("float32") + numbers
                tensor = Replacing(places, numbers.astype(base.dtype))
            if not is_finite(tensor.values):
                problems.append(f"{target.path}: a change that is not finite")
            if places.size:
                entries.append(PatchEntry(values.infos[position], tensor))
        _refuse("an adapter of finite changes", path, problems)
        if not entries:
            raise checks.error("lora", "an adapter that changes a kernel", path)
        return {
            "entries": tuple(entries),
            "architecture": values.infos,
            "method": "lora",
            "base": values.fingerprint(see=progress.add),
        }


def check_plain(model: Any) -> None:
    """Raise ValueError unless LoRA can be added to the weights of a model."""
    checks.check_model(model)
    check_unpatched("model", model)
    if reparameterizations(model):
        raise ValueError(
            "The weights of `model` must be plain. Call `kwm.fold(model)` or "
            f"`kwm.unpack(model)` first. Received: model={model.name!r}"
        )


def _kernels(values: Checkpoint) -> dict[int, Any]:
    """Return the kernels that an adapter can hold, by position.

    A kernel is found among the tensors of transformers by its values, as
    KerasHub exports them: the one that holds its matrix and nothing else,
    transposed or not.

    Returns:
        Dict from positions to triples of the `Target`, the module there, and
        whether that holds the matrix as (in, out).
    """
    model: Any = values.model
    backbone = getattr(model, "backbone", model)
    if not hasattr(backbone, "export_to_transformers"):
        raise checks.error("model", "a KerasHub model or backbone", model)
    names: dict[Any, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        backbone.export_to_transformers(folder)
        path = os.path.join(folder, "model.safetensors")
        with safetensors.safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118
                array = file.get_tensor(name)
                if array.ndim == 2:
                    # Equal tensors cannot be told apart.
                    key = _key(array)
                    names[key] = None if key in names else name
    found = {}
    for target in find_targets(model):
        if target.stack_axes:
            continue
        position = int(target.key.partition(":")[0])
        order = (*target.contraction_axes, *target.output_axes)
        _, *shape = stack_shape(target.shape, target.contraction_axes)
        matrix = values.read(position).transpose(order).reshape(shape)
        for is_plain, array in ((False, matrix.T), (True, matrix)):
            name = names.pop(_key(array), None)
            if name is not None:
                module = name.removesuffix(".weight")
                found[position] = target, module, is_plain
                break
    return found


def _key(array: np.ndarray) -> tuple[Any, bytes]:
    return array.shape, hashlib.sha256(bytes_of(array)).digest()


def _read(path: str) -> tuple[Any, dict[str, np.ndarray]]:
    """Return the config and the tensors in a folder of peft."""
    try:
        with open(os.path.join(path, _CONFIG), "rb") as file:
            config = parse_json(file.read())
        arrays = safetensors.numpy.load_file(os.path.join(path, _WEIGHTS))
    # safetensors has no error of its own for dtypes that NumPy lacks.
    except (
        *(AttributeError, KeyError, OSError, TypeError, ValueError),
        safetensors.SafetensorError,
    ) as error:
        expected = (
            f"a folder of peft, with JSON in {_CONFIG} and tensors in "
            f"{_WEIGHTS} ({error})"
        )
        raise checks.error("lora", expected, path) from error
    return config, arrays


def _scale_of(config: Any, path: str) -> tuple[float, float]:
    """Return a and p of the scale a / rank**p of an adapter, checked."""
    if not isinstance(config, dict):
        _refuse(_EXPECTED, path, [f"{_CONFIG} holds {shown(config)}"])
    problems = [
        f"{name}={shown(config.get(name))}"
        for name, allowed in _PLAIN.items()
        if config.get(name) not in allowed
    ]
    pattern = config.get("rank_pattern")
    if not isinstance(pattern, dict | None):
        problems.append(f"rank_pattern={shown(pattern)}, not an object")
    alpha = config.get("lora_alpha")
    if not checks.is_finite(alpha):
        problems.append(f"lora_alpha={shown(alpha)}, not a finite number")
    _refuse(_EXPECTED, path, problems)
    return alpha, 0.5 if config.get("use_rslora") else 1.0


def _check_ranks(config: Any, ranks: set[int], path: str) -> None:
    """Raise ValueError for factors whose ranks differ from the config's."""
    pattern = config.get("rank_pattern") or {}
    named = [config.get("r"), *pattern.values()]
    if other := sorted(rank for rank in ranks if rank not in named):
        expected = (
            f"an adapter whose {_CONFIG} and {_WEIGHTS} are of one training, "
            "with factors of the rank `r`. Write it again"
        )
        problems = [f"r={shown(config.get('r'))}, and factors of rank {other}"]
        _refuse(expected, path, problems)


def _pairs(
    arrays: dict[str, np.ndarray], kernels: dict[int, Any], path: str
) -> dict[int, tuple[Any, np.ndarray, np.ndarray]]:
    """Return {position: (target, left and right factor)} of an adapter."""
    pairs: dict[int, Any] = {}
    unknown, problems = [], []
    for key, array in arrays.items():
        match = _FACTOR.fullmatch(key)
        # An adapter may be for the model without its head.
        fitting = [
            position
            for position, (_, module, _) in kernels.items()
            if match and f".{module}".endswith(f".{match[1]}")
        ]
        if match is None or len(fitting) != 1:
            unknown.append(key)
        elif array.dtype.name not in FLOATS or not is_finite(array):
            problems.append(f"{key}: {array.dtype}, and not finite floats")
        else:
            pair = pairs.setdefault(fitting[0], {})
            pair[match[2]] = array.astype("float32").T
    if unknown:
        count = f"{len(unknown)} tensors, as {unknown[:3]}"
        problems.append(f"{count}, that are no factors of its kernels")
    found = {}
    for position, pair in pairs.items():
        target, left, right = kernels[position][0], pair.get("A"), pair.get("B")
        shapes = [None if x is None else x.shape for x in (left, right)]
        _, *shape = stack_shape(target.shape, target.contraction_axes)
        rank = left.shape[-1] if left is not None and left.ndim else 0
        if not rank or shapes != [(shape[0], rank), (rank, shape[1])]:
            problems.append(
                f"{target.path}: shapes {shapes[0]} and {shapes[1]} of "
                f"factors, and {tuple(shape)} of the kernel"
            )
        found[position] = target, left, right
    _refuse("an adapter of this model", path, problems)
    return found


def _refuse(expected: str, path: str, problems: list[str]) -> None:
    checks.raise_all(
        f"`lora` must be {expected}. Received: lora={path!r}, with", problems
    )


def _factors(matrix: Any, rank: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Return the factors nearest to a matrix, and the square of the rest."""
    rows, columns = matrix.shape
    inner = min(rank, rows, columns)
    method = choose_method("auto", rows, columns, inner)
    left, right = map(
        ops.convert_to_numpy, low_rank_factors(matrix, inner, method)
    )
    # One factor has orthonormal vectors, the other the singular values. Move
    # the roots of these, zeros too, into both.
    least = np.finfo("float32").tiny
    ratio = np.linalg.norm(right, axis=1) + least
    ratio = np.sqrt(ratio / (np.linalg.norm(left, axis=0) + least))
    left, right = left * ratio, right * (1 / ratio)[:, None]
    rest = ops.convert_to_numpy(matrix) - left @ right
    left = np.pad(left, ((0, 0), (0, rank - inner)))
    right = np.pad(right, ((0, rank - inner), (0, 0)))
    return left, right, float(np.sum(np.square(rest, dtype="float64")))
