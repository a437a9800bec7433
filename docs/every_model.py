"""Write the tables of docs/every_model.md, by doing it to tiny models.

KERAS_BACKEND=torch python docs/every_model.py
"""

import gc
import importlib.metadata
import inspect
import pathlib
import re
import tempfile
import warnings

import keras
import keras_hub
import numpy as np

import keras_weightmods as kwm

PAGE = pathlib.Path(__file__).with_name("every_model.md")
MARKS = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
# Arguments of KerasHub's backbones, by name; others keep their defaults.
SIZES = {
    "vocabulary_size": 96,
    "num_layers": 2,
    "num_heads": 4,
    "num_query_heads": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_dim": 32,
    "intermediate_dim": 64,
    "head_dim": 8,
    "max_sequence_length": 32,
    "max_position_embeddings": 32,
    "num_experts": 4,
    "num_experts_per_token": 2,
    "top_k": 2,
    "moe_intermediate_dim": 32,
    "expert_intermediate_dim": 32,
    "shared_expert_intermediate_dim": 32,
    "shared_expert_intermediate_size": 32,
    "image_size": 16,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "rope_layer_enabled_list": [True, True],
    "layer_types": ["full_attention"] * 2,
    "mlp_bias": False,
    "layer_norm_epsilon": 1e-5,
    "rope_theta": 1e4,
    "partial_rotary_factor": 1.0,
}
NETS = (
    *("ConvNeXtTiny", "DenseNet121", "EfficientNetB0", "EfficientNetV2B0"),
    *("InceptionV3", "MobileNet", "MobileNetV2", "MobileNetV3Small"),
    *("ResNet50", "ResNet50V2", "VGG16", "Xception"),
)


def main():
    found = {
        "language": language_models(),
        "nets": nets(),
        "versions": [versions()],
    }
    text = MARKS.sub(
        lambda match: match[1] + "\n".join(found[match[2]]) + f"\n{match[3]}",
        PAGE.read_text(),
    )
    PAGE.write_text(text)


def versions():
    names = ("keras", "keras-hub", keras.backend.backend())
    listed = [f"{name} {importlib.metadata.version(name)}" for name in names]
    return f"Made with {', '.join(listed)}."


def language_models():
    names = sorted(n for n in dir(keras_hub.models) if n.endswith("CausalLM"))
    rows, left = [], []
    for name in names:
        if name == "CausalLM":
            continue
        try:
            model = made(name)
        # What the constructors of others raise is not known.
        except Exception:
            left.append(f"`{name}`")
            continue
        rows.append(f"| `{name}` | " + " | ".join(cells(model)) + " |")
        print(rows[-1], flush=True)
        gc.collect()
    head = "kernels", "2:4", "packed", "`head=`", "saved", "`generate`"
    lines = [f"| model | {' | '.join(head)} |", "|---" * 7 + "|", *rows]
    others = "Not tried, as they take other arguments than these: "
    return [*lines, "", others + ", ".join(left) + "."]


def made(name):
    cls = getattr(keras_hub.models, name)
    backbone = cls.backbone_cls
    arguments = inspect.signature(backbone.__init__).parameters
    keras.utils.set_random_seed(0)
    own = {key: SIZES[key] for key in arguments if key in SIZES}
    return cls(backbone=backbone(**own), preprocessor=None)


def cells(model):
    """Return what can be done to a model: one text for each column."""
    x = {
        "token_ids": np.array([[3, 1, 4, 1, 5, 9, 2, 6]]),
        "padding_mask": np.ones((1, 8), "int32"),
        "position_ids": np.arange(8)[None],
    }
    steps = (count, sparsify, pack, head, save, generate)
    texts = []
    for step in steps:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                texts.append(step(model, x))
        except Exception as error:
            texts.append(f"no: {first_line(error)}")
    return texts


def count(model, x):
    targets = kwm.find_targets(model)
    left = len(targets.skipped)
    return f"{len(targets)}" + (f", {left} left" if left else "")


def sparsify(model, x):
    kwm.sparsify(model, "2:4", verbose=0)
    report = kwm.sparsity_report(model)
    return f"{report.totals['exact']}"


def pack(model, x):
    before = output(model, x)
    report = kwm.pack(model)
    same(before, output(model, x))
    return f"{len(report.weights)}"


def head(model, x):
    kwm.unpack(model)
    try:
        kwm.pack(model, head="int8")
    except ValueError:
        kwm.pack(model)
        return "not tied"
    return "yes"


def save(model, x):
    before = output(model, x)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "model.safetensors")
        kwm.save_model(model, path)
        same(before, output(kwm.load_model(path), x))
    return "yes"


def generate(model, x):
    model.compile(sampler="greedy")
    prompt = {
        "token_ids": np.array([[3, 1, 4, 1] + [0] * 8]),
        "padding_mask": np.array([[1] * 4 + [0] * 8]),
    }
    try:
        before = model.generate(prompt, stop_token_ids=None)["token_ids"]
    except Exception as error:
        return f"KerasHub's own fails: {first_line(error)}"
    kwm.compile_generate(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        after = model.generate(prompt, stop_token_ids=None)["token_ids"]
    kwm.uncompile_generate(model)
    texts = [str(each.message) for each in caught]
    if any("generate" in text for text in texts):
        return "as before"
    return "compiled" if np.array_equal(before, after) else "other tokens"


def nets():
    lines = [
        "| net | kernels | weights | in kernels that divide by 4 |",
        "|---|---|---|---|",
    ]
    for name in NETS:
        model = getattr(keras.applications, name)(
            weights=None, input_shape=(96, 96, 3)
        )
        targets = kwm.find_targets(model)
        fits = [t for t in targets if t.reason_not_nm(4) is None]
        sizes = [int(np.prod(target.shape)) for target in fits]
        share = sum(sizes) / model.count_params()
        weights = f"{model.count_params() / 1e6:.1f} M"
        kernels = f"{len(targets)}, {len(fits)} of them"
        lines.append(f"| `{name}` | {kernels} | {weights} | {share:.1%} |")
        print(lines[-1], flush=True)
        del model, targets, fits
        gc.collect()
    return lines


def output(model, x):
    inputs = {key: x[key] for key in model.input}
    return keras.ops.convert_to_numpy(model(inputs))


def same(before, after):
    if not np.allclose(before, after, atol=1e-4):
        raise ValueError(f"differs by {np.abs(before - after).max():.1g}")


def first_line(error):
    text = str(error).strip().splitlines() or [type(error).__name__]
    return text[0].replace("|", r"\|")[:80]


if __name__ == "__main__":
    main()
