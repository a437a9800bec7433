"""Fine-tunes the principal weights of a language model, and nothing else.

    python -m examples.finetune_lift
    python -m examples.finetune_lift --backend jax --steps 400
    python -m examples.finetune_lift --preset gemma3_1b --data problems.jsonl

The default takes SmolLM2-135M-Instruct and arithmetic word problems of two and
three steps from a seeded generator: some minutes on two cores. It prints how
many held-out problems the model solves before and after, what it has forgotten
(perplexity on unrelated text), and what the training took. It stores the change
as a delta, and shows that the delta comes off bit for bit.

A problem counts as solved where the greedy continuation of the question is the
whole worked answer, token by token.
"""

import json
import math
import pathlib
import time

from examples import command_line
from examples.sizes import nbytes, peak_bytes


def main():
    args = parse_arguments()
    command_line.choose_backend(args.backend)
    run(args)


def parse_arguments():
    parser = command_line.make_parser(__doc__)
    command_line.add_preset(parser)
    parser.add_argument(
        "--data",
        help='your problems: a line each, {"question": "...", "answer": "..."}',
    )
    command_line.add_backend(parser)
    parser.add_argument("--steps", type=int, default=60, help="default: 60")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--length", type=int, default=80, help="of a row")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--density", type=float, default=0.05)
    parser.add_argument("--filter-rank", type=int)
    parser.add_argument("--refresh-every", type=int, default=20)
    parser.add_argument("--held-out", type=int, default=64, help="problems")
    parser.add_argument("--dtype", default="float32", help="Keras policy")
    parser.add_argument("--output", default="lift_delta.safetensors")
    parser.add_argument("--json", help="write the results to this file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--smoke", action="store_true", help="a few steps, to test the script"
    )
    args = parser.parse_args()
    counts = ("steps", "batch_size", "length", "refresh_every", "held_out")
    command_line.check(parser, args, counts, files=("output", "json"))
    if args.smoke:
        args.steps, args.held_out = min(args.steps, 3), 4
        args.refresh_every, args.batch_size = 2, 2
    return args


def run(args):
    import keras
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    import keras_weightmods as kwm

    console = Console()
    start = time.monotonic()
    keras.utils.set_random_seed(args.seed)
    model = load_model(args.preset, args.dtype)
    base = model.get_weights()
    train, held_out, unrelated = load_rows(args, model)
    measure = Measure(model, held_out, unrelated)
    results = [{"model": "before", **measure()}]

    model.compile(
        optimizer=kwm.SparseAdamW(
            learning_rate_schedule(args.learning_rate, args.steps)
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    masks = kwm.PrincipalMaskCallback(
        density=args.density,
        filter_rank=args.filter_rank,
        refresh_every=args.refresh_every,
        seed=args.seed,
    )
    console.rule("LIFT")
    began = time.monotonic()
    report = masks.attach(model)
    totals = report.totals
    console.print(
        f"{totals['trained']:,} of {totals['entries']:,} entries of "
        f"{len(report.kernels)} kernels, chosen in "
        f"{time.monotonic() - began:.0f} s"
    )
    began = time.monotonic()
    model.fit(
        **fit_arguments(train),
        batch_size=args.batch_size,
        shuffle=False,  # the problems are in a random order
        callbacks=[masks],
    )
    seconds = time.monotonic() - began
    state = nbytes(model.optimizer.variables)
    memory = peak_bytes() / 2**30
    results.append({"model": "after", **measure()})

    patch = kwm.Patch.from_models(model, base)
    delta = patch.save(args.output)
    sample = generate(model, args)
    model.set_weights(base)
    patch = kwm.Patch.load(args.output)
    patch.apply(model)
    results.append({"model": "base and delta", **measure()})
    patch.remove(model)
    is_clean = all(
        a.tobytes() == b.tobytes() for a, b in zip(base, model.get_weights())
    )

    table = Table(title=f"{model.name}, {args.steps} steps")
    table.add_column("model")
    for name in ("solved", "answer tokens", "loss", "unrelated text"):
        table.add_column(name, justify="right")
    for row in results:
        table.add_row(
            row["model"],
            f"{row['solved']:.1%}",
            f"{row['tokens']:.1%}",
            f"{row['loss']:.3f}",
            f"{row['unrelated']:.2f}",
        )
    console.print(table)
    console.print(f"[bold]A held-out problem[/bold]: {escape(sample)}")
    adam = 8 * sum(math.prod(v.shape) for v in model.trainable_variables)
    console.print(
        f"Optimizer state {state / 1e6:.1f} MB, AdamW's for the whole model "
        f"{adam / 1e6:.0f} MB; {seconds / args.steps:.2f} s a step; peak "
        f"memory {memory:.1f} GiB.\n{escape(str(delta))}\nThe delta came off "
        f"{'bit for bit' if is_clean else 'WITH A DIFFERENCE'}; "
        f"{(time.monotonic() - start) / 60:.1f} minutes in all."
    )
    if args.json:
        result = {
            "backend": keras.backend.backend(),
            "arguments": vars(args),
            "results": results,
            "entries": totals["trained"],
            "optimizer_bytes": state,
            "file_bytes": delta.nbytes,
            "index_bits": delta.index_bits,
            "seconds_a_step": seconds / args.steps,
            "peak_memory_gib": memory,
            "removed_bit_exactly": is_clean,
        }
        pathlib.Path(args.json).write_text(json.dumps(result, indent=1))
    if not is_clean:
        raise SystemExit(1)


def load_model(preset=None, dtype="float32"):
    """Return a model that takes tokens in `fit`, and keeps its tokenizer."""
    from examples.data.smollm2 import load_causal_lm

    model = load_causal_lm(preset, dtype)
    model.tokenizer = model.preprocessor.tokenizer
    model.preprocessor = None
    return model


def load_rows(args, model):
    """Rows to train on, rows of held-out problems, rows of other text."""
    from examples.data.prose import load_rows
    from examples.data.word_problems import encode, load_problems, make_problems

    count = args.steps * args.batch_size
    if args.data:
        train = load_problems("train", args.data, args.seed)
        train = (train * -(-count // len(train)))[:count]
        held_out = load_problems("test", args.data)[: args.held_out]
    else:
        train = make_problems("train", count, args.seed)
        held_out = make_problems("test", args.held_out)
    tokenizer = model.tokenizer
    (unrelated,) = load_rows(tokenizer, 257, reference=2 if args.smoke else 8)
    return (
        encode(train, tokenizer, args.length + 1),
        encode(held_out, tokenizer, args.length + 1),
        unrelated,
    )


def fit_arguments(rows):
    """What `fit` takes: inputs, labels and the labels' weights."""
    inputs = {
        "token_ids": rows["token_ids"][:, :-1],
        "padding_mask": rows["padding_mask"][:, :-1],
    }
    return {"x": inputs, "y": rows["labels"], "sample_weight": rows["weights"]}


def learning_rate_schedule(peak, steps):
    """Up in 3 % of the steps, then down to zero."""
    import keras

    warmup = max(1, round(0.03 * steps))
    return keras.optimizers.schedules.CosineDecay(
        # The first of its steps has the initial rate.
        peak / (warmup + 1),
        steps,
        warmup_target=peak,
        warmup_steps=warmup,
    )


class Measure:
    """Measures a model on held-out problems and, if given, unrelated text."""

    def __init__(self, model, held_out, unrelated=None):
        import keras_weightmods as kwm
        from keras_weightmods.evaluation.token_scorer import TokenScorer

        self.held_out = held_out
        self.unrelated = unrelated
        self._score = TokenScorer(model)
        self._perplexity = kwm.Perplexity(model)

    def __call__(self):
        """Shares of problems and answer tokens, loss, perplexity."""
        import numpy as np

        rows, size = self.held_out, 8
        losses, greedy = [], []
        for start in range(0, len(rows["labels"]), size):
            part = slice(start, start + size)
            loss, is_greedy = self._score(
                rows["token_ids"][part], rows["padding_mask"][part, :-1]
            )
            losses.append(loss)
            greedy.append(is_greedy)
        loss, greedy = np.concatenate(losses), np.concatenate(greedy)
        answer = rows["weights"] > 0
        result = {
            "solved": float(np.mean(np.all(greedy | ~answer, axis=1))),
            "tokens": float(np.mean(greedy[answer])),
            "loss": float(np.mean(loss[answer])),
        }
        if self.unrelated is not None:
            result["unrelated"] = self._perplexity(self.unrelated, "unrelated")
        return result


def generate(model, args):
    """A question with the model's greedy answer."""
    import keras
    import numpy as np

    from examples.data.prose import model_inputs
    from examples.data.word_problems import (
        load_problems,
        make_problems,
        prompt_of,
    )

    problems = (
        load_problems("test", args.data)
        if args.data
        else make_problems("test", 1)
    )
    question, _ = problems[0]
    ids = [int(i) for i in model.tokenizer(prompt_of(question))]
    end = model.tokenizer.end_token_id
    for _ in range(4 if args.smoke else 40):
        row = np.int32([ids])
        logits = model(model_inputs(row), training=False)
        best = int(keras.ops.argmax(logits[0, -1]))
        if best == end:
            break
        ids.append(best)
    return str(model.tokenizer.detokenize(ids))


if __name__ == "__main__":
    main()
