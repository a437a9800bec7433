"""Reports on what a call found or changed, as a table, a dict or HTML."""

import dataclasses
import html
import itertools
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from keras_weightmods.utils.checks import cut, printable

# The most lines of `str(report)`, and their width.
_LINES, _WIDTH = 30, 100
_LEFT = "Left as they are"


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A weight that a call did not change.

    Attributes:
        path: String, the path of the variable.
        reason: String, why.
    """

    path: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Row:
    """A weight of a report.

    Attributes:
        key: String, place and path of the weight in the model.
        path: String.
        shape: Tuple of ints.
    """

    key: str
    path: str
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of objects, one a row.

    Attributes:
        title: String, a line above it.
        rows: Sequence of objects, or of tuples of cells.
        columns: String, a word for each column, as `"weights=size:,"`: its
            head, with `_` for spaces; the attribute of the objects, if it is
            another; a format. Tuples are printed as shapes, None as nothing.
        total: Sequence of strings, a row below the others; empty for none.
        caption: String, a line below it.
    """

    title: str
    rows: Sequence[Any] = ()
    columns: str = ""
    total: Sequence[str] = ()
    caption: str = ""


class Report:
    """The result of a call, as a table and plain values.

    Subclasses are frozen dataclasses and implement `tables`. A field `skipped`
    holds the `Skipped`, and a property `totals` a dict of sums. A report prints
    as tables of at most 30 lines; `table()` has all rows.
    """

    def tables(self) -> Iterable[Table]:
        """Return the `Table`s to print, without that of skipped weights."""
        raise NotImplementedError

    def table(self) -> str:
        """Return the tables with all rows and whole paths, as text."""
        skipped = getattr(self, "skipped", ())
        title = _LEFT if skipped else ""
        tables = *self.tables(), Table(title, skipped, "weight=path reason")
        return "\n".join(line for table in tables for line in _lines(table))

    def summary(self) -> str:
        """Return what was done, on a line: what stands around the table."""
        first = next(iter(self.tables()))
        name = type(self).__name__.removesuffix("Report")
        parts = f"{name}: {first.title}; {first.caption}".rstrip("; ").split()
        return " ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain Python values, ready for JSON."""
        fields: dict[str, Any] = _plain(self)
        totals = getattr(self, "totals", None)
        return {**fields, "totals": _plain(totals)} if totals else fields

    def __str__(self) -> str:
        rows = _grouped(getattr(self, "skipped", ()))
        title = _LEFT if rows else ""
        left = Table(title, rows, "weights the_first reason")
        lines = []
        for table in _shortened([*self.tables(), left]):
            lines += _lines(table, _WIDTH)
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.table())}</pre>"


def skipped_text(skipped: Iterable[Skipped]) -> str:
    """Return the skipped weights for an error: the first of each reason."""
    rows = _grouped(skipped)
    listed = [
        f"{f'{count} weights, the first ' * (count > 1)}"
        f"{cut(path, 200)}: {cut(why, 300)}"
        for count, path, why in rows[:3]
    ]
    more = [f"{len(rows) - 3} more reasons"] * (len(rows) > 3)
    return "; ".join([*listed, *more]) or "none"


def _grouped(skipped: Iterable[Skipped]) -> list[tuple[int, str, str]]:
    """Return (number of weights, path of the first, reason) for each reason."""
    groups: dict[str, list[str]] = {}
    for skip in skipped:
        groups.setdefault(skip.reason, []).append(skip.path)
    return [(len(paths), paths[0], why) for why, paths in groups.items()]


def size_text(nbytes: float) -> str:
    """Return a number of bytes in KiB or MiB."""
    if nbytes < 2**20:
        return f"{nbytes / 2**10:,.1f} KiB"
    return f"{nbytes / 2**20:,.1f} MiB"


def _shortened(tables: list[Table]) -> Iterator[Table]:
    """Yield the tables with as many rows as fit, shared equally."""
    shown = [len(table.rows) for table in tables]
    left = _LINES
    for table in tables:
        row = table.rows[:1]
        frame = _lines(dataclasses.replace(table, rows=row), _WIDTH)
        left -= len(frame) - len(row)
    while sum(shown) > left and max(shown) > 2:
        shown[shown.index(max(shown))] -= 1
    for table, count in zip(tables, shown):
        if count < len(table.rows):
            more = f"... {len(table.rows) - count + 1} more: `report.table()`"
            yield dataclasses.replace(
                table,
                rows=table.rows[: count - 1],
                caption=f"{more}\n{table.caption}",
            )
        else:
            yield table


def _lines(table: Table, width: int = sys.maxsize) -> list[str]:
    """Return a table as lines of at most `width` characters."""

    def wrapped(text: str) -> list[str]:
        parts = (textwrap.wrap(line, width) for line in text.splitlines())
        return [*itertools.chain(*parts)]

    lines = wrapped(table.title)
    if table.rows:
        columns = []
        for place, column in enumerate(table.columns.split()):
            field, _, form = column.partition(":")
            head, _, name = field.partition("=")
            values = (
                row[place]
                if isinstance(row, tuple)
                else getattr(row, name or head)
                for row in table.rows
            )
            cells = [_cell(value, form) for value in values]
            total = table.total[place : place + 1]
            columns.append([head.replace("_", " "), *cells, *total])
        widths = [max(map(len, column)) for column in columns]
        while sum(widths) + 2 * len(widths) - 2 > width:
            widths[widths.index(max(widths))] -= 1
        for place, (cells, size) in enumerate(zip(columns, widths)):
            is_number = all(c[:1].isdigit() or not c for c in cells[1:])
            align = str.rjust if is_number else str.ljust
            columns[place] = [
                align(c if len(c) <= size else f"{c[: size - 1]}…", size)
                for c in cells
            ]
        text = ["  ".join(row).rstrip() for row in zip(*columns)]
        rule = "─" * (sum(widths) + 2 * len(widths) - 2)
        text.insert(1, rule)
        if table.total:
            text.insert(-1, rule)
        lines += text
    return lines + wrapped(table.caption)


def _cell(value: Any, form: str) -> str:
    if isinstance(value, tuple):
        value = "x".join(map(str, value)) or "scalar"
    # Names from a file may be anything.
    return "" if value is None else printable(format(value, form))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: _plain(getattr(value, field.name))
            for field in dataclasses.fields(value)
            if field.repr
        }
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(each) for each in value]
    if hasattr(value, "shape") and tuple(value.shape):
        return {"shape": list(value.shape), "dtype": str(value.dtype)}
    return value.item() if hasattr(value, "item") else value
