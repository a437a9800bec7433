"""Reads and keeps what the matrix found; writes docs/every_model.md from it."""

import collections
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
    families_of = {name: i for i, name in enumerate(families())}
    methods = {name: i for i, name in enumerate(METHODS)}
    rows = [
        row
        for row in done.values()
        if row["family"] in families_of and row["method"] in methods
    ]
    rows.sort(
        key=lambda row: (families_of[row["family"]], methods[row["method"]])
    )
    part = file.with_suffix(".part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(part, file)


def write(page=PAGE, results=RESULTS):
    """Write the tables of the page anew, from the files that there are.

    Raises:
        ValueError: There is no file, or one that holds a part of the cells.
    """
    files = {
        backend: results / f"matrix_{backend}.jsonl" for backend in BACKENDS
    }
    found = {backend: read(file) for backend, file in files.items()}
    found = {backend: rows for backend, rows in found.items() if rows}
    left = {
        backend: sum(is_left(pair, rows) for pair in cells())
        for backend, rows in found.items()
    }
    if not found or any(left.values()):
        parts = ", ".join(
            f"{backend} ({n})" for backend, n in left.items() if n
        )
        raise ValueError(
            f"{page.name} is written from whole runs alone. Expected the files "
            f"{results}/matrix_*.jsonl with a row for each cell. Received: "
            + (f"cells left on {parts}." if parts else "no file.")
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


def _versions(found):
    for rows in found.values():
        used = {json.dumps(row["versions"]) for row in rows.values()}
        for each in sorted(used):
            names = json.loads(each).items()
            listed = ", ".join(f"{name} {version}" for name, version in names)
            yield f"Made with {listed}."


def _language(rows):
    yield f"| model | {' | '.join(COLUMNS.values())} |"
    yield "|---" * (1 + len(COLUMNS)) + "|"
    for name in _made(rows, "language"):
        texts = [_text(rows.get((name, method))) for method in COLUMNS]
        yield f"| `{name}` | {' | '.join(texts)} |"


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
    yield "| net | kernels | weights | in kernels that divide by 4 |"
    yield "|---|---|---|---|"
    for name, family in families().items():
        if family.kind == "net" and (row := rows.get((name, "share"))):
            yield f"| `{name}` | {_text(row)} |"


def _made(rows, kind):
    """Yield the families of a kind that could be made."""
    for name, family in families().items():
        state = rows.get((name, "forward"), {}).get("state", "unmade")
        if family.kind == kind and state != "unmade":
            yield name


def _methods(found):
    yield f"| method | {' | '.join(found)} |"
    yield "|---" * (1 + len(found)) + "|"
    all_of = {backend: list(rows.items()) for backend, rows in found.items()}
    for method in METHODS:
        cells = [
            _counted([row for (_, m), row in rows if m == method])
            for rows in all_of.values()
        ]
        yield f"| `{method}` | {' | '.join(cells)} |"
    cells = [_counted([row for _, row in rows]) for rows in all_of.values()]
    yield f"| all | {' | '.join(cells)} |"


def _pairs(found):
    """Say of each state what goes with it, and what is refused."""
    yield "| done before | goes with it | refused | else |"
    yield "|---|---|---|---|"
    for state in STATES:
        names = {f"{base}, {state}" for base in BASES}
        ends = collections.defaultdict(set)
        for backend, rows in found.items():
            for (family, method), row in rows.items():
                if family in names:
                    ends[method].add((row["state"], family, backend))
        columns: dict[str, list[str]] = {"passed": [], "refused": [], "": []}
        for method in METHODS:
            states = {state for state, *_ in ends[method]}
            for one in states:
                where = [each for each in ends[method] if each[0] == one]
                text = f"`{method}`"
                if len(states) > 1 or one not in columns:
                    bases = {family.partition(",")[0] for _, family, _ in where}
                    backends = {backend for *_, backend in where}
                    text += f" ({one}: {_listed(bases)}, {_listed(backends)})"
                column = one if len(states) == 1 and one in columns else ""
                columns[column].append(text)
        cells = " | ".join(", ".join(texts) for texts in columns.values())
        yield f"| {state} | {cells} |"


def _listed(names):
    return " and ".join(sorted(names))


def _counted(rows):
    """Say how many rows ended in which state; passed goes without saying."""
    states = collections.Counter(row["state"] for row in rows)
    passed = str(states.pop("passed", 0))
    return ", ".join([passed, *(f"{n} {s}" for s, n in sorted(states.items()))])


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
