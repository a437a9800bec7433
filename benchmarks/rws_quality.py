"""What robust weight signatures (arXiv 2302.12480) do for small nets.

    python -m benchmarks.rws_quality
    python -m benchmarks.rws_quality --backend tensorflow --seeds 0

Real digits at 16 x 16: MNIST, and those of scikit-learn as the other data set.
A VGG-like and a ResNet-like net, pretrained once; for each seed, another split
of the images, clean and robust training from there, signatures, and the
accuracy of what they make of the clean model, over five severities. The share
of the gap is (patched - clean) / (robust - clean) under the corruption; the bar
is a half for the VGG-like net at scale 1.
"""

import importlib.metadata
import itertools
import os
import platform
import time

from benchmarks import harness

BAR = 0.5


def main():
    args = parse_arguments()
    harness.choose_backend(args.backend)
    run(args)


def parse_arguments():
    parser = harness.make_parser(__doc__)
    harness.add_backend(parser, "torch")
    parser.add_argument("--nets", default="vgg_like,resnet_like")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--pretrain-epochs", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=12)
    harness.add_json(parser, "rws_quality.json")
    parser.add_argument(
        "--resume", action="store_true", help="keep the rows that are there"
    )
    return parser.parse_args()


def run(args):
    import keras

    from examples.data.corruptions import CORRUPTIONS
    from examples.data.robust_nets import NETS, load_data, pretrain

    results = {
        **about(args),
        "bar": BAR,
        "bytes": {},
        "minutes": {},
        "rows": [],
    }
    old = harness.read_json(args.json) if args.resume else None
    if old:
        results.update({k: old[k] for k in ("bytes", "minutes", "rows")})
    for net in args.nets.split(","):
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
        pretrain(model, load_data(0), args.pretrain_epochs)
        init = model.get_weights()
        for seed in seeds:
            began = time.monotonic()
            study = Study(model, init, shallow, list(CORRUPTIONS), seed, args)
            results["rows"] += [
                {"net": net, "seed": seed, **row} for row in study.rows()
            ]
            results["bytes"][net] = study.sizes()
            minutes = (time.monotonic() - began) / 60
            results["minutes"][f"{net}, seed {seed}"] = minutes
            harness.write_json(args.json, results)
            print(f"{net}, seed {seed}: {minutes:.1f} min")
    print_tables(results)


class Study:
    """One net and one seed: checkpoints, signatures, accuracies."""

    def __init__(self, model, init, shallow, corruptions, seed, args):
        from examples.data.robust_nets import Tests, fine_tune, load_data

        self.model, self.init, self.shallow = model, init, shallow
        self.corruptions = corruptions
        data = load_data(seed)
        self.tests = {
            name: Tests(*data[name]["test"], corruptions, 1000 * (seed + 1))
            for name in ("mnist", "digits")
        }
        self.trained = {
            (name, corruption): fine_tune(
                model,
                init,
                *data[name]["train"],
                args.epochs,
                corruption,
                seed,
            )
            for name in ("mnist", "digits")
            for corruption in (None, *corruptions)
        }
        self.signatures = {
            name: self.signature("mnist", name) for name in corruptions
        }

    def signature(self, data, corruption, init=True, **kwargs):
        from keras_weightmods import WeightSignature

        return WeightSignature.extract(
            self.init if init else None,
            self.trained[data, None],
            self.trained[data, corruption],
            like=self.model,
            **{"statistics": "keep", **self.shallow, **kwargs},
        )

    def sizes(self):
        signature = next(iter(self.signatures.values()))
        return {
            "model": signature.model_nbytes,
            "signature": signature.nbytes,
            **{f"{b} bits": signature.quantize(b).nbytes for b in (8, 4, 2)},
        }

    def rows(self):
        """Accuracies as dicts: data, corruption, model, on clean, under it."""
        for corruption, signature in self.signatures.items():
            clean = self.trained["mnist", None]
            whole = self.signature("mnist", corruption, depth=None, targets="")
            models = {
                "clean": clean,
                "robust": self.trained["mnist", corruption],
                "patched": signature.apply(clean),
                **{
                    f"patched, {bits} bits": signature.quantize(bits).apply(
                        clean
                    )
                    for bits in (8, 4, 2)
                },
                "patched, 4 bits a channel": signature.quantize(
                    4, per_channel=True
                ).apply(clean),
                "patched, scale 0.5": signature.apply(clean, 0.5),
                "no projection": self.signature(
                    "mnist", corruption, init=False
                ).apply(clean),
                "all layers": whole.apply(clean),
            }
            if any(e.endswith("moving_mean") for e in self.paths()):
                for statistics in ("average", "replace"):
                    models[f"statistics: {statistics}"] = self.signature(
                        "mnist", corruption, statistics=statistics
                    ).apply(clean)
                models["all layers, statistics: replace"] = self.signature(
                    "mnist",
                    corruption,
                    depth=None,
                    targets="",
                    statistics="replace",
                ).apply(clean)
            yield from self.measured("mnist", corruption, models)
        yield from self.sums()
        # From one data set's model onto another's.
        clean = self.trained["digits", None]
        for corruption, signature in self.signatures.items():
            models = {
                "clean": clean,
                "robust": self.trained["digits", corruption],
                "patched": self.signature("digits", corruption).apply(clean),
                "patched from mnist": signature.apply(clean),
                "patched from mnist, 8 bits": signature.quantize(8).apply(
                    clean
                ),
            }
            yield from self.measured("digits", corruption, models)

    def sums(self):
        """Two signatures on one model, under each of the two corruptions."""
        from keras_weightmods import sum_signatures

        clean = self.trained["mnist", None]
        for pair in itertools.combinations(self.corruptions, 2):
            two = [self.signatures[name] for name in pair]
            models = {
                f"two, {method}": sum_signatures(two, method).apply(clean)
                for method in ("mean", "sum", "ties")
            }
            for corruption, other in (pair, pair[::-1]):
                for row in self.measured("mnist", corruption, models):
                    yield {**row, "other": other}

    def measured(self, data, corruption, models):
        tests = self.tests[data]
        for name, weights in models.items():
            yield {
                "data": data,
                "corruption": corruption,
                "model": name,
                "on_clean": tests.accuracy(self.model, weights),
                "corrupted": tests.accuracy(self.model, weights, corruption),
            }

    def paths(self):
        return [variable.path for variable in self.model.weights]


def about(args):
    import keras

    packages = ("keras", args.backend, "numpy", "mlxtend", "scikit-image")
    return {
        "machine": f"{harness.cpu()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "versions": {p: importlib.metadata.version(p) for p in packages},
        "backend": keras.backend.backend(),
        "dtype": "float32",
        "pretrain_epochs": args.pretrain_epochs,
        "epochs": args.epochs,
    }


def shares(rows):
    """{(net, data, model): [share of the gap, ...]}, and accuracies.

    One share for each seed and corruption; of those where robust training
    gains next to nothing there is none to speak of.
    """
    import numpy as np

    ends = {
        (r["net"], r["seed"], r["data"], r["corruption"], r["model"]): r
        for r in rows
        if r["model"] in ("clean", "robust")
    }
    found: dict = {}
    for row in rows:
        where = [row[k] for k in ("net", "seed", "data", "corruption")]
        low, high = (
            ends[(*where, name)]["corrupted"] for name in ("clean", "robust")
        )
        share = (row["corrupted"] - low) / (high - low)
        if high - low < 0.02:
            share = np.nan
        key = row["net"], row["data"], row["model"]
        found.setdefault(key, []).append(
            (share, row["corrupted"], row["on_clean"], row["corruption"])
        )
    return found


def print_tables(results):
    import numpy as np

    found = shares(results["rows"])
    for net, data in dict.fromkeys(key[:2] for key in found):
        table = harness.table(
            f"{net}, {data}: means over seeds, corruptions",
            text=["model"],
            numbers=("on clean", "corrupted", "of the gap", "least", "+-"),
        )
        for key, values in found.items():
            if key[:2] != (net, data):
                continue
            share = np.array([v[0] for v in values])
            table.add_row(
                key[2],
                f"{np.mean([v[2] for v in values]):.1%}",
                f"{np.mean([v[1] for v in values]):.1%}",
                f"{np.nanmean(share):.2f}",
                f"{np.nanmin(share):.2f}",
                f"{np.nanstd(share):.2f}",
            )
        harness.print_all(table)
    for net, sizes in results["bytes"].items():
        model = sizes["model"]
        harness.print_all(
            f"{net}: model {model:,} bytes; "
            + "; ".join(
                f"{name} {size:,} ({model / size:.1f}x smaller)"
                for name, size in sizes.items()
                if name != "model"
            )
        )
    patched = found.get(("vgg_like", "mnist", "patched"))
    if patched:
        for corruption in dict.fromkeys(v[3] for v in patched):
            share = np.nanmean([v[0] for v in patched if v[3] == corruption])
            shown = harness.verdict(share, results["bar"], ">=", ".2f")
            harness.print_all(
                f"vgg_like under {corruption}, share of the gap: {shown}"
            )
    harness.print_all(
        f"{results['machine']}, {results['backend']}, {results['versions']}, "
        f"{sum(results['minutes'].values()):.1f} minutes"
    )


if __name__ == "__main__":
    main()
