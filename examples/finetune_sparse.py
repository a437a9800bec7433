"""Fine-tunes a 2:4 language model on other text, in ways that keep it 2:4.

    python -m examples.finetune_sparse
    python -m examples.finetune_sparse --model sparse_llm.keras --steps 200

Each way begins with the same 2:4 model and sees the same rows of text. The
first trains all kept weights under a fixed mask. LoRA is merged under the mask
of the base, or by magnitude. LIFT trains only the principal weights, and keeps
zeros. The example prints the perplexity on held-out text of that kind, and on
the prose that the model was made 2:4 on. It checks that each model is exactly
2:4 at the end.
"""

import json
import pathlib
import time

from examples import command_line
from examples.data.prose import load_rows, model_inputs


def main():
    args = parse_arguments()
    command_line.choose_backend(args.backend)
    run(args)


def parse_arguments():
    parser = command_line.make_parser(__doc__)
    parser.add_argument(
        "--model",
        help="a .keras file of a 2:4 KerasHub model, such as sparsify_llm.py "
        "--pattern 2:4 writes; by default SmolLM2-135M made 2:4 in one shot",
    )
    command_line.add_backend(parser)
    parser.add_argument("--steps", type=int, default=40, help="default: 40")
    parser.add_argument("--length", type=int, default=256, help="of a row")
    parser.add_argument("--rank", type=int, default=8, help="of LoRA")
    parser.add_argument(
        "--rows", type=int, default=16, help="to evaluate on, default: 16"
    )
    parser.add_argument("--json", help="write the results to this file")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    counts = ("steps", "length", "rank", "rows")
    command_line.check(parser, args, counts, files=["json"])
    return args


def run(args):
    import keras
    from rich.console import Console
    from rich.table import Table

    import keras_weightmods as kwm

    console = Console()
    model = load_model(args)
    tokenizer = model.preprocessor.tokenizer
    width = args.length + 1
    code, prose = load_rows(
        tokenizer,
        width,
        reference=args.steps + args.rows,
        held_out=args.rows,
    )
    train, held_out = code[: args.steps], code[args.steps :]
    if not args.model:
        (calibration,) = load_rows(tokenizer, args.length, train=64)
        kwm.sparsify(
            model, "2:4", model_inputs(calibration), criterion="sparsegpt"
        )
    kwm.assert_sparse(model, "2:4")
    start = model.get_weights()
    rows = []
    for name, method in METHODS.items():
        keras.utils.set_random_seed(args.seed)
        console.rule(name)
        model.set_weights(start)
        began = time.monotonic()
        method(model, train, args)
        seconds = time.monotonic() - began
        kwm.assert_sparse(model, "2:4")
        measure = kwm.Perplexity(model)
        rows.append(
            {
                "method": name,
                "held_out": measure(held_out, "held-out"),
                "unrelated": measure(prose, "prose"),
                "seconds": round(seconds, 1),
            }
        )
    table = Table(title=f"{model.name}, exactly 2:4, {args.steps} steps")
    table.add_column("method")
    for name in ("held-out", "prose", "time"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row["method"],
            f"{row['held_out']:.2f}",
            f"{row['unrelated']:.2f}",
            f"{row['seconds']:.0f} s",
        )
    console.print(table)
    if args.json:
        report = {
            "model": args.model or "SmolLM2-135M-Instruct, SparseGPT",
            "text": "the reference of the Python language",
            "tokens": args.steps * args.length,
            "seed": args.seed,
            "backend": keras.backend.backend(),
            "keras": keras.__version__,
            "rows": rows,
        }
        pathlib.Path(args.json).write_text(json.dumps(report, indent=1) + "\n")


def load_model(args):
    import keras

    from examples.data.smollm2 import load_smollm2

    if not args.model:
        return load_smollm2(dtype="float32")
    # Registers the classes of the file.
    import keras_hub  # noqa: F401

    return keras.saving.load_model(args.model)


def nothing(model, train, args):
    del model, train, args


def under_a_fixed_mask(model, train, args):
    del args
    import keras_weightmods as kwm

    kwm.SemiStructuredSparse.attach(model, frozen=True)
    fit(model, train, 5e-5)
    kwm.SemiStructuredSparse.detach(model)


def lora(pattern):
    def method(model, train, args):
        import keras_weightmods as kwm

        model.backbone.enable_lora(args.rank)
        fit(model, train, 5e-4)
        kwm.merge_lora(model, pattern)
        if pattern is None:
            kwm.sparsify(model, "2:4", verbose=0)
        # KerasHub has frozen all the rest.
        for layer in model.backbone.layers:
            layer.trainable = True

    return method


def principal_weights(model, train, args):
    import keras_weightmods as kwm

    callback = kwm.PrincipalMaskCallback(
        density=0.05, refresh_every=None, keep_pattern=True, seed=args.seed
    )
    fit(model, train, 1e-4, [callback])


def fit(model, train, learning_rate, callbacks=()):
    import keras

    steps = len(train)
    schedule = keras.optimizers.schedules.PolynomialDecay(learning_rate, steps)
    model.compile(
        keras.optimizers.Adam(schedule, global_clipnorm=1.0),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        weighted_metrics=[],
    )
    model.preprocessor, preprocessor = None, model.preprocessor
    model.fit(
        model_inputs(train[:, :-1]),
        train[:, 1:],
        batch_size=1,
        shuffle=False,
        verbose=2,
        callbacks=list(callbacks),
    )
    model.preprocessor = preprocessor


METHODS = {
    "2:4, as it was": nothing,
    "all kept weights, fixed mask": under_a_fixed_mask,
    "LoRA, merged under the mask": lora("2:4"),
    "LoRA, merged by magnitude": lora(None),
    "principal weights (LIFT)": principal_weights,
}


if __name__ == "__main__":
    main()
