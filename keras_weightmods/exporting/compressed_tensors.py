"""Packed weights in the format of compressed-tensors, which vLLM reads."""

import contextlib
import json
import math
import os
import pathlib
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import safetensors
import safetensors.numpy

from keras_weightmods.exporting.dense_copy import dense_copy, packed_weights
from keras_weightmods.native.layout import GROUP
from keras_weightmods.utils.progress import Progress

_FILE = "model.safetensors"


def writer(model: Any) -> Callable[[str, Progress], None]:
    """Return a function that writes a packed model to a folder.

    KerasHub knows how a family's weights lie in transformers. So it writes them
    three times: as floats, with the integers in their place, and with the
    scales. Weights that are not in integers are NaN in the latter two.
    """

    def write(path: str, progress: Progress) -> None:
        copy, targets = dense_copy(model, progress)
        progress.total += 3
        copy.export_to_transformers(path)
        progress.add()
        pairs = [
            (item, target)
            for item, target in zip(packed_weights(model), targets, strict=True)
            # vLLM looks tokens up in floats, and has the head in floats.
            if not isinstance(target.layer, keras.layers.Embedding)
        ]
        with tempfile.TemporaryDirectory(dir=os.path.dirname(path)) as folder:
            for place, name in enumerate(("integers", "scales")):
                for variable in copy.weights:
                    if "float" in variable.dtype:
                        variable.assign(np.full(variable.shape, np.nan))
                for item, target in pairs:
                    found = item.to_integers()
                    if found is not None:
                        target.variable.assign(found[place])
                copy.export_to_transformers(os.path.join(folder, name))
                progress.add()
            del copy
            made, schemes, ignored = _compressed(path, folder)
        if not schemes:
            raise ValueError(
                "`keep_packed=True` needs kernels in integers that are "
                "`Linear` in transformers. Their inputs must be a multiple of "
                "32, and the model's type must hold their scales. "
                f"Received: {model.name!r} with {len(targets)} packed weights, "
                "none of which is one"
            )
        safetensors.numpy.save_file(
            made, os.path.join(path, _FILE), metadata={"format": "pt"}
        )
        file = pathlib.Path(path, "config.json")
        config = json.loads(file.read_text())
        config["quantization_config"] = _config(schemes, ignored)
        file.write_text(json.dumps(config, indent=2))
        left = len(targets) - sum(map(len, schemes.values()))
        if left > 0:
            warnings.warn(
                f"{left} packed weights are floats of the same values in the "
                "file. These are tables, heads, kernels without integers, "
                "with inputs that are not a multiple of 32, or with scales "
                "that the model's type does not hold.",
                # The line that calls `export`.
                stacklevel=3,
            )

    return write


def _compressed(path: str, folder: str) -> Any:
    """Return the tensors, the names of modules by scheme, and those in floats.

    Args:
        path: String, of the folder with floats.
        folder: String, that with the folders of integers and scales.
    """
    made: dict[str, Any] = {}
    schemes: dict[tuple[int, int | None], list[str]] = {}
    ignored = ["lm_head"]
    folders = path, *(os.path.join(folder, n) for n in ("integers", "scales"))
    paths = [os.path.join(each, _FILE) for each in folders]
    with contextlib.ExitStack() as stack:
        files = [
            stack.enter_context(safetensors.safe_open(each, "numpy"))
            for each in paths
        ]
        names = files[0].keys()
        for name in names:
            dense, integers, scales = (file.get_tensor(name) for file in files)
            found = _scheme(
                *(x.astype("float32") for x in (dense, integers, scales))
            )
            module = name.removesuffix(".weight")
            if found is None:
                made[name] = dense
                if dense.ndim == 2 and module not in ignored:
                    ignored.append(module)
                continue
            bits, group = found
            schemes.setdefault(found, []).append(module)
            codes = integers.astype("int64") + 2 ** (bits - 1)
            words = codes.astype("uint32").reshape(len(codes), -1, 32 // bits)
            words <<= np.arange(0, 32, bits, dtype="uint32")
            words = np.bitwise_or.reduce(words, axis=-1)
            made[f"{module}.weight_packed"] = words.view("int32")
            scales = scales[:, :: group or dense.shape[1]]
            made[f"{module}.weight_scale"] = np.ascontiguousarray(scales)
            made[f"{module}.weight_shape"] = np.array(dense.shape, "int64")
    return made, schemes, ignored


def _scheme(dense: Any, integers: Any, scales: Any) -> Any:
    """Return the bits of a matrix (N, K), and the inputs that share a scale.

    The latter are None if all share it. None if it has no integers, or they do
    not lie in the file as rows with such scales.
    """
    if dense.ndim != 2 or np.isnan(integers).any():
        return None
    group = math.gcd(GROUP, dense.shape[1])
    if group < 32:
        return None
    parts = scales.reshape(len(scales), -1, group)
    is_shared = (parts == parts[..., :1]).all()
    # In 16 bits each of them has been rounded.
    if not (is_shared and np.allclose(integers * scales, dense, 2**-7, 0)):
        return None
    bits = 4 if np.abs(integers + 0.5).max() < 8 else 8
    is_one = bits == 8 and (scales == scales[:, :1]).all()
    return bits, None if is_one else group


def _config(schemes: Any, ignored: list[str]) -> dict[str, Any]:
    """Return the `quantization_config` of a model in transformers."""
    groups = {}
    for place, ((bits, group), modules) in enumerate(schemes.items()):
        weights = {"num_bits": bits, "type": "int", "symmetric": True}
        weights |= {"strategy": "group" if group else "channel"}
        weights |= {"group_size": group, "dynamic": False}
        targets = ["Linear"] if len(schemes) == 1 else modules
        groups[f"group_{place}"] = {"targets": targets, "weights": weights}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignored,
    }
