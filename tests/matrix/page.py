"""Reads and keeps what the matrix found; writes docs/every_model.md from it."""

import collections
import itertools
import json
import os
import pathlib
import re

from tests.matrix.families import families
from tests.matrix.methods import METHODS
from tests.matrix.states import BASES, STATES

ROOT = pathlib.Path(__file__).absolute().parent.parent.parent
RESULTS = ROOT / "build" / "matrix"
PAGE = ROOT / "docs" / "every_model.md"
MARKS = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
BACKENDS = ("torch", "jax", "tensorflow")
# The columns of the language models' table.
COLUMNS = {
    "targets": "kernels",
    "magnitude": "2:4",
    "pack": "packed",
    "head": "`head=`",
    "save_packed": "saved",
    "compiled_generate": "`generate`",
}


# What takes no model to train, for the nets of millions of weights.
OF_NETS = ("share", "magnitude", "delta", "patches")


def cells():
    """Return the pairs of a family and a method."""
    return [
        (name, method)
        for name, family in families().items()
        for method in METHODS
        if (method in OF_NETS if family.kind == "net" else method != "share")
        and (family.generates or "generate" not in method)
    ]


def is_left(pair, done, again=False):
    """Return whether a cell is to be run, by the rows of those that were."""
    family, method = pair
    made = done.get((family, "forward"), {}).get("state")
    is_out = made in ("unmade", "keras") and method != "forward"
    return (again or pair not in done) and not is_out


def read(file):
    """Return {(family, method): row} of a file; the last row counts."""
    if not file.exists():
        return {}
    rows = [json.loads(text) for text in file.read_text().splitlines()]
    return {(row["family"], row["method"]): row for row in rows}


def keep(file, done):
    """Write all rows, each once and in their order."""
    pairs = [(name, method) for name in families() for method in METHODS]
    rows = [json.dumps(done[pair]) + "\n" for pair in pairs if pair in done]
    part = file.with_suffix(".part")
    part.write_text("".join(rows))
    os.replace(part, file)


def write(page=PAGE, results=RESULTS):
    """Write the tables of the page anew; refuse a part of the cells."""
    found, left = {}, []
    for backend in BACKENDS:
        if rows := read(results / f"matrix_{backend}.jsonl"):
            found[backend] = rows
            if count := sum(is_left(pair, rows) for pair in cells()):
                left.append(f"{backend} ({count})")
    if left or not found:
        raise ValueError(
            f"{page.name} is written from whole runs alone. Expected the files "
            f"{results}/matrix_*.jsonl with a row for each cell. Received: "
            + (f"cells left on {', '.join(left)}." if left else "no file.")
            + " Run `make matrix`, which goes on where it was stopped."
        )
    first = next(iter(found.values()))
    kinds = {name: family.kind for name, family in families().items()}
    plain = {
        backend: {k: row for k, row in rows.items() if kinds[k[0]] != "pair"}
        for backend, rows in found.items()
    }
    tables = {
        "versions": _versions(found),
        "language": _language(first),
        "nets": _nets(first),
        "methods": _methods(plain),
        "pairs": _pairs(found),
        "others": _others(plain),
    }
    text = MARKS.sub(
        lambda mark: mark[1] + "\n".join(tables[mark[2]]) + f"\n{mark[3]}",
        page.read_text(),
    )
    page.write_text(text)


def _row(*texts):
    return f"| {' | '.join(texts)} |"


def _head(*texts):
    return [_row(*texts), "|---" * len(texts) + "|"]


def _versions(found):
    for rows in found.values():
        used = {json.dumps(row["versions"]) for row in rows.values()}
        for each in sorted(used):
            names = json.loads(each).items()
            listed = ", ".join(f"{name} {version}" for name, version in names)
            yield f"Made with {listed}."


def _language(rows):
    yield from _head("model", *COLUMNS.values())
    for name, family in families().items():
        state = rows.get((name, "forward"), {}).get("state", "unmade")
        if family.kind == "language" and state != "unmade":
            texts = [_text(rows.get((name, method))) for method in COLUMNS]
            yield _row(f"`{name}`", *texts)


def _text(row):
    if row is None:
        return ""
    if row["state"] == "passed":
        note = row["note"] or "yes"
        return note if isinstance(note, str) else " | ".join(note)
    names = {"keras": "KerasHub's own fails", "refused": "no"}
    return f"{names.get(row['state'], row['state'])}: {_escaped(row['note'])}"


def _escaped(text):
    return text.partition(": ")[2].replace("|", r"\|")[:80]


def _nets(rows):
    yield from _head("net", "kernels", "weights", "in kernels that divide by 4")
    for name, family in families().items():
        if family.kind == "net" and (row := rows.get((name, "share"))):
            yield _row(f"`{name}`", _text(row))


def _methods(found):
    """Count the states of each method; passed goes without saying."""
    yield from _head("method", *found)
    for method in (*METHODS, "all"):
        texts = []
        for rows in found.values():
            states = collections.Counter(
                row["state"]
                for (_, of), row in rows.items()
                if method in (of, "all")
            )
            passed = str(states.pop("passed", 0))
            others = [f"{n} {state}" for state, n in sorted(states.items())]
            texts.append(", ".join([passed, *others]))
        yield _row("all" if method == "all" else f"`{method}`", *texts)


def _pairs(found):
    """Say of each state what goes with it, and what is refused."""
    yield from _head("done before", "goes with it", "refused", "else")
    for state in STATES:
        columns: dict[str, list[str]] = {"passed": [], "refused": [], "": []}
        for method in METHODS:
            ends = collections.defaultdict(set)
            for base, (backend, rows) in itertools.product(
                BASES, found.items()
            ):
                if row := rows.get((f"{base}, {state}", method)):
                    ends[row["state"]].add((base, backend))
            for one, places in ends.items():
                if len(ends) == 1 and one in columns:
                    columns[one].append(f"`{method}`")
                    continue
                where = ", ".join(
                    " and ".join(sorted(set(names))) for names in zip(*places)
                )
                columns[""].append(f"`{method}` ({one}: {where})")
        yield _row(state, *map(", ".join, columns.values()))


def _others(found):
    """Say what did not pass: each reason once, with its families."""
    for backend, rows in found.items():
        reasons = collections.defaultdict(list)
        for (family, method), row in rows.items():
            if row["state"] != "passed":
                key = row["state"], method, _escaped(row["note"])
                reasons[key].append(f"`{family}`")
        for (state, method, reason), names in sorted(reasons.items()):
            listed = ", ".join(names)
            yield f"- {backend}, {state}, `{method}`: {reason} ({listed})"
