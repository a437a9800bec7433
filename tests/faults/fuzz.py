"""Have `atheris` search for files that are not refused well, by coverage.

KERAS_BACKEND=torch python -m tests.faults.fuzz delta --seconds 600

It begins with the file of `formats` that nobody changed, changes it as
`mutations` does, and goes on from what has reached new code. Files that find
something stay in `build/fuzz`.
"""

import argparse
import contextlib
import os
import pathlib
import random
import sys
import time

import atheris

with atheris.instrument_imports(include=["keras_weightmods"]):
    from tests.faults import formats, mutants, mutations

FOUND = pathlib.Path("build", "fuzz")
MOST = 2**20  # bytes of a file; libFuzzer makes small ones


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=formats.FORMATS)
    parser.add_argument("--seconds", type=float, default=600)
    args = parser.parse_args()
    judge = mutants.Judge(args.kind)
    is_folder = judge.name.endswith(".zip")
    end = time.monotonic() + args.seconds
    found, runs = {}, 0
    # Bytes are changed by libFuzzer, which knows what comparisons ask for.
    mutations.MUTATIONS[""] = lambda data, rng: atheris.Mutate(data, MOST)

    def mutate(data, most, seed):
        rng = random.Random(seed)
        # What is cut or no JSON any more has no parts, but bytes.
        with contextlib.suppress(Exception):
            data = mutations.mutant_of(judge.name, data, rng)
            if rng.random() < 0.5:
                data = mutations.signed(data)
            return data[:most]
        return judge.data if is_folder else atheris.Mutate(data, MOST)

    def read(data):
        nonlocal runs
        runs += 1
        # libFuzzer begins with none.
        _, problem = judge(data or judge.data)
        place = problem and problem.rpartition("(")[2]
        if problem is not None and place not in found:
            found[place] = FOUND / f"{args.kind}-{len(found)}-{judge.name}"
            FOUND.mkdir(parents=True, exist_ok=True)
            found[place].write_bytes(data)
            print(found[place], problem, sep=" | ", flush=True)
        if time.monotonic() > end:
            judge.__exit__()
            print(f"{args.kind}: {runs} files, {len(found)} not refused well")
            sys.stdout.flush()
            os._exit(bool(found))

    corpus = pathlib.Path(judge.folder, "corpus")
    corpus.mkdir()
    (corpus / "honest").write_bytes(judge.data)
    flags = ["-rss_limit_mb=0", "-cross_over=0", f"-max_len={MOST}"]
    arguments = [sys.argv[0], str(corpus), *flags]
    atheris.Setup(arguments, read, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
