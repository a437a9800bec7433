"""Patches robustness to typing errors onto MiniLM, and takes it off again.

    python -m examples.signature_text --sentences vaderSentiment-3.3.2.tar.gz

MiniLM, a sentence encoder (BERT, 6 blocks), learns from a few hundred sentences
which source each is from: film reviews, product reviews, editorials or tweets.
From the same start it is trained once on clean text and once on each noise:
typos, and spaces in the wrong places. This gives a signature for each noise
(RWS, arXiv 2302.12480), of the first blocks alone and of all. They are added to
the clean model, scaled, summed, and taken off, bit for bit. Beside them a patch
from a second training on clean text, in another order, says what a patch does
that has seen no noise. Prints the accuracy on clean and on noisy text.

Casing is no noise here: the vocabulary has none, so the tokens are the same.
"""

import json
import pathlib

from examples import command_line

SCALES = (0.5, 1.0, 1.5)


def main():
    args = parse_arguments()
    command_line.choose_backend(args.backend)
    run(args)


def parse_arguments():
    parser = command_line.make_parser(__doc__)
    command_line.add_backend(parser)
    parser.add_argument("--sentences", help="the source of vaderSentiment")
    parser.add_argument(
        "--task",
        choices=("source", "praise"),
        default="source",
        help="praise: whether a film review praises",
    )
    parser.add_argument("--texts", type=int, default=400, help="to train on")
    parser.add_argument("--test-texts", type=int, default=500)
    parser.add_argument("--rate", type=float, default=0.2, help="of letters")
    parser.add_argument("--length", type=int, default=32, help="in tokens")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--blocks", type=int, default=3, help="the first")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--output",
        help="a JSON file for the numbers; seeds that are in it are not run",
    )
    args = parser.parse_args()
    counts = "texts", "test_texts", "length", "epochs", "blocks"
    command_line.check(parser, args, counts, ["output"])
    return args


def run(args):
    from rich.console import Console

    from examples.data import minilm, sentences

    report = read_report(args)
    load = sentences.TASKS[args.task]
    texts, labels = load(args.sentences or sentences.ARCHIVE)
    results = report["seeds"]
    for seed in args.seeds:
        if str(seed) in results:
            continue
        encoder = minilm.load_minilm(args.length)
        results[str(seed)] = study(encoder, texts, labels, seed, args)
        if args.output:
            text = json.dumps(report, indent=1) + "\n"
            pathlib.Path(args.output).write_text(text)
    Console().print(table(list(results.values())))


def read_report(args):
    """Return what `args.output` holds already, or an empty report."""
    import keras

    others = "seeds", "output", "sentences"
    arguments = {k: v for k, v in vars(args).items() if k not in others}
    arguments["keras"] = keras.__version__
    if args.output and pathlib.Path(args.output).exists():
        report = json.loads(pathlib.Path(args.output).read_text())
        if report["arguments"] != arguments:
            raise SystemExit(
                f"Expected the numbers in {args.output} to be of the same "
                f"arguments, {arguments}. Received: {report['arguments']}. "
                "Give another file."
            )
        return report
    return {"arguments": arguments, "seeds": {}}


def study(encoder, texts, labels, seed, args):
    """Train and patch with one seed.

    Args:
        encoder: A `keras_hub.models.BertTextEmbedder`, pretrained.
        texts, labels: Of which `args.texts` are trained on and
            `args.test_texts` others measured.
        seed: Int; says which texts these are, too.
        args: As `parse_arguments` returns them.

    Returns:
        Dict from what the model is to a dict from the noise of the text
        (`"clean"` for none) to an accuracy.
    """
    import keras
    import numpy as np

    import keras_weightmods as kwm
    from examples.data.typos import NOISES, mistype

    order = np.random.default_rng(seed).permutation(len(texts))
    parts = {
        "train": order[: args.texts],
        "test": order[args.texts : args.texts + args.test_texts],
    }

    def inputs(part, noise):
        chosen = [texts[i] for i in parts[part]]
        if noise != "clean":
            # No noisy word of the tests is one that was trained on by chance.
            offset = 1000 if part == "test" else 0
            chosen = mistype(chosen, noise, args.rate, seed + offset)
        found = encoder.preprocessor(chosen)
        return {k: keras.ops.convert_to_numpy(v) for k, v in found.items()}

    keras.utils.set_random_seed(seed)
    model = make_classifier(encoder.backbone, int(labels.max()) + 1)
    init = model.get_weights()
    tests = {noise: inputs("test", noise) for noise in ("clean", *NOISES)}

    def trained_on(noise, seed):
        model.set_weights(init)
        data = inputs("train", noise), labels[parts["train"]]
        fine_tune(model, *data, args, seed)
        return model.get_weights()

    clean = trained_on("clean", seed)
    trained = {noise: trained_on(noise, seed) for noise in NOISES}
    again = trained_on("clean", seed + 1)

    def accuracies():
        expected = labels[parts["test"]]
        return {
            noise: accuracy(model, test, expected)
            for noise, test in tests.items()
        }

    def signature_of(noise, blocks):
        return extract(init, clean, trained[noise], noise, model, blocks)

    signatures = {noise: signature_of(noise, args.blocks) for noise in trained}
    model.set_weights(clean)
    before = accuracies()
    results = {"clean model": before}

    def measure(name, *patches):
        """The accuracies with these pairs of a signature and its scale."""
        for signature, scale in patches:
            signature.apply(model, scale)
        results[name] = accuracies()
        kwm.Patch.clear(model)
        assert_clean(model, clean)

    for noise, signature in signatures.items():
        for scale in SCALES:
            measure(f"patch {noise} x {scale}", (signature, scale))
        whole = signature_of(noise, encoder.backbone.num_layers)
        measure(f"patch {noise}, all blocks", (whole, 1.0))
    measure("sum of the patches", *((s, 1.0) for s in signatures.values()))
    share = 1 / len(signatures)
    measure("mean of the patches", *((s, share) for s in signatures.values()))
    control = extract(init, clean, again, "clean again", model, args.blocks)
    measure("patch clean again (control)", (control, 1.0))
    results["patches removed"] = accuracies()
    for noise, weights in trained.items():
        model.set_weights(weights)
        results[f"trained on {noise}"] = accuracies()
    return results


def make_classifier(backbone, classes):
    """Return a model of a backbone, the mean of its states, and a linear head.

    The tables of tokens, positions and segments are frozen, and the pooler,
    which nothing uses.
    """
    import keras
    import keras_hub

    for name in ("token", "position", "segment"):
        backbone.get_layer(f"{name}_embedding").trainable = False
    backbone.get_layer("pooled_dense").trainable = False
    mean = keras_hub.models.BertTextEmbedder(backbone, normalize=False)
    head = keras.layers.Dense(classes, name="head")
    return keras.Model(mean.input, head(mean.output))


def extract(init, clean, robust, noise, model, blocks):
    """Return the signature of the first blocks, and what is before them."""
    import keras_weightmods as kwm

    numbers = "|".join(map(str, range(blocks)))
    return kwm.WeightSignature.extract(
        init,
        clean,
        robust,
        targets=rf"^(embeddings_layer_norm|transformer_layer_({numbers}))/",
        name=noise,
        like=model,
    )


def fine_tune(model, inputs, labels, args, seed):
    import keras

    batch = 16
    keras.utils.set_random_seed(seed)
    steps = -(-len(labels) // batch) * args.epochs
    rate = keras.optimizers.schedules.PolynomialDecay(args.learning_rate, steps)
    model.compile(
        keras.optimizers.AdamW(rate, weight_decay=0.01, global_clipnorm=1.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    model.fit(inputs, labels, batch, args.epochs, verbose=0)


def accuracy(model, inputs, labels):
    logits = model.predict(inputs, batch_size=50, verbose=0)
    return float((logits.argmax(-1) == labels).mean())


def assert_clean(model, clean):
    for now, before in zip(model.get_weights(), clean):
        if now.tobytes() != before.tobytes():
            raise RuntimeError("the clean model did not come back")


def table(results):
    """Return a table of means over the seeds, and how far these reach."""
    from rich.table import Table

    seeds = f"{len(results)} seed{'s' * (len(results) > 1)}"
    found = Table(title=f"Accuracy, mean of {seeds} (least to most)")
    found.add_column("model")
    for noise in results[0]["clean model"]:
        found.add_column(f"{noise} text", justify="right")
    for name, row in results[0].items():
        cells = []
        for noise in row:
            values = [each[name][noise] for each in results]
            mean = sum(values) / len(values)
            ends = f" ({min(values):.1%} to {max(values):.1%})"
            cells.append(f"{mean:.1%}" + ends * (len(values) > 1))
        found.add_row(name, *cells)
    return found


if __name__ == "__main__":
    main()
