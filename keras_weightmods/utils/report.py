"""Reports: what a call found or changed, as a table, a dict or HTML."""

import dataclasses
import html
import itertools
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

# Lines that `str(report)` takes at most, and characters that they have.
_LINES, _WIDTH = 30, 100
_LEFT = "Left as they are"


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A weight that a call left as it is.

    Attributes:
        path: String, the path of the variable.
        reason: String, why.
    """

    path: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of strings.

    Attributes:
        title: String, a line above it.
        columns: Tuple of strings.
        rows: Tuple of tuples of strings, one for each column.
        total: Tuple of strings, a row below the others; empty for none.
        caption: String, a line below it.
    """

    title: str
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    total: tuple[str, ...] = ()
    caption: str = ""


class Report:
    """What a call found or changed.

    Subclasses are frozen dataclasses and implement `tables`. A field `skipped`
    holds the `Skipped`, a property `totals` a dict of sums. Prints as tables
    of at most 30 lines; `table()` has all rows.
    """

    def tables(self) -> Iterable[Table]:
        """Return the `Table`s to print, without the one of what is skipped."""
        raise NotImplementedError

    def table(self) -> str:
        """Return the tables with all rows and whole paths, as text."""
        tables = [*self.tables()]
        rows = [(s.path, s.reason) for s in getattr(self, "skipped", ())]
        if rows:
            tables.append(Table(_LEFT, ("weight", "reason"), tuple(rows)))
        return "\n".join(line for table in tables for line in _lines(table))

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain Python values, ready for JSON."""
        fields: dict[str, Any] = _plain(self)
        totals = getattr(self, "totals", None)
        return {**fields, "totals": _plain(totals)} if totals else fields

    def __str__(self) -> str:
        tables = list(self.tables())
        groups: dict[str, list[str]] = {}
        for skip in getattr(self, "skipped", ()):
            groups.setdefault(skip.reason, []).append(skip.path)
        if groups:
            rows = [(str(len(p)), p[0], reason) for reason, p in groups.items()]
            columns = "weights", "the first", "reason"
            tables.append(Table(_LEFT, columns, tuple(rows)))
        lines = [_lines(table, _WIDTH) for table in _shortened(tables)]
        return "\n".join(itertools.chain(*lines))

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.table())}</pre>"


def shape_text(shape: Iterable[int]) -> str:
    """Return `(64, 32)` as `"64x32"`."""
    return "x".join(map(str, shape)) or "scalar"


def size_text(nbytes: float) -> str:
    """Return a number of bytes in KiB or MiB."""
    if nbytes < 2**20:
        return f"{nbytes / 2**10:,.1f} KiB"
    return f"{nbytes / 2**20:,.1f} MiB"


def _shortened(tables: list[Table]) -> list[Table]:
    """Return the tables with as many rows as fit, alike for each."""
    frames = [
        len(_lines(dataclasses.replace(table, rows=table.rows[:1]), _WIDTH))
        for table in tables
    ]
    left = _LINES - sum(frames) + sum(bool(table.rows) for table in tables)
    shortened = {}
    ranked = sorted(enumerate(tables), key=lambda pair: len(pair[1].rows))
    for rank, (place, table) in enumerate(ranked):
        share = max(2, left // (len(tables) - rank))
        left -= min(len(table.rows), share)
        if len(table.rows) > share:
            more = f"... {len(table.rows) - share + 1} more: `report.table()`"
            table = dataclasses.replace(
                table,
                rows=table.rows[: share - 1],
                caption=f"{more}\n{table.caption}",
            )
        shortened[place] = table
    return [shortened[place] for place in range(len(tables))]


def _lines(table: Table, width: int | None = None) -> list[str]:
    """Return a table as lines, of at most `width` characters if given."""

    def wrapped(text: str) -> list[str]:
        lines = text.splitlines()
        return [
            part
            for line in lines
            for part in (textwrap.wrap(line, width) if width else [line])
        ]

    lines = wrapped(table.title)
    if table.rows:
        body = [*table.rows, *([table.total] if table.total else [])]
        columns = list(zip(table.columns, *body))
        widths = [max(map(len, column)) for column in columns]
        while width and sum(widths) + 2 * len(widths) - 2 > width:
            widths[widths.index(max(widths))] -= 1
        aligned = [
            str.rjust
            if all(cell[:1].isdigit() or not cell for cell in column[1:])
            else str.ljust
            for column in columns
        ]
        text = [
            "  ".join(
                align(
                    cell if len(cell) <= size else f"{cell[: size - 1]}…", size
                )
                for align, cell, size in zip(aligned, row, widths)
            ).rstrip()
            for row in zip(*columns)
        ]
        rule = "─" * (sum(widths) + 2 * len(widths) - 2)
        text.insert(1, rule)
        if table.total:
            text.insert(-1, rule)
        lines += text
    return lines + wrapped(table.caption)


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
