"""Parts of the page of results: LIFT, signatures, merging, companders."""

import numpy as np

from benchmarks import lift_quality as lift
from benchmarks import rws_quality as rws
from benchmarks.compander_quality import MEASURES, effects_of
from benchmarks.merge_command import HEADER, rows_of
from benchmarks.pages.tables import mean, megabytes, missing, table


def lift_quality(log):
    if "kind" not in log["runs"][0]:
        # The form of an older program.
        return missing("lift_quality")
    setting, found = log["setting"], lift.summary(log)
    machine = log["machine"]["cpu"]
    others = {run.get("cpu", machine) for run in log["runs"]} - {machine}
    names = [name for name in found if name != "before"]
    rows = []
    for name, row in found.items():
        rate = f"{row['rate']:.2g}" if row["rate"] else ""
        cells = [name, rate, len(row["seeds"])]
        for measure, (form, factor) in lift.MEASURES.items():
            cells.append(mean([factor * v for v in row[measure]], form))
        if name != "before":
            cells += [
                f"{row['trained']:,}",
                megabytes(row["optimizer_bytes"]),
                megabytes(row["peak_bytes"]),
                "" if row["step"] is None else f"{row['step']:.2f}",
                f"{row['file_bytes'] / 1e6:.1f}",
                f"{row['file_bytes'] / (2 * row['stored']):.2f}",
                row["tried"],
            ]
        rows.append(cells + [""] * (15 - len(cells)))
    differences = []
    compared = {
        (base, measure): lift.effects(found, base, measure)
        for base in lift.BASES
        for measure in lift.DIFFERENCES
    }
    for name in names:
        cells = [name]
        for (_, measure), effects in compared.items():
            form, factor = lift.MEASURES[measure]
            if name in effects:
                value, low, high = (factor * v for v in effects[name])
                ends = f"{low:+{form}} to {high:+{form}}"
                cells.append(f"{value:+{form}} ({ends})")
            else:
                cells.append("")
        differences.append(cells)
    header = " | ".join(f"{measure} less {base}" for base, measure in compared)
    parts = [
        "SmolLM2-135M-Instruct on the word problems of `reasoning-gym`: "
        f"{setting['steps']} steps of {setting['batch']} problems of at most "
        f"{setting['length']} tokens from 47 of its 85 templates. Solved: % of "
        f"{setting['test']} new problems from these, unseen: % of "
        f"{setting['unseen']} from the others, greedy, by the package's "
        f"scorer; losses on {setting['valid']} of each; forgotten: rise of "
        f"the loss on {' and '.join(lift.TEXTS)}, nats a token. Mean and "
        "spread over the seeds, each with its own problems. The rate of each "
        "method is the best of those tried by the validation loss after "
        f"{setting['search_steps']} steps, with a worse one on both sides, or "
        "the half of it where that solved more, on all seeds (it is tried on "
        "one); rows with another rate show what that does. A step is seconds "
        "of the processor, on the first machine; x LoRA is the file over a "
        "LoRA in bfloat16 of as many numbers as were changed. "
        f"{setting['backend']}, {setting['dtype']}, "
        f"{', some runs '.join([machine, *sorted(others)])}.",
        table(
            "method | rate | seeds | solved, % | unseen, % | loss | "
            "unseen loss | forgotten | trained | state, MB | peak, MB | "
            "step, s | file, MB | x LoRA | tried",
            rows,
        ),
        "Not shown, as the best rate has not been searched or trained with: "
        f"{', '.join(n for n in lift.METHODS if n not in found) or 'none'}.",
        "Other rates, on the first seed: "
        + (
            "; ".join(
                f"{name} at {rate:.2g} solved {100 * solved:.1f} % (at its own "
                f"rate {100 * own:.1f})"
                for name, rate, solved, own in lift.tried_once(log, found)
            )
            or "none"
        )
        + ".",
        "Differences, paired by seed, with intervals of 95 %: of solved by "
        "the noise of all methods, else by the seeds of the pair (t).",
        table(f"method | {header}", differences),
        "On the front of solved against forgotten: "
        f"{', '.join(lift.front(found))}.",
        "\n".join(f"- {line}" for line in lift.verdicts(found)),
    ]
    if lift.PLOT.exists():
        parts.append(f"![Solved against forgotten]({lift.PLOT.name})")
    return "\n\n".join(parts)


def lift_step(log):
    rows = []
    for backend, found in log["backends"].items():
        for method, memory in found.get("memory", {}).items():
            seconds = found.get("medians", {}).get(method)
            ratio = found["ratio_with_refresh"] if method == "LIFT" else 1
            rows.append(
                [
                    backend,
                    method,
                    f"{memory['trained']:,}",
                    "" if seconds is None else f"{seconds:.2f}",
                    "" if seconds is None else f"{ratio:.2f}",
                    megabytes(memory["state_bytes"]),
                    megabytes(memory["peak_bytes"]),
                ]
            )
    return "\n\n".join(
        [
            "A whole train step of SmolLM2-135M's shapes, "
            f"{' x '.join(map(str, log['batch']))} tokens, {log['dtype']}; a "
            "refresh of the masks every 200 steps is counted in the ratio; "
            f"{log['machine']['cpu']}, {log['machine']['cores']} cores.",
            table(
                "backend | method | trained | seconds | x AdamW | "
                "state, MB | peak, MB",
                rows,
                text_columns=2,
            ),
        ]
    )


def lift_large(log):
    rows = []
    for backend, found in log["backends"].items():
        if "masks" not in found:
            # The form of an older program.
            return missing("lift_large")
        for criterion, row in found["masks"].items():
            rows.append(
                [
                    *(backend, criterion, found["kernels"]),
                    f"{row['first_masks']:.1f}",
                    f"{row['refresh']:.1f}" if row["refresh"] else "",
                    f"{row['file_bytes'] / 1e6:.1f}",
                    *(f"{row[k]:.2f}" for k in ("index_bits", "x_lora")),
                    *(f"{row[k]:.2f}" for k in ("write", "apply", "read")),
                    f"{row['read_mb_s']:.0f}",
                ]
            )
    return "\n\n".join(
        [
            f"A Gemma 3 of the shapes of its 270M, {log['density']:.0%} of "
            "its kernels. First masks: in a process that has compiled nothing. "
            "The file holds normal changes in the masks of weights at random, "
            "of which nothing can be told; places drawn at random are drawn "
            "again from a seed. x LoRA is its size over that of a bfloat16 "
            "LoRA of as many numbers. Of trained changes see above. "
            f"{log['machine']['cpu']}, {log['machine']['cores']} cores.",
            table(
                "backend | masks | kernels | first masks, s | refresh, s | "
                "file, MB | bits a place | x LoRA | written in, s | "
                "applied in, s | read in, s | MB/s",
                rows,
                text_columns=2,
            ),
        ]
    )


def principal_mask(log):
    parts = []
    rows = [
        [
            backend,
            rank,
            len(same),
            f"{min(row['default'] for row in same):.4f}",
            *(
                f"{np.median([row[name] for row in same]):.4f}"
                for name in ("default", "randomized", "magnitude")
            ),
        ]
        for backend, found in log["backends"].items()
        for rank in sorted({r["rank"] for r in found.get("agreement", [])})
        for same in [[r for r in found["agreement"] if r["rank"] == rank]]
    ]
    if rows:
        parts.append(
            f"Share of the exact rule's {log['density']:.0%} that others find "
            "in SmolLM2-135M's matrices; medians beside the least."
        )
        header = "backend | rank | matrices | least | median"
        parts.append(table(f"{header} | randomized SVD | magnitude", rows))
    rows = [
        [
            backend,
            f"{exact:.1f}",
            f"{fast:.2f}",
            f"{found['time']['ratio']:.1f}",
            f"{found['time']['share']:.4f}",
        ]
        for backend, found in log["backends"].items()
        if "time" in found
        for exact, fast in [
            [
                np.median(found["time"]["seconds"][name])
                for name in ("exact", "auto")
            ]
        ]
    ]
    if rows:
        parts.append(
            "One selection in a random matrix of 4096 x 4096 at rank 128, "
            f"seconds; {log['machine']['cpu']}, {log['machine']['cores']} "
            "cores."
        )
        header = "backend | exact SVD | default | ratio | share"
        parts.append(table(header, rows))
    return "\n\n".join(parts)


def rws_quality(log):
    if "cosines" not in log:
        return missing("rws_quality")
    found = rws.by_seed(log["rows"])
    corruptions = dict.fromkeys(row["corruption"] for row in log["rows"])
    statistics = (
        "Moving statistics go half of the way, or as the row says."
        if log["statistics"] == "average"
        else "Moving statistics are kept where the row does not say otherwise."
    )
    parts = [
        f"MNIST and Fashion-MNIST at 16 x 16; {', '.join(corruptions)}, each "
        f"at five severities on {log['test_images']} test images. Share of "
        "the gap between the clean model and the one trained on corrupted "
        "images that is closed, accuracy on corrupted images, and on clean "
        "ones less that of the model patched; means over data sets and "
        f"corruptions. {statistics} Intervals of 95 % "
        f"over seeds (t). {log['epochs']} epochs; {log['backend']}, "
        f"{log['machine']}."
    ]
    for net, sizes in log["bytes"].items():
        rows = [
            [
                claim,
                name,
                rws.cell(each["share"]),
                rws.cell(each["corrupted"]),
                rws.cell(each["on_clean"]),
                f"{sizes['model'] / sizes[name]:.1f}" if name in sizes else "",
            ]
            for claim, names in (
                ("ends", ("clean", "robust", "continued")),
                *rws.CLAIMS,
            )
            for name in names
            if (each := found.get((net, name)))
        ]
        seeds = len(found[net, "clean"]["share"])
        parts += [
            f"{net}, {seeds} seed{'s' * (seeds > 1)}:",
            table(
                "claim | model | of the gap | corrupted | on clean | "
                "times smaller",
                rows,
                2,
            ),
        ]
        cosines = rws.cosine_rows(log["cosines"])[net]
        parts.append(
            "Discriminative: cosine of the signatures from the two data sets, "
            f"of the same corruption {rws.cell(cosines['own'])}, of different "
            f"ones {rws.cell(cosines['other'])}; the nearest is that of the "
            f"same corruption in {rws.cell(cosines['found'])}."
        )
    if rws.PICTURE.exists():
        parts.append(f"![Cosines of signatures]({rws.PICTURE.name})")
    return "\n\n".join(parts)


def signature_text(log):
    given, seeds = log["arguments"], list(log["seeds"].values())
    noises = "clean", "typos", "spaces"
    rows = []
    for model in seeds[0]:
        row = [model]
        for noise in noises:
            row.append(rws.cell([seed[model][noise] for seed in seeds]))
        for noise in noises[1:]:
            less = [
                seed[model][noise] - seed["clean model"][noise]
                for seed in seeds
            ]
            row.append(rws.cell(less))
        rows.append(row)
    return "\n\n".join(
        [
            "all-MiniLM-L6-v2 with a linear head says which source a sentence "
            f"is from, after {given['epochs']} epochs on {given['texts']}; "
            f"accuracy on {given['test_texts']} others, as they are and with "
            f"noise at {given['rate']:g} of the letters. Patches of the first "
            f"{given['blocks']} of 6 blocks. Mean of {len(seeds)} seeds with "
            "intervals of 95 % (t), differences paired by seed; "
            f"{given['backend']}.",
            table(
                "model | clean text | typos | spaces | typos less clean model "
                "| spaces less clean model",
                rows,
            ),
        ]
    )


def merging(log):
    rows = [
        [
            *(backend, method),
            f"{each['seconds']:.1f}",
            f"{each['of_copy']:.2f}",
            megabytes(each["peak_bytes"]),
            megabytes(found["imported_bytes"]),
        ]
        for backend, found in log["backends"].items()
        for method, each in found["methods"].items()
    ]
    return "\n\n".join(
        [
            f"Two files of {log['megabytes']} MB into one, where a method has "
            "a base with that file too, on NumPy in one process, without "
            "the other backends, SciPy and pandas, which Keras imports where "
            f"they are. Medians of {log['rounds']} in turn with a copy of one "
            "file that waits for the disk (of one where it takes more than "
            f"{log['enough_seconds']} s); *x copy*: bytes read and written a "
            "second, over the copy's. Beside the peak of the process, "
            "that of one that has imported Keras and the library alone; "
            f"{log['machine']['cpu']}, {log['machine']['cores_used']} of "
            f"{log['machine']['cores']} cores.",
            table(
                "backend | method | seconds | x copy | peak, MB | imports, MB",
                rows,
                text_columns=2,
            ),
        ]
    )


def merge_command(log):
    versions = ", ".join(f"{k} {v}" for k, v in log["versions"].items())
    return "\n\n".join(
        [
            f"Two float32 files of {log['megabytes']} MB into one (and a base "
            "of that size, but for linear and slerp) by the command "
            "line of each, ours and `mergekit-pytorch`: whole commands, with "
            "imports and the same densities; medians of "
            f"{log['rounds']} in turn. {versions}; {log['machine']['cpu']}, "
            f"{log['machine']['cores_used']} of {log['machine']['cores']} "
            "cores.",
            table(" | ".join(HEADER), rows_of(log)),
        ]
    )


def compander_quality(log):
    if "settings" not in log:
        return missing("compander_quality")
    parts = [
        "Conv nets with dropout on Fashion-MNIST, with BatchNormalization "
        "(norm) and without (plain); accuracy on the test images in %, mean "
        "and spread of the seeds. Each method has the same search of rate, "
        "decay and a, on "
        f"{log['held_out']:,} training images held out, in which each has "
        "worse neighbours on both sides; differences are paired by seed, "
        f"with an interval of 95 % (t). {log['optimizer']}; "
        f"{log['backend']}, {log['machine']['cpu']}. 4 bits: the trained "
        "kernels in 15 levels, of one scale a kernel, or one a channel; 2:4: "
        "pruned by magnitude, with no training after it. Peak: the largest "
        "weight over the root mean square.",
    ]
    for name, setting in log["settings"].items():
        rows = [row for row in log["rows"] if row["setting"] == name]
        if not rows:
            continue
        seeds = sorted({len(row["runs"]) for row in rows})
        parts += [
            f"{name}: {setting['images']:,} images, {setting['epochs']} "
            f"epochs in batches of {setting['batch']}, "
            f"{' or '.join(map(str, seeds))} seeds:",
            table(
                "net | method | chosen | accuracy | less plain | less L2 | "
                "4 bits | less L2 | 4 bits a channel | less L2 | 2:4 | "
                "less L2 | peak | tried",
                [_companded(row, rows) for row in rows],
                3,
            ),
        ]
    return "\n\n".join(parts)


def _companded(row, rows):
    cells = [
        row["net"],
        row["method"],
        ", ".join(f"{k} {v:.3g}" for k, v in row["chosen"].items()),
    ]
    for measure in MEASURES:
        cells.append(mean([100 * run[measure] for run in row["runs"]], ".2f"))
        found = {
            base: f"{value:+.2f} ({low:+.2f} to {high:+.2f})"
            for base, (value, low, high) in effects_of(
                row, rows, measure
            ).items()
        }
        if measure == "accuracy":
            cells.append(found.get("plain", ""))
        cells.append(found.get("L2", ""))
    peak = np.mean([run["peak"] for run in row["runs"]])
    return [*cells, f"{peak:.1f}", len(row["tried"])]
