"""What LIFT costs once on a model of 270M: its first masks, and its files.

    python -m benchmarks.lift_large
    python -m benchmarks.lift_large --backends jax --json FILE

A Gemma 3 of the shapes of its 270M, with weights at random: 126 kernels of few
shapes. *First masks* are `PrincipalMaskCallback.attach` as it comes, in a
process that has compiled nothing; a refresh is the same once more, compiled.
Beside these masks by the weights, masks at random, drawn once, whose places a
delta does not hold. Then normal changes are put on all entries in the masks,
and saved as a delta. Its size is compared with a bfloat16 LoRA of as many
numbers. Timed are writing, reading and decoding, and applying it. The last is
mostly the hash of the base model. Changes by a training are in
`benchmarks.lift_quality`.

Times are only good on a machine that does nothing else.
"""

import os
import pathlib
import statistics
import tempfile

from benchmarks import harness
from benchmarks.lift_step import refresh

DENSITY = 0.05
CRITERIA = "principal", "random"
MASKS_BAR, SIZE_BAR, READ_BAR = 30.0, 1.0, 200.0
SHAPES = {
    "vocabulary_size": 262_144,
    "image_size": 16,
    "num_layers": 18,
    "num_query_heads": 4,
    "num_key_value_heads": 1,
    "hidden_dim": 640,
    "intermediate_dim": 2048,
    "head_dim": 256,
}


def main():
    parser = harness.parser_of_workers(__doc__, "lift_large.json")
    parser.add_argument("--repeats", type=int, default=5, help="of reading")
    args = parser.parse_args()
    about = {"model": SHAPES, "density": DENSITY}
    harness.compare_backends(args, measure, about, print_report)


def measure(args):
    import keras

    import keras_weightmods as kwm

    keras.utils.set_random_seed(0)
    model = make_model()
    base = model.get_weights()
    result = {"parameters": model.count_params(), "masks": {}}
    for criterion in CRITERIA:
        model.set_weights(base)
        model.compile(optimizer=kwm.SparseAdamW(1e-4))
        # In the middle of a training, or not again.
        every = None if criterion == "random" else 100
        callback = kwm.PrincipalMaskCallback(
            density=DENSITY, refresh_every=every, criterion=criterion, seed=0
        )
        first = harness.seconds_of(callback.attach, model)
        found = result["masks"][criterion] = {
            "first_masks": first,
            "refresh": every and harness.seconds_of(refresh, callback, model),
        }
        change(model)
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "delta.safetensors")
            found |= measure_file(model, base, path, args.repeats)
        kwm.Patch.clear(model)
        callback.detach()
    result["kernels"] = len(model.optimizer.masked_variables)
    return {"versions": harness.versions("keras-hub"), **result}


def make_model():
    import warnings

    # keras_hub imports TensorFlow on every backend, with its own warnings.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from keras_hub.models import Gemma3Backbone, Gemma3CausalLM

        backbone = Gemma3Backbone(**SHAPES)
        return Gemma3CausalLM(backbone=backbone, preprocessor=None)


def change(model):
    """Add normal changes to the entries in the masks."""
    import keras
    import numpy as np

    rng = np.random.default_rng(0)
    optimizer = model.optimizer
    for variable in optimizer.masked_variables:
        value = np.array(keras.ops.convert_to_numpy(variable))
        places = keras.ops.convert_to_numpy(optimizer.indices_of(variable))
        value.reshape(-1)[places] += rng.normal(0, 1e-3, places.size)
        variable.assign(value)


def measure_file(model, base, path, repeats):
    import keras_weightmods as kwm

    reports = []

    def save():
        patch = kwm.Patch.from_models(model, base, verbose=0)
        reports.append(patch.save(path, verbose=0))

    write = harness.seconds_of(save)
    size = os.path.getsize(path)
    read = statistics.median(
        harness.seconds_of(kwm.Patch.load, path) for _ in range(repeats)
    )
    model.set_weights(base)
    return {
        "stored": reports[0].entries,
        "file_bytes": size,
        "index_bits": reports[0].index_bits,
        "x_lora": size / (2 * reports[0].entries),
        "write": write,
        "read": read,
        "read_mb_s": size / 1e6 / read,
        "apply": harness.seconds_of(kwm.Patch.load(path).apply, model),
    }


def print_report(report):
    shown = harness.table(
        f"{report['density']:.0%} of the kernels of a Gemma 3 of 270M",
        text=["backend", "masks"],
        numbers=(
            *("kernels", "first masks", "refresh", "file, MB", "x LoRA"),
            *("written in", "read at", "read in", "applied in"),
        ),
    )
    for backend, found in report["backends"].items():
        for criterion, row in found["masks"].items():
            first = harness.verdict(row["first_masks"], MASKS_BAR, form=".1f")
            read = harness.verdict(row["read_mb_s"], READ_BAR, ">=", ".0f")
            shown.add_row(
                *(backend, criterion, str(found["kernels"]), f"{first} s"),
                f"{row['refresh']:.1f} s" if row["refresh"] else "",
                f"{row['file_bytes'] / 1e6:.1f}",
                harness.verdict(row["x_lora"], SIZE_BAR, form=".3f"),
                f"{row['write']:.2f} s",
                f"{read} MB/s",
                f"{row['read']:.3f} s",
                f"{row['apply']:.2f} s",
            )
    harness.print_all(shown, harness.describe(report))


if __name__ == "__main__":
    main()
