"""A small file or folder of each format that is read, and what reads it."""

import io
import json
import pathlib
import shutil
import zipfile

import keras
import numpy as np

import keras_weightmods as kwm
from keras_weightmods.cli.info import file_report
from tests import models


def model_file(folder):
    """A model with a packed, a scaled and a plain layer."""
    model = models.sequential(
        (8,),
        keras.layers.Dense(16, activation="relu", name="packed"),
        keras.layers.BatchNormalization(),
        keras.layers.Dense(8, name="scaled"),
        keras.layers.Dropout(0.5),
        keras.layers.Dense(4, name="plain"),
    )
    models.make_sparse(model)
    kwm.attach_scaling(model, targets="scaled/")
    kwm.pack(model, targets="packed/")
    path = folder / "honest.safetensors"
    kwm.save_model(model, path)
    return path, info, kwm.load_model


def delta_file(folder):
    tuned = models.mlp()
    tuned.layers[0].kernel.assign_add(np.eye(8, 16))
    return saved_delta(tuned, folder)


def drawn_delta_file(folder):
    """A delta that holds a seed in place of places."""
    tuned = models.mlp(activation="tanh")
    tuned.compile(kwm.SparseAdamW(0.1), "mse", jit_compile=False)
    masks = kwm.PrincipalMaskCallback(0.25, criterion="random", seed=0)
    x, y = models.normal(8, 8), models.normal(8, 4)
    tuned.fit(x, y, callbacks=[masks], verbose=0)
    return saved_delta(tuned, folder)


def saved_delta(tuned, folder):
    base, path = models.mlp(), folder / "honest.safetensors"
    kwm.Patch.from_models(tuned, base).save(path, verbose=0)

    def read(path):
        patch = kwm.Patch.load(path)
        patch.apply(base)
        patch.remove(base, force=True)

    return path, info, read


def signature_file(folder):
    path = folder / "honest.safetensors"
    signature = models.make_signature(models.mlp())
    signature.quantize(4).save(path)
    return path, info, kwm.WeightSignature.load


def checkpoint_file(folder):
    model = models.mlp()
    model.compile("adam", "mse", jit_compile=False)
    x, y = models.normal(8, 8), models.normal(8, 4)
    place = folder / "checkpoints"
    model.fit(x, y, 4, callbacks=[kwm.Checkpoint(place)], verbose=0)
    (path,) = place.iterdir()

    def read(mutant):
        shutil.copyfile(mutant, path)
        kwm.Checkpoint(place).restore(model)

    return path, info, read


def peft_folder(folder):
    # Kernels are found by their values, which must differ.
    model = models.randomize(models.causal_lm("llama3"))
    base = models.weights_of(model)
    kernel = kwm.find_targets(model)[0].variable
    kernel.assign_add(0.1 * models.normal(*kernel.shape))
    patch = kwm.Patch.from_models(model, base)
    model.set_weights(base)
    patch.to_lora(model, path := folder / "honest", 2)
    return path, lambda path: kwm.Patch.from_lora(model, path)


def keras_file(folder):
    models.conv_net().save(path := folder / "honest.keras")
    return path, info


def lora_file(folder):
    backbone = models.causal_lm("llama3").backbone
    backbone.enable_lora(2)
    backbone.save_lora_weights(path := folder / "honest.lora.h5")
    return path, info


def preset_folder(folder):
    models.causal_lm("llama3").save_to_preset(path := folder / "honest")
    return path, info


def merge_config(folder):
    paths = [folder / f"{name}.safetensors" for name in "abc"]
    for seed, each in enumerate(paths):
        model = models.randomize(models.mlp(), seed)
        kwm.save_model(model, each)
    a, b, base = map(str, paths)
    path = folder / "honest.yaml"
    path.write_text(f"""\
merge_method: ties
base_model: {base}
models:
  - model: {a}
    parameters:
      weight: [0.5, 1.0]
      density: 0.5
  - model: {b}
    parameters:
      weight:
        - filter: bias
          value: 0.3
        - value: 0.5
      density: 0.5
parameters: {{normalize: true, lambda: 1.0}}
dtype: float32
""")
    return path, lambda path: kwm.merge(
        str(path), folder / "merged.safetensors", verbose=0
    )


FORMATS = {
    "model": model_file,
    "delta": delta_file,
    "drawn_delta": drawn_delta_file,
    "signature": signature_file,
    "checkpoint": checkpoint_file,
    "peft": peft_folder,
    "keras": keras_file,
    "lora_h5": lora_file,
    "preset": preset_folder,
    "merge_yaml": merge_config,
}


def info(path):
    """Do what the command `info` does; its errors must name the file."""
    try:
        report = file_report(str(path))
        report.table()
        json.dumps(report.to_dict())
    except (OSError, TypeError, ValueError) as error:
        if str(path) not in str(error):
            raise RuntimeError(f"names no file: {error}") from error
        raise


def make(format, folder):
    """Return a name, the bytes of a file of a format, and what reads it.

    A folder is here a ZIP archive.

    Returns:
        Triple of the name, bytes, and a list of functions of the path that
        `placed` returns.
    """
    path, *readers = FORMATS[format](pathlib.Path(folder))
    if path.is_file():
        return f"mutant{path.suffix}", path.read_bytes(), readers
    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        for each in sorted(path.rglob("*")):
            archive.write(each, each.relative_to(path))
    return "mutant.zip", file.getvalue(), readers


def placed(folder, name, data):
    """Write the bytes of a file, or the folder that they are of."""
    path = pathlib.Path(folder, name)
    if path.suffix != ".zip":
        path.write_bytes(data)
        return path
    shutil.rmtree(path, ignore_errors=True)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        archive.extractall(path)
    return path
