"""Read files that were changed at random; each ends in one clean error.

KERAS_BACKEND=torch python -m tests.faults.mutants --count 20000

`formats.FORMATS` has the files and what reads them, `mutations.MUTATIONS` how
they are changed. A file may be read, because not every change matters, or
refused by an error that a `raise` of this package raises. This may take
`MORE_SECONDS` and `MORE_MEMORY` beyond the unchanged file.

A mutant is made again by its number: `--kind model --first 123 --count 1`.
"""

import argparse
import faulthandler
import os
import pathlib
import random
import re
import sys
import tempfile
import time
import warnings

from tests.faults import formats, mutations, raised

MORE_SECONDS = 1.0  # of this process' own time
MORE_MEMORY = 50 * 2**20  # the files are small
# A reader that hangs in C code is not interrupted: the process ends.
MOST_WAITED = 120
# Nothing there waits for a disk.
FOLDER = "/dev/shm" if os.path.isdir("/dev/shm") else None


class Cost:
    """The time and the memory that a scope takes, of Linux."""

    def __enter__(self):
        pathlib.Path("/proc/self/clear_refs").write_text("5")
        self._before = self._kilobytes("VmRSS")
        self._start = time.process_time()
        return self

    def __exit__(self, *error):
        self.seconds = time.process_time() - self._start
        self.bytes = 1024 * (self._kilobytes("VmHWM") - self._before)

    @staticmethod
    def _kilobytes(name):
        status = pathlib.Path("/proc/self/status").read_text()
        return int(re.search(rf"^{name}:\s*(\d+)", status, re.MULTILINE)[1])


class Judge:
    """Read the bytes of a format; a context manager.

    Args:
        kind: String, of `formats.FORMATS`.

    Attributes:
        name: String, of a file of the format.
        data: Bytes, of one that nobody changed.
        folder: String, of what is read.
    """

    def __init__(self, kind):
        warnings.simplefilter("ignore")
        self._temporary = tempfile.TemporaryDirectory(dir=FOLDER)
        self.folder = self._temporary.name
        made = formats.make(kind, self.folder)
        self.name, self.data, self._readers = made
        self._costs = []
        for reader in 2 * self._readers:
            with Cost() as cost:
                reader(self._placed(self.data))
            self._costs.append(cost)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._temporary.cleanup()

    def __call__(self, data):
        """Return whether bytes are read, and a problem or None."""
        costs = self._costs[-len(self._readers) :]
        found = [self._read(*pair, data) for pair in zip(self._readers, costs)]
        problems = [problem for _, problem in found if problem]
        return all(is_read for is_read, _ in found), [*problems, None][0]

    def _read(self, reader, honest, data):
        # Again where it is slow, which a busy machine may be.
        for _ in range(2):
            problem, is_read, path = None, True, self._placed(data)
            faulthandler.dump_traceback_later(MOST_WAITED, exit=True)
            with Cost() as cost:
                try:
                    reader(path)
                except Exception as error:
                    is_read = False
                    problem = raised.why_obscure(error)
            faulthandler.cancel_dump_traceback_later()
            if (
                cost.seconds <= honest.seconds + MORE_SECONDS
                and cost.bytes <= honest.bytes + MORE_MEMORY
            ):
                break
            mebibytes = cost.bytes / 2**20
            problem = f"takes {cost.seconds:.1f} s, {mebibytes:.0f} MiB"
        return is_read, problem

    def _placed(self, data):
        return formats.placed(self.folder, self.name, data)


def run(kind, count, first=0):
    """Read mutants of a kind; return how many were read, {number: problem}."""
    failures = {}
    accepted = 0
    with Judge(kind) as judge:
        for number in range(first, first + count):
            rng = random.Random(f"{kind} {number}")
            data = mutations.mutant_of(judge.name, judge.data, rng)
            is_read, problem = judge(data)
            accepted += is_read
            if problem is not None:
                failures[number] = problem
                print(kind, number, problem, sep=" | ", flush=True)
    return accepted, failures


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=formats.FORMATS, default=None)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--first", type=int, default=0)
    args = parser.parse_args()
    failed = 0
    for kind in [args.kind] if args.kind else formats.FORMATS:
        accepted, failures = run(kind, args.count, args.first)
        read = f"{kind}: {args.count} mutants, {accepted} read"
        print(f"{read}, {len(failures)} not refused well")
        failed += len(failures)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
