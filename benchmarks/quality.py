"""What is left of a real LLM's quality when it is made sparse or rounded.

    python -m benchmarks.quality
    python -m benchmarks.quality --methods CAST,SR-STE --seeds 0,1 --resume
    python -m benchmarks.quality --model gemma3 --methods "int4 to nearest"

Every method trains the model on the same rows, in the same order, for the same
number of tokens. One-shot methods are calibrated on the first rows.
`--self-share` of the rows are text that the dense model wrote itself,
`--documentation-share` docstrings of Python packages, `--source-share` their
code, the others prose. The perplexity is measured on held-out prose and on
three kinds of text that are never trained on: the Python reference, news and
source code. *The* number of a row is the geometric mean of the four over those
of the dense model. Beside it are the mean and the 99.9 % quantile of the
Kullback-Leibler divergence from the dense model per token, in nats. Another
column is the share of positions where both models have the same first token.
The baselines SR-STE (arXiv 2102.04010) and AST (arXiv 2407.20584) live here,
because they are no part of the library.
"""

import math
import os
import pathlib
import platform
import re
import time
import warnings

from benchmarks import harness
from examples.data.prose import UNSEEN, load_rows, model_inputs

TEXTS = ("held_out", *UNSEEN)
MODELS = {
    "smollm2": "SmolLM2-135M-Instruct",
    "gemma3": "Gemma3-270M",
    "qwen_coder": "Qwen2.5-Coder-0.5B-Instruct",
}


def main():
    args = parse_arguments()
    harness.choose_backend(args.backend)
    run(args)


def parse_arguments(arguments=None):
    parser = harness.make_parser(__doc__)
    harness.add_backend(parser, "torch")
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--dtype", default="float32", help="Keras policy")
    parser.add_argument("--methods", help="comma-separated, default: all")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument(
        "--self-share", type=float, default=0.0, help="of self-generated rows"
    )
    parser.add_argument(
        "--documentation-share",
        type=float,
        default=0.0,
        help="of rows of docstrings",
    )
    parser.add_argument(
        "--source-share", type=float, default=0.0, help="of rows of code"
    )
    parser.add_argument(
        "--pattern", default="2:4", help="of one-shot methods and CAST"
    )
    parser.add_argument(
        "--rate", type=float, help="peak learning rate of CAST, for its own"
    )
    parser.add_argument(
        "--batch", type=int, default=1, help="rows of a step of training"
    )
    parser.add_argument(
        "--checkpoint",
        type=pathlib.Path,
        help="folder, to go on from where a long run was killed",
    )
    parser.add_argument(
        "--rows", type=int, default=16, help="of each text, to evaluate on"
    )
    parser.add_argument(
        "--save",
        type=pathlib.Path,
        help="folder for the weights of each row, as `runtimes --sparse` "
        "takes them",
    )
    parser.add_argument(
        "--start",
        type=pathlib.Path,
        help="weights of a one-shot row, that --save has written: what CAST "
        "methods begin with, for the start that their names say",
    )
    harness.add_json(parser, "quality.json")
    parser.add_argument(
        "--resume", action="store_true", help="keep the rows that are there"
    )
    return parser.parse_args(arguments)


def run(args):
    import keras
    import numpy as np

    methods = make_methods(
        args.steps,
        args.pattern,
        start=args.start,
        rate=args.rate,
        batch=args.batch,
        checkpoint=args.checkpoint,
    )
    chosen = args.methods.split(",") if args.methods else list(methods)
    unknown = set(chosen) - set(methods)
    if unknown:
        raise SystemExit(f"unknown: {unknown}; there are {list(methods)}")
    model = load(args.model, args.dtype)
    preprocessor, model.preprocessor = model.preprocessor, None
    dense = model.get_weights()
    texts = load_rows(
        preprocessor.tokenizer,
        args.length + 1,
        **dict.fromkeys(TEXTS, args.rows),
    )
    measure = Measure(model, dict(zip(TEXTS, texts)), make_teacher(model))
    old = harness.read_json(args.json) if args.resume else None
    rows = old["rows"] if old else []
    for seed in map(int, args.seeds.split(",")):
        train = mixed_rows(args, preprocessor.tokenizer, seed)
        for name in chosen:
            if any(r["method"] == name and r["seed"] == seed for r in rows):
                continue
            keras.utils.set_random_seed(seed)
            model.set_weights(dense)
            began = time.monotonic()
            details = methods[name](model, train)
            seconds = time.monotonic() - began
            rows.append(
                {
                    "method": name,
                    "seed": seed,
                    **measure(),
                    "tokens": 0 if details is None else train[:, 1:].size,
                    "seconds": round(seconds, 1),
                    **(details or {}),
                }
            )
            print(rows[-1], flush=True)
            if args.save:
                args.save.mkdir(parents=True, exist_ok=True)
                file = args.save / f"{name} {seed}.npz"
                np.savez(file, *model.get_weights())
            harness.write_json(args.json, report(args, rows))
    print_table(report(args, rows))


def load(name, dtype=None):
    """Load a model of `MODELS`, with its tokenizer."""
    from examples.data import gemma3, qwen_coder, smollm2

    loaders = {
        "smollm2": smollm2.load_smollm2,
        "gemma3": gemma3.load_gemma3,
        "qwen_coder": qwen_coder.load_qwen_coder,
    }
    return loaders[name](dtype)


def mixed_rows(args, tokenizer, seed):
    """Rows of prose, self-generated text, docstrings and code, mixed."""
    import numpy as np

    count, length = args.steps * args.batch, args.length + 1
    (rows,) = load_rows(tokenizer, length, seed=seed + 1, train=count)
    shares = {
        "own": args.self_share,
        "documentation": args.documentation_share,
        "source": args.source_share,
    }
    end = 0
    for kind, share in shares.items():
        start, end = end, end + round(share * count)
        if end == start:
            continue
        if kind == "own":
            found = own_rows(args.model, end, length, seed)
        else:
            limit = {kind: end - start}
            (found,) = load_rows(tokenizer, length, seed=seed + 1, **limit)
        rows[start:end] = found
    return np.random.default_rng(seed).permutation(rows)


def own_rows(name, rows, length, seed):
    """Self-generated rows, kept in a file, as they take minutes."""
    import numpy as np

    import keras_weightmods as kwm

    file = harness.ROOT / f"build/self_generated_{name}_{length}_{seed}.npy"
    if not file.exists() or len(np.load(file)) < rows:
        file.parent.mkdir(exist_ok=True)
        np.save(file, kwm.self_generated(load(name), rows, length, seed=seed))
    return np.load(file)[:rows]


class Measure:
    """The quality of a model on all texts, beside a dense one."""

    def __init__(self, model, texts, dense):
        self.model, self.texts, self.dense = model, texts, dense
        self.dense_perplexity = None

    def __call__(self):
        import numpy as np

        import keras_weightmods as kwm

        measure = kwm.Perplexity(self.model, batch_size=4)
        found = {
            name: measure(rows, name, verbose=0)
            for name, rows in self.texts.items()
        }
        if self.dense_perplexity is None:
            # What the model is before anything is done to it.
            self.dense_perplexity = kwm.Perplexity(self.dense, batch_size=4)
            self.dense_perplexity = {
                name: self.dense_perplexity(rows, name, verbose=0)
                for name, rows in self.texts.items()
            }
        ratios = [found[name] / self.dense_perplexity[name] for name in found]
        tokens = {n: self.divergence(rows) for n, rows in self.texts.items()}
        nats, same = np.concatenate(list(tokens.values())).T
        return {
            "perplexity": found,
            "x_dense": float(np.exp(np.mean(np.log(ratios)))),
            "divergence": {n: float(x[:, 0].mean()) for n, x in tokens.items()},
            "divergence_999": float(np.quantile(nats, 0.999)),
            "same_token": float(same.mean()),
        }

    def divergence(self, rows):
        """KL(dense || model) in nats, and whether both have one first token.

        Returns:
            Array (tokens, 2).
        """
        import numpy as np
        from keras import ops

        found = []
        for row in rows:
            dense, other = (
                ops.log_softmax(ops.cast(each.predict_on_batch(x), "float32"))
                for x in [model_inputs(row[None, :-1])]
                for each in (self.dense, self.model)
            )
            nats = ops.sum(ops.exp(dense) * (dense - other), axis=-1)
            same = ops.equal(ops.argmax(dense, -1), ops.argmax(other, -1))
            both = ops.stack([nats, ops.cast(same, "float32")], axis=-1)
            found.append(ops.convert_to_numpy(both)[0])
        return np.concatenate(found)


def make_methods(steps, pattern="2:4", **settings):
    """{name: function(model, rows) -> details, or None if nothing trains}.

    `pattern` is that of one-shot methods and of CAST. `settings` are those of
    `Cast` for a whole run: `start`, `rate`, `batch` and `checkpoint`.
    """
    methods = {
        "dense": lambda model, train: None,
        "one-shot magnitude": OneShot("magnitude"),
        "one-shot Wanda": OneShot("wanda"),
        "one-shot SparseGPT": OneShot("sparsegpt"),
        "one-shot SparseGPT + swaps": OneShot("sparsegpt", "swaps"),
        "one-shot magnitude + blocks": OneShot("magnitude", "blocks"),
        "one-shot SparseGPT + blocks": OneShot("sparsegpt", "blocks"),
        "one-shot SparseGPT + swaps + blocks": OneShot(
            "sparsegpt", ("swaps", "blocks")
        ),
        "one-shot SparseGPT + swaps + 4-bit": Quantized(
            None, head=False, first=OneShot("sparsegpt", "swaps")
        ),
        "one-shot SparseGPT + swaps + blocks + 4-bit": Quantized(
            None, head=False, first=OneShot("sparsegpt", ("swaps", "blocks"))
        ),
        "one-shot SparseGPT + swaps + blocks + 4-bit blocks": Quantized(
            "blocks",
            head=False,
            first=OneShot("sparsegpt", ("swaps", "blocks")),
        ),
        "16:32 by SparseGPT + swaps + blocks + int4 blocks + scales": Quantized(
            first=OneShot("sparsegpt", ("swaps", "blocks"), "16:32")
        ),
        "int4 to nearest": to_nearest,
        "int4 by GPTQ": Quantized(),
        "int4 by GPTQ + scales": Quantized("scales"),
        "int4 by GPTQ + blocks": Quantized("blocks"),
        "int4 by GPTQ + blocks + scales": Quantized(("blocks", "scales")),
        **{f"Keras {mode}": ByKeras(mode) for mode in ("int8", "int4", "gptq")},
        "int4 by GPTQ + blocks + scales + int8 head": Quantized(
            ("blocks", "scales"), head=False
        ),
        **{f"int{bits}": Quantized(bits=bits) for bits in (2, 3, 5, 6)},
        **{
            f"{size} MB": Quantized(size=f"{size}MB")
            for size in (45, 60, 72, 85, 100)
        },
        "dense fine-tuned": DenseFineTuning(2e-4),
        "fixed magnitude mask": FixedMask(5e-4),
        "SR-STE": StraightThroughTraining(3e-4, pull=2e-4, on_gradient=True),
        "AST": StraightThroughTraining(2e-4, pull=1e-4, on_gradient=False),
        "CAST": Cast(steps),
        "CAST from Wanda": Cast(steps, init="wanda"),
        "CAST from SparseGPT": Cast(steps, init="sparsegpt"),
        "CAST from SparseGPT without distillation": Cast(
            steps, init="sparsegpt", teacher=None
        ),
        "CAST from SparseGPT + free mask": Cast(
            steps, init="sparsegpt", ramp=0.4, criterion="wanda"
        ),
        "CAST from SparseGPT + blocks": Cast(
            steps, init="sparsegpt", init_refine="blocks"
        ),
        "CAST from SparseGPT + blocks + free mask": Cast(
            steps,
            init="sparsegpt",
            init_refine="blocks",
            ramp=0.4,
            criterion="wanda",
        ),
        **recipes_from_blocks(steps),
        "CAST from SparseGPT + eta 2/3": Cast(
            steps, init="sparsegpt", distillation_weight=2 / 3
        ),
        "CAST without distillation": Cast(steps, teacher=None),
        "CAST without scaling": Cast(steps, scaling_groups=0),
        "CAST magnitude criterion": Cast(steps, criterion="magnitude"),
        "CAST as published": Cast(
            steps,
            learning_rate=1e-3,
            decay="published",
            criterion="magnitude",
            ramp=1.0,
        ),
    }
    for method in methods.values():
        if isinstance(method, OneShot | Cast):
            method.pattern = pattern
        if isinstance(method, Cast):
            vars(method).update(settings)
    return methods


def recipes_from_blocks(steps):
    """The recipe from the best start, and what else was tried there."""
    import keras_weightmods as kwm

    name = "CAST from SparseGPT + swaps + blocks"
    start = {"init": "sparsegpt", "init_refine": ("swaps", "blocks")}
    alone = {**start, "distillation_weight": 1.0, "scaling_groups": 0}
    rate = kwm.CAST.default_recipe(**start)["learning_rate"]
    free = {"ramp": 0.4, "criterion": "wanda"}
    found = {
        "": start,
        " + KL alone": alone,
        " + KL alone + scales": {**alone, "scaling_groups": 2},
        " + KL alone + free mask": {**alone, **free},
        " + KL alone + free mask by magnitude": {**alone, "ramp": 0.4},
        " + KL alone + half the rate": {**alone, "learning_rate": rate / 2},
        " + KL alone + twice the rate": {**alone, "learning_rate": 2 * rate},
        " + eta 2/3": {**start, "distillation_weight": 2 / 3},
        " without distillation": {**start, "teacher": None},
    }
    return {name + own: Cast(steps, **kwargs) for own, kwargs in found.items()}


class OneShot:
    """No training; calibrated on the rows that a CAST start is made on."""

    def __init__(self, method, refine=None, pattern="2:4"):
        self.method, self.refine, self.pattern = method, refine, pattern

    def __call__(self, model, train):
        import keras_weightmods as kwm

        data = model_inputs(train[:128, :-1])
        options = {"refine": self.refine, "batch_size": 4, "verbose": 0}
        options |= {"criterion": self.method}
        kwm.sparsify(model, self.pattern, data, **options)
        kwm.assert_sparse(model, self.pattern)


class Quantized:
    """All kernels and the head of a model, rounded to a few bits.

    Without `head` that is rounded to int8. The model is the dense one, or what
    a `OneShot` makes of it first.
    """

    def __init__(
        self, refine=("blocks", "scales"), head=True, first=None, **options
    ):
        self.options = {"refine": refine, "head": head, **options}
        self.first = first

    def __call__(self, model, train):
        import keras_weightmods as kwm

        if self.first:
            self.first(model, train)
        data = model_inputs(train[:, :-1])
        began = time.process_time()
        report = kwm.quantize(model, data, verbose=0, **self.options)
        details = {
            "processor_seconds": round(time.process_time() - began, 1),
            "peak_bytes": harness.peak_bytes(),
            "bits": report.bits,
        }
        packed = kwm.pack(
            model, head="auto" if self.options["head"] else "int8", verbose=0
        )
        kwm.unpack(model, verbose=0)
        if self.first:
            kwm.assert_sparse(model, self.first.pattern)
        return {**details, "bytes": packed.model_bytes}


def to_nearest(model, train):
    """The same without data."""
    import keras_weightmods as kwm

    with warnings.catch_warnings():
        # The warning that `quantize` is better.
        warnings.simplefilter("ignore")
        kwm.pack(model, "int4", head="int4", verbose=0)
    kwm.unpack(model, verbose=0)


class ByKeras:
    """The weights as Keras' own `quantize` rounds them, with float inputs."""

    def __init__(self, mode):
        self.mode = mode

    def __call__(self, model, train):
        import keras
        import numpy as np

        from keras_weightmods.core import keras_compat

        config, copy = None, make_teacher(model)
        if self.mode == "gptq":
            count, size = train.shape
            size = {"num_samples": count, "sequence_length": size}
            config = keras.quantizers.GPTQConfig(train, (), **size)
        with warnings.catch_warnings():
            # Warnings about layers without weights.
            warnings.simplefilter("ignore")
            copy.quantize(self.mode, config=config)
        layers = map(keras_compat.layers_of, (model, copy))
        for layer, rounded in zip(*layers, strict=True):
            for name in keras_compat.quantized_weights(rounded):
                weight = np.multiply(*keras_compat.integers_of(rounded, name))
                keras_compat.stored_variable(layer, name).assign(weight)


class DenseFineTuning:
    """Adam on the cross-entropy alone; the model stays dense."""

    def __init__(self, learning_rate):
        self.learning_rate = learning_rate

    def __call__(self, model, train):
        import keras

        rate = schedule(self.learning_rate, len(train))
        model.compile(
            keras.optimizers.Adam(rate, global_clipnorm=1.0),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        fit(model, train)
        return {"learning_rate": self.learning_rate}


class FixedMask(DenseFineTuning):
    """One-shot magnitude, its mask fixed, distillation, Adam."""

    def __call__(self, model, train):
        import keras

        import keras_weightmods as kwm

        teacher = make_teacher(model)
        kwm.SemiStructuredSparse.attach(model, frozen=True)
        rate = schedule(self.learning_rate, len(train))
        optimizer = keras.optimizers.Adam(rate, global_clipnorm=1.0)
        distil(model, teacher, optimizer, train)
        kwm.SemiStructuredSparse.detach(model)
        kwm.assert_sparse(model)
        return {"learning_rate": self.learning_rate}


class StraightThroughTraining:
    """SR-STE and AST: a masked forward with gradients straight through.

    Both pull the masked weights to zero by `pull * w`. SR-STE adds it to the
    gradient, before Adam's moments. AST adds it after the first moment, with a
    strength that rises over the first half of the run.
    """

    def __init__(self, learning_rate, pull, on_gradient):
        self.learning_rate = learning_rate
        self.pull = pull
        self.on_gradient = on_gradient

    def __call__(self, model, train):
        import keras

        import keras_weightmods as kwm
        from keras_weightmods import ops as kwm_ops
        from keras_weightmods.core import seam
        from keras_weightmods.core.reparameterization import Reparameterization

        class StraightThrough(Reparameterization):
            finish = "fold"

            def create_parameters(self, add_weight):
                add_weight(
                    name="mask",
                    shape=self.target.shape,
                    initializer="ones",
                    trainable=False,
                )

            def refresh(self):
                target = self.target
                mask = kwm_ops.nm_mask(
                    target.variable.value.detach(),
                    "2:4",
                    target.contraction_axes,
                )
                self.parameters[0].assign(mask)

            def effective(self, stored):
                stored = keras.ops.convert_to_tensor(stored)
                masked = stored * self.parameters[0].value
                return stored + (masked - stored).detach()

        items = [StraightThrough(t) for t in kwm.find_targets(model)]
        teacher = make_teacher(model)
        seam.attach(model, items)

        class Refresh(keras.callbacks.Callback):
            def on_train_batch_begin(self, batch, logs=None):
                if batch % 10 == 0:
                    for item in items:
                        item.refresh()

        masks = {id(i.target.variable): i.parameters[0].value for i in items}
        optimizer = make_pulled_adam(
            schedule(self.learning_rate, len(train)),
            masks,
            self.pull,
            self.on_gradient,
            len(train) // 2,
        )
        distil(model, teacher, optimizer, train, [Refresh()])
        for item in items:
            item.refresh()
        seam.fold(model, StraightThrough)
        kwm.assert_sparse(model)
        return {"learning_rate": self.learning_rate, "pull": self.pull}


def make_pulled_adam(rate, masks, pull, on_gradient, ramp_steps):
    """Adam with a pull on masked weights, in place, for torch."""
    import keras
    import torch

    class PulledAdam(keras.optimizers.Adam):
        @torch.no_grad()
        def update_step(self, gradient, variable, learning_rate):
            index = self._get_variable_index(variable)
            w = variable.value.data
            mu = self._momentums[index].value.data
            v = self._velocities[index].value.data
            t = int(self.iterations)
            mask = masks.get(id(variable))
            if mask is not None and on_gradient:
                gradient = gradient + pull * w * (1 - mask)
            mixed = mu.lerp_(gradient, 0.1)
            v.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
            if mask is not None and not on_gradient:
                strength = pull * min(1.0, t / ramp_steps)
                mixed = mu + strength * w * (1 - mask)
            root = (v / (1 - 0.999 ** (t + 1))).sqrt_().add_(1e-8)
            rate = float(keras.ops.convert_to_numpy(learning_rate))
            w.addcdiv_(mixed, root, value=-rate / (1 - 0.9 ** (t + 1)))

    return PulledAdam(rate, global_clipnorm=1.0)


class Cast:
    """The library's CAST; without arguments, its default recipe.

    `start` is a file of weights made as in `init`. `rate` is another peak of
    the learning rate, and `batch` the rows of a step. `checkpoint` is the
    folder of a run that may be killed.
    """

    start = rate = checkpoint = None
    pattern, batch = "2:4", 1

    def __init__(
        self,
        steps,
        teacher="self",
        scaling_groups=2,
        init="dense",
        init_refine=None,
        distillation_weight=1 / 3,
        **recipe,
    ):
        self.steps = steps
        self.settings = {
            "teacher": teacher,
            "scaling_groups": scaling_groups,
            "init": init,
            "init_refine": init_refine,
            "distillation_weight": distillation_weight,
        }
        self.recipe = recipe

    def __call__(self, model, train):
        import keras_weightmods as kwm

        settings = dict(self.settings)
        if self.start:
            settings |= {"init": "dense", "init_refine": None}
            if settings["teacher"] == "self":
                settings["teacher"] = make_teacher(model)
            harness.load_weights(model, self.start)
        cast = kwm.CAST(model, self.pattern, **settings)
        recipe = {
            **kwm.CAST.default_recipe(
                self.settings["init"],
                self.settings["init_refine"],
                cast.targets,
            ),
            **self.recipe,
        }
        if self.rate:
            recipe["learning_rate"] = self.rate
        if self.recipe or self.start or self.rate:
            peak = recipe.pop("learning_rate")
            optimizer = kwm.AdamS(
                schedule(peak, self.steps),
                total_steps=self.steps,
                pattern=self.pattern,
                **recipe,
            )
            cast.compile(optimizer)
            recipe["learning_rate"] = peak
        else:
            cast.compile()
        callbacks = [kwm.SparsityMonitor()]
        if self.checkpoint:
            callbacks.append(kwm.Checkpoint(self.checkpoint, save_freq=200))
        history = fit(cast, train, callbacks, self.batch)
        scales = [
            v.numpy() if hasattr(v, "numpy") else v
            for v in cast.trainable_variables
            if v.name == "kernel_scale"
        ]
        spread = float(sum(s.std() for s in scales) / max(1, len(scales)))
        cast.finalize()
        kwm.assert_sparse(model, self.pattern)
        return {
            "largest_masked": history.history["largest_masked"][-1],
            "kept_share": history.history["kept_share"][-1],
            "scale_spread": round(spread, 4),
            "settings": self.settings,
            "start": self.start and self.start.name,
            "recipe": recipe,
            "rows_per_step": self.batch,
        }


def schedule(peak, steps):
    from keras_weightmods.calibration.schedule import WarmupLinearDecay

    return WarmupLinearDecay(peak, max(1, steps // 10), steps)


def make_teacher(model):
    """A copy of the model, since a Distiller freezes its teacher."""
    backbone = type(model.backbone).from_config(model.backbone.get_config())
    teacher = type(model)(backbone=backbone, preprocessor=None)
    teacher.set_weights(model.get_weights())
    return teacher


def distil(model, teacher, optimizer, train, callbacks=()):
    """Keras' Distiller, with CAST's default weight and loss.

    The Distiller's own loss takes the softmax in the compute dtype, which
    makes training in bfloat16 diverge.
    """
    import keras

    from keras_weightmods.sparsity.distillation import LogitsKL

    class LogitsDistillation(keras.distillation.LogitsDistillation):
        def compute_loss(self, teacher_outputs, student_outputs, **kwargs):
            return LogitsKL()(teacher_outputs, student_outputs)

    distiller = keras.distillation.Distiller(
        teacher,
        model,
        LogitsDistillation(),
        student_loss_weight=2 / 3,
    )
    distiller.compile(
        optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    fit(distiller, train, callbacks)


def fit(model, train, callbacks=(), batch_size=1):
    return model.fit(
        model_inputs(train[:, :-1]),
        train[:, 1:],
        batch_size=batch_size,
        verbose=0,
        shuffle=False,
        callbacks=list(callbacks),
    )


def report(args, rows):
    import keras
    import keras_hub

    kinds = r"dense|int\d|Keras|\d+ MB$|16:32"
    dense = all(re.match(kinds, row["method"]) for row in rows)
    return {
        "model": f"{MODELS[args.model]}, all kernels of its blocks"
        + (", and the head" if dense else f", {args.pattern}"),
        "machine": f"{harness.cpu()}, "
        f"{os.environ.get('OMP_NUM_THREADS', len(os.sched_getaffinity(0)))} of "
        f"{os.cpu_count()} cores",
        "python": platform.python_version(),
        "keras": keras.__version__,
        "keras_hub": keras_hub.__version__,
        "backend": args.backend,
        "dtype": args.dtype,
        "steps": args.steps,
        "tokens_per_step": args.batch * args.length,
        "self_share": args.self_share,
        "documentation_share": args.documentation_share,
        "source_share": args.source_share,
        "evaluated_rows": args.rows,
        "rows": rows,
    }


def print_table(results):
    import numpy as np

    table = harness.table(
        f"{results['model']}, {results['steps']} steps of "
        f"{results['tokens_per_step']} tokens",
        text=["method"],
        numbers=(
            *TEXTS,
            *("x dense", "nats", "99.9 %", "same token", "MB", "seeds", "time"),
        ),
    )
    by_method = {}
    for row in results["rows"]:
        by_method.setdefault(row["method"], []).append(row)
    for name, rows in by_method.items():
        ratios = [row["x_dense"] for row in rows]
        spread = f" +- {np.std(ratios):.2f}" if len(rows) > 1 else ""
        table.add_row(
            name,
            *(
                f"{np.mean([row['perplexity'][text] for row in rows]):.1f}"
                for text in TEXTS
            ),
            f"{math.exp(np.mean(np.log(ratios))):.2f}{spread}",
            f"{np.mean([list(r['divergence'].values()) for r in rows]):.2f}",
            *(
                form.format(scale * np.mean([row[key] for row in rows]))
                if key in rows[0]
                else ""
                for key, form, scale in (
                    ("divergence_999", "{:.1f}", 1),
                    ("same_token", "{:.1%}", 1),
                    ("bytes", "{:.1f}", 1e-6),
                )
            ),
            str(len(rows)),
            f"{np.mean([row['seconds'] for row in rows]):.0f} s",
        )
    harness.print_all(
        table,
        f"{results['machine']}, {results['backend']}, {results['dtype']}, "
        f"Keras {results['keras']}",
        width=120,
    )


if __name__ == "__main__":
    main()
