"""One run of lift_quality.py: a model fine-tuned by a method, and measured."""

import dataclasses
import math
import statistics
import time
from collections import Counter

from benchmarks import harness

TEXTS = ("reference", "news")


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to fine-tune, and the rate that its search begins at."""

    rate: float
    criterion: str | None = None
    density: float = 0.05
    lora: str | None = None
    targets: str | None = None


METHODS = {
    "full": Method(1.28e-4),
    "LoRA": Method(3.2e-3, lora="LoRA"),
    "rsLoRA": Method(1.6e-3, lora="rsLoRA"),
    "random 5 %": Method(1.6e-3, "random"),
    "largest 1 %": Method(3.2e-3, "magnitude", 0.01),
    "largest 5 %": Method(1.6e-3, "magnitude"),
    "smallest 5 %": Method(1.6e-3, "smallest"),
    "gradient 5 %": Method(1.6e-3, "gradient"),
    "LIFT 1 %": Method(3.2e-3, "principal", 0.01),
    "LIFT 5 %": Method(1.6e-3, "principal"),
    "LIFT 5 % MLP": Method(1.6e-3, "principal", targets="feedforward"),
    # Half of the numbers each.
    "LIFT + LoRA": Method(1.6e-3, "principal", 0.025, lora="LoRA"),
}


class Worker:
    """One run, in a process of its own."""

    def __init__(self, args, seed):
        import keras

        from examples.finetune_lift import load_model

        keras.utils.set_random_seed(seed)
        self.args, self.seed = args, seed
        self.model = load_model(dtype=args.dtype)

    def __call__(self, method, rate, is_search):
        """Return what was measured, after a training if there is a method."""
        began, result = time.process_time(), {}
        if method:
            result = self.train(method, rate, is_search)
        if is_search:
            result["valid"] = self.loss(self.problems("valid", self.args.valid))
        else:
            result |= self.test()
        return {**result, "seconds": time.process_time() - began}

    def problems(self, split, count):
        from examples.data.gsm_symbolic import make_problems

        return make_problems(split, count, self.seed, self.is_short)

    def is_short(self, problem):
        from examples.data.word_problems import prompt_of

        texts = prompt_of(problem.question), f" {problem.answer}"
        # One more for the end; a row has one token more than it has inputs.
        return (
            sum(map(len, map(self.model.tokenizer, texts))) <= self.args.length
        )

    def rows(self, problems):
        from examples.data.word_problems import encode

        pairs = [(each.question, each.answer) for each in problems]
        return encode(pairs, self.model.tokenizer, self.args.length + 1)

    def train(self, method, rate, is_search):
        import keras

        import keras_weightmods as kwm
        from benchmarks.lift_step import enable_lora
        from examples.finetune_lift import (
            fit_arguments,
            learning_rate_schedule,
        )

        args, model = self.args, self.model
        steps = args.search_steps if is_search else args.steps
        rows = self.rows(self.problems("train", steps * args.batch))
        # The values of LIFT's authors, for all methods.
        adam = {
            "learning_rate": learning_rate_schedule(rate, steps),
            "weight_decay": 0.0,
            "beta_2": 0.95,
            "epsilon": 1e-6,
        }
        callbacks, result = [make_clock()], {}
        if method.lora:
            kernels = [target.variable for target in kwm.find_targets(model)]
            rank = enable_lora(model, method.density, method.lora == "rsLoRA")
            result["lora_rank"] = rank
            for kernel in kernels:
                kernel.trainable = method.criterion is not None
        optimizer = keras.optimizers.AdamW
        if method.criterion:
            optimizer = kwm.SparseAdamW
        model.compile(
            optimizer=optimizer(**adam),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        if method.criterion:
            data = fit_arguments(
                {k: v[: 4 * args.batch] for k, v in rows.items()}
            )
            callbacks.append(
                make_masks(model, method, steps, self.seed, (*data.values(),))
            )
        model.fit(
            **fit_arguments(rows),
            batch_size=args.batch,
            shuffle=False,
            verbose=0,
            callbacks=callbacks,
        )
        if is_search:
            return result
        result["optimizer_bytes"] = harness.nbytes(model.optimizer.variables)
        result["peak_bytes"] = harness.peak_bytes()
        result["step"] = statistics.median(callbacks[0].seconds[1:])
        return result | self.store(method)

    def store(self, method):
        """Return the bytes of a file of the change; LoRA is merged then."""
        import keras
        from safetensors.numpy import save

        import keras_weightmods as kwm

        model, stored = self.model, Counter()
        if method.lora:
            factors = {
                str(place): keras.ops.convert_to_numpy(v).astype("float16")
                for place, v in enumerate(model.trainable_variables)
                if v.name.startswith("lora_")
            }
            count = sum(factor.size for factor in factors.values())
            stored.update(
                trained=count, stored=count, file_bytes=len(save(factors))
            )
        if method.criterion or not method.lora:
            stored.update(self.store_delta(model, method))
        if method.lora:
            kwm.merge_lora(model)
        return dict(stored)

    def store_delta(self, model, method):
        """Return the bytes of a delta of all but the factors of LoRA."""
        import keras_weightmods as kwm
        from examples.finetune_lift import load_model

        variables = model.trainable_variables
        count = sum(math.prod(v.shape) for v in variables)
        if method.criterion:
            optimizer = model.optimizer
            count = sum(
                len(optimizer.indices_of(v)) for v in optimizer.masked_variables
            )
        bare = load_model(dtype=self.args.dtype)
        base = bare.get_weights()
        if method.lora:
            pairs = zip(*map(kwm.find_targets, (bare, model)), strict=True)
            for to, of in pairs:
                to.variable.assign(of.variable)
            model = bare
        file = self.args.json.with_suffix(".safetensors")
        patch = kwm.Patch.from_models(model, base, verbose=0)
        report = patch.save(file, verbose=0)
        file.unlink()
        return {
            "trained": count,
            # More, where the masks were chosen again.
            "stored": report.entries,
            "file_bytes": report.nbytes,
        }

    def test(self):
        """Return all that is measured on a model that is trained."""
        import keras_weightmods as kwm
        from examples.data.prose import load_rows

        args, model, found = self.args, self.model, {}
        model.compile(sampler="greedy")
        kwm.compile_generate(model)
        for name, split in (("", "test"), ("unseen_", "unseen")):
            problems = self.problems(split, getattr(args, split))
            found[f"{name}loss"] = self.loss(problems[: args.valid])
            found[name.strip("_") or "solved"] = self.solved(problems)
        kwm.uncompile_generate(model)
        perplexity = kwm.Perplexity(model, batch_size=4)
        texts = load_rows(
            model.tokenizer, 257, **dict.fromkeys(TEXTS, args.text_rows)
        )
        for name, rows in zip(TEXTS, texts):
            found[name] = math.log(perplexity(rows, name, verbose=0))
        return found

    def loss(self, problems):
        from examples.finetune_lift import Measure

        return Measure(self.model, self.rows(problems))()["loss"]

    def solved(self, problems, size=64):
        """Return the share of problems that the model solves by itself."""
        import numpy as np

        from examples.data.gsm_symbolic import is_solved
        from examples.data.word_problems import prompt_of

        model = self.model
        tokenizer, end = model.tokenizer, model.tokenizer.end_token_id
        prompts = [tokenizer(prompt_of(each.question)) for each in problems]
        # Prompts of like lengths together: less is done one token a time.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        solved = 0
        for start in range(0, len(order), size):
            part = order[start : start + size]
            # An end in the places to write at would stop it at once.
            tokens = np.full(
                (len(part), self.args.length), tokenizer.pad_token_id, "int32"
            )
            mask = np.zeros(tokens.shape, bool)
            for row, place in enumerate(part):
                tokens[row, : len(prompts[place])] = prompts[place]
                mask[row, : len(prompts[place])] = True
            out = model.generate(
                {"token_ids": tokens, "padding_mask": mask},
                stop_token_ids=[end],
            )
            written = np.array(out["token_ids"])
            for row, place in enumerate(part):
                text = written[row, len(prompts[place]) :]
                ends = np.flatnonzero(text == end)
                text = text[: ends[0]] if len(ends) else text
                text = tokenizer.detokenize([int(i) for i in text])
                solved += is_solved(str(text), problems[place])
        return solved / len(problems)


def make_masks(model, method, steps, seed, data=None):
    """Return the callback that chooses what a method trains.

    `data` is the batch that gradients are taken on, where they choose.
    """
    import keras

    import keras_weightmods as kwm

    targets = all_targets = kwm.find_targets(model)
    density = method.density
    if method.targets:
        targets = kwm.find_targets(model, include=method.targets)
        # The same total as for all kernels.
        density *= entries(all_targets) / entries(targets)
    smallest = method.criterion == "smallest"
    masks = kwm.PrincipalMaskCallback(
        density=density,
        criterion="magnitude" if smallest else method.criterion,
        refresh_every=-(-steps // 2)
        if method.criterion == "principal"
        else None,
        targets=targets,
        also_train="lora" if method.lora else None,
        seed=seed,
        data=data if method.criterion == "gradient" else None,
    )
    if smallest:
        # `fit` keeps the masks that are there.
        masks.attach(model)
        optimizer = model.optimizer
        optimizer.set_masks(
            (
                smallest_entries(
                    keras.ops.convert_to_numpy(variable),
                    len(optimizer.indices_of(variable)),
                )
                for variable in optimizer.masked_variables
            ),
            0,
        )
    return masks


def entries(targets):
    return sum(math.prod(target.shape) for target in targets)


def smallest_entries(kernel, count):
    """Return the places of the smallest |w| in a flattened kernel, rising."""
    import numpy as np

    places = np.argpartition(np.abs(kernel).ravel(), count - 1)[:count]
    return np.sort(places).astype("int32")


def make_clock():
    import keras

    class Clock(keras.callbacks.Callback):
        """The processor's seconds from one batch to the next."""

        def on_train_begin(self, logs=None):
            self.seconds, self.began = [], time.process_time()

        def on_train_batch_end(self, batch, logs=None):
            now = time.process_time()
            self.seconds.append(now - self.began)
            self.began = now

    return Clock()
