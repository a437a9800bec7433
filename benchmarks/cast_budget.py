"""What CAST keeps of small language models, by its tokens a weight.

    python -m benchmarks.cast_budget
    python -m benchmarks.cast_budget --sizes "27k x 40" --seeds 0

The paper (arXiv 2509.25996) trains for about one to six tokens a weight, which
takes a cluster at its sizes. Here the models are small enough for one core.
Each is trained from scratch on annual messages and docstrings, and made sparse
at budgets of 0.003 to 10 tokens a weight. A row is either

- `dense`: the training from scratch, and `rival`, that of a smaller model with
  the bytes of the sparse one, for the tokens of both trainings;
- `start`: a one-shot start, made on 128 rows of text;
- `cast`: CAST from such a start, with its mask fixed, or from the dense model;
- `control`: the dense model, trained on for as many tokens without a teacher.

Rates are searched by factors of 3 on text that nothing else is measured on,
until the best is at no end or moves nothing, for 2:4. 16:32 takes the same
rates. The seeds choose the rows of CAST and the control. No row of the dense
training is among these. The file is written after each row, and a row that it
holds is not made again.
"""

import dataclasses
import functools
import itertools
import math
import pathlib
import time

from benchmarks import harness, quality
from examples.data.prose import load_documentation, load_prose, load_rows

TEXTS = ("held_out", "news")
PATTERNS = ("2:4", "16:32")
BUDGETS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
# The law is not fitted to these.
HELD_OUT = (0.1, 3.0, 10.0)
VOCABULARY = 2048
LENGTH = 64


@dataclasses.dataclass
class Size:
    """A size of model, its rival of equal bytes, and what is made of it.

    `dense_budget` is the tokens a weight of the training from scratch. Rates
    are searched at the budgets `searched`, and the others take that of the next
    larger. `from_dense` says whether CAST from the dense model is trained, too.
    """

    layers: int
    heads: int
    width: int
    rival_width: int
    dense_budget: int
    budgets: tuple = BUDGETS
    searched: tuple = (0.1, 1.0)
    seeds: int = 3
    from_dense: bool = True


# By thousands of weights, and tokens a weight of the training from scratch.
SIZES = {
    "27k x 40": Size(2, 2, 32, 28, 40),
    "106k x 10": Size(2, 4, 64, 56, 10, (0.1, 0.3, 1.0), (0.3,), 1, False),
    # No rows are left for ten tokens a weight.
    "426k x 40": Size(2, 4, 128, 104, 40, BUDGETS[:-1]),
}
# The control gains nothing at 0.1 tokens a weight and below, at any rate.
CONTROL_FROM = 0.3
# CAST from the dense model, and a larger budget than this, are of one seed.
LARGEST_OF_SEEDS = 3.0
# The perplexity of the smallest on "valid" after 384,000 tokens was 278, 204
# and 258 with 2e-3, 5e-3 and 1.5e-2.
DENSE_RATE = 5e-3
# The control gains more here by another rate than that of one token a weight.
# Its perplexity was 91.2, 90.3 and 88.9 with 1.11e-4, 3.33e-4 and 1e-3. Larger
# rates were not tried.
CONTROL_RATES = {10.0: 1e-3}
FIRST_RATE = 1e-3
# Nothing moves below this one.
LEAST_RATE = 1e-6
BATCH = 16


def main():
    parser = harness.make_parser(__doc__)
    harness.add_backend(parser, "jax")
    parser.add_argument(
        "--sizes", type=harness.subset(SIZES), default=list(SIZES)
    )
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument(
        "--folder",
        type=pathlib.Path,
        default=harness.ROOT / "build" / "cast_budget",
        help="of the weights of dense models and starts",
    )
    harness.add_json(parser, "cast_budget.json")
    args = parser.parse_args()
    harness.choose_backend(args.backend)
    log = Log(args.json, args.backend)
    texts = load_texts(args.folder / "texts.npz")
    studies = [Study(size, texts, log, args.folder) for size in args.sizes]
    for seed in map(int, args.seeds.split(",")):
        for study in studies:
            study.run(seed)
    for study in studies:
        study.rival()


class Log:
    """The rows of the file, each found by what it is of."""

    def __init__(self, path, backend):
        self.path = path
        self.report = harness.read_json(path) or {"rows": []}
        self.report |= {
            "machine": harness.machine(),
            "backend": backend,
            "versions": harness.versions("keras-hub", "tokenizers"),
            "vocabulary": VOCABULARY,
            "length": LENGTH,
        }

    def row(self, make=None, **key):
        """Return the row of this key, made by `make()` if there is none."""
        for row in self.report["rows"]:
            if key.items() <= row.items():
                return row
        began, work = time.monotonic(), time.process_time()
        row = {**key, **make()}
        row["seconds"] = round(time.monotonic() - began, 1)
        row["processor_seconds"] = round(time.process_time() - work, 1)
        self.report["rows"].append(row)
        harness.write_json(self.path, self.report)
        print(row, flush=True)
        return row


def load_texts(file):
    """Return rows of token ids by name of the text, kept in a file."""
    import numpy as np
    import tokenizers

    if file.exists():
        return dict(np.load(file))
    bpe = tokenizers.ByteLevelBPETokenizer()
    seen = [*load_prose("train"), *load_documentation()]
    bpe.train_from_iterator(seen, VOCABULARY, show_progress=False)
    limits = {"train": None, "documentation": None}
    limits |= {"held_out": 384, "news": 128}
    rows = load_rows(lambda text: bpe.encode(text).ids, LENGTH + 1, **limits)
    texts = dict(zip(limits, rows))
    texts["valid"], texts["held_out"] = np.split(texts["held_out"], [128])
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, **texts)
    return texts


class Study:
    """The rows of one size."""

    def __init__(self, size, texts, log, folder):
        import numpy as np

        import keras_weightmods as kwm

        self.size, self.texts, self.log, self.folder = size, texts, log, folder
        self.spec = SIZES[size]
        self.model, self.teacher, self.judge = (
            self.make(self.spec.width) for _ in range(3)
        )
        self.weights = kernel_weights(self.model)
        rows = np.concatenate([texts["train"], texts["documentation"]])
        rows = np.random.default_rng(0).permutation(rows)
        count = round(self.spec.dense_budget * self.weights / LENGTH)
        # At most a third of them, so that the rest is new to the dense model.
        unique = min(count, 2 * len(rows) // 3)
        self.dense_rows = rows[np.arange(count) % unique]
        self.rows = rows[unique:]
        self.measure = kwm.Perplexity(self.judge, batch_size=64)

    def make(self, width):
        return harness.make_llm(
            vocabulary_size=VOCABULARY,
            num_layers=self.spec.layers,
            hidden_dim=width,
            intermediate_dim=3 * width,
            num_query_heads=self.spec.heads,
            num_key_value_heads=self.spec.heads,
        )

    def run(self, seed):
        dense = self.trained("dense", self.spec.width, self.dense_rows)
        self.teacher.set_weights(dense)
        methods = {"control": (None, None, dense)}
        for pattern in PATTERNS:
            start = self.start(pattern, dense)
            methods[f"{pattern} from one-shot"] = pattern, "one-shot", start
        methods["2:4 from dense"] = "2:4", "dense", dense
        for budget, (name, method) in itertools.product(
            self.spec.budgets, methods.items()
        ):
            is_dense = method[1] == "dense"
            if (
                seed >= self.spec.seeds
                or (seed and (is_dense or budget > LARGEST_OF_SEEDS))
                or (is_dense and not self.spec.from_dense)
                or (method[1] is None and budget < CONTROL_FROM)
            ):
                continue
            # 16:32 takes the rates of 2:4.
            searched = (
                name.replace("16:32", "2:4"),
                *methods[name.replace("16:32", "2:4")],
            )
            rate = CONTROL_RATES.get(budget) if name == "control" else None
            rate = rate or self.best_rate(*searched, budget)
            self.log.row(
                functools.partial(
                    self.train, *method, budget, seed, rate, TEXTS
                ),
                size=self.size,
                kind="cast" if method[0] else "control",
                method=name,
                budget=budget,
                seed=seed,
            )

    def rival(self):
        """Train the smaller model for the tokens of both trainings."""
        more = self.some_rows(LARGEST_OF_SEEDS, seed=0)
        self.trained("rival", self.spec.rival_width, [*self.dense_rows, *more])

    def trained(self, kind, width, rows):
        """Return the weights of a model that was trained from scratch."""
        import keras
        import numpy as np

        file = self.folder / f"{self.size} {kind}.npz"

        def make():
            keras.utils.set_random_seed(0)
            model = self.make(width)
            found = fit_dense(model, np.asarray(rows), BATCH, DENSE_RATE)
            save(file, model)
            kernels, trained = kernel_weights(model), model.get_weights()
            rest = model.count_params() - kernels
            return {
                **found,
                "weights": kernels,
                # In 16 bits: half of the values, and a bit for each place.
                "bytes": 2 * rest + 2 * kernels,
                "sparse_bytes": 2 * rest + kernels * 9 // 8,
                "perplexity": self.perplexity(trained, TEXTS, model),
            }

        self.log.row(make, size=self.size, kind=kind)
        return load(file)

    def start(self, pattern, dense):
        """Return the weights of a one-shot start."""
        import keras_weightmods as kwm

        name = pattern.replace(":", "-")
        file = self.folder / f"{self.size} {name}.npz"

        def make():
            self.model.set_weights(dense)
            kwm.sparsify(
                self.model,
                pattern,
                quality.model_inputs(self.rows[-128:, :-1]),
                criterion="sparsegpt",
                refine=("swaps", "blocks"),
                batch_size=16,
                verbose=0,
            )
            save(file, self.model)
            return {"perplexity": self.perplexity(load(file), TEXTS)}

        self.log.row(make, size=self.size, kind="start", pattern=pattern)
        return load(file)

    def best_rate(self, name, pattern, start, weights, budget):
        """Return the best rate of the next larger budget that is searched."""
        searched = next(
            (each for each in self.spec.searched if each >= budget),
            self.spec.searched[-1],
        )
        rates, tried = [FIRST_RATE / 3, FIRST_RATE, 3 * FIRST_RATE], {}
        while rates:
            rate = float(f"{rates.pop():.3g}")
            row = self.log.row(
                functools.partial(
                    self.train,
                    *(pattern, start, weights, searched, 99, rate, ["valid"]),
                ),
                size=self.size,
                kind="search",
                method=name,
                budget=searched,
                rate=rate,
            )
            tried[rate] = row["perplexity"]["valid"]
            best = min(tried, key=tried.get)
            if not rates and best == min(tried) > LEAST_RATE:
                rates = [best / 3]
            elif not rates and best == max(tried):
                rates = [best * 3]
        return best

    def train(self, pattern, start, weights, budget, seed, rate, texts):
        """Train from these weights, sparse by `pattern` if that is given."""
        import keras

        keras.utils.set_random_seed(seed)
        rows = self.some_rows(budget, seed)
        # At least 50 steps where there are rows for them.
        batch = min(max(1, len(rows) // 50), 8)
        rows = rows[: len(rows) // batch * batch]
        self.model.set_weights(weights)
        if pattern is None:
            found = fit_dense(self.model, rows, batch, rate)
        else:
            found = fit_sparse(
                self.model, self.teacher, pattern, start, rows, batch, rate
            )
        perplexity = self.perplexity(self.model.get_weights(), texts)
        return {**found, "perplexity": perplexity}

    def some_rows(self, budget, seed):
        import numpy as np

        count = max(1, round(budget * self.weights / LENGTH))
        # The last rows are those of the one-shot starts.
        return np.random.default_rng(seed).permutation(self.rows[:-128])[:count]

    def perplexity(self, weights, texts, model=None):
        import keras_weightmods as kwm

        measure = self.measure
        if model is not None:
            measure = kwm.Perplexity(model, batch_size=64)
        else:
            self.judge.set_weights(weights)
        return {
            name: measure(self.texts[name], name, verbose=0) for name in texts
        }


def fit_dense(model, rows, batch, rate):
    """Train by Adam on the cross-entropy alone."""
    import keras

    steps = len(rows) // batch
    model.compile(
        keras.optimizers.Adam(
            quality.schedule(rate, steps), global_clipnorm=1.0
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    history = quality.fit(model, rows[: steps * batch], batch_size=batch)
    return about(rows, batch, rate, history)


def fit_sparse(model, teacher, pattern, start, rows, batch, rate):
    """Train by CAST with the library's recipe for this start."""
    import keras_weightmods as kwm

    steps = len(rows) // batch
    recipe = ("dense",)
    if start == "one-shot":
        recipe = ("sparsegpt", ("swaps", "blocks"))
    recipe = kwm.CAST.default_recipe(*recipe) | {
        "learning_rate": quality.schedule(rate, steps)
    }
    cast = kwm.CAST(model, pattern, teacher=teacher)
    cast.compile(kwm.AdamS(total_steps=steps, pattern=pattern, **recipe))
    history = quality.fit(cast, rows, batch_size=batch)
    cast.finalize(verbose=0)
    kwm.assert_sparse(model, pattern)
    return about(rows, batch, rate, history)


def about(rows, batch, rate, history):
    return {
        "rate": float(f"{rate:.3g}"),
        "tokens": len(rows) * LENGTH,
        "batch": batch,
        "train_loss": history.history["loss"][-1],
    }


def kernel_weights(model):
    import keras_weightmods as kwm

    kernels = (target.variable for target in kwm.find_targets(model))
    return sum(math.prod(kernel.shape) for kernel in kernels)


def save(file, model):
    import numpy as np

    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, *model.get_weights())


def load(file):
    import numpy as np

    with np.load(file) as arrays:
        return [arrays[name] for name in arrays.files]


if __name__ == "__main__":
    main()
