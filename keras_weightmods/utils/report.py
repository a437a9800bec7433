"""Reports: what a call found or changed, as a table, a dict or HTML."""

import collections
import collections.abc
import dataclasses
import html
from typing import Any

# Lines that `str(report)` takes at most.
_MOST_LINES = 30
# What a printed table takes beside its rows: title, frame, head, caption.
_FRAME_LINES = 7


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

    def tables(self) -> collections.abc.Iterable[Table]:
        """The `Table`s to print, less the one of what was skipped."""
        raise NotImplementedError

    def table(self) -> str:
        """Returns the tables with all rows and whole paths, as text."""
        return _text(self._all_tables(), width=1000)

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as plain Python values, ready for JSON."""
        fields = {
            field.name: _plain(getattr(self, field.name))
            for field in dataclasses.fields(self)  # type: ignore[arg-type]
            if field.repr
        }
        totals = getattr(self, "totals", None)
        return (
            fields if totals is None else {**fields, "totals": _plain(totals)}
        )

    def __str__(self) -> str:
        tables = list(self.tables())
        skipped = getattr(self, "skipped", ())
        if skipped:
            tables.append(_by_reason(skipped))
        return _text(_shortened(tables))

    def _repr_html_(self) -> str:
        return "".join(map(_html, self._all_tables()))

    def _all_tables(self):
        yield from self.tables()
        skipped = getattr(self, "skipped", ())
        if skipped:
            rows = tuple((skip.path, skip.reason) for skip in skipped)
            yield Table(_LEFT, ("weight", "reason"), rows)


_LEFT = "Left as they are"


def shape_text(shape):
    """`(64, 32)` as `"64x32"`."""
    return "x".join(map(str, shape)) or "scalar"


def size_text(nbytes):
    """A number of bytes in KiB or MiB."""
    if nbytes < 2**20:
        return f"{nbytes / 2**10:,.1f} KiB"
    return f"{nbytes / 2**20:,.1f} MiB"


def _by_reason(skipped):
    groups: dict[str, list[str]] = collections.defaultdict(list)
    for skip in skipped:
        groups[skip.reason].append(skip.path)
    rows = tuple(
        (str(len(paths)), paths[0], reason) for reason, paths in groups.items()
    )
    return Table(_LEFT, ("weights", "the first", "reason"), rows)


def _shortened(tables):
    """The same tables with as many rows as fit into `_MOST_LINES`."""
    filled = [table for table in tables if table.rows]
    frames = _FRAME_LINES * len(filled) + len(tables) - len(filled)
    left = max(_MOST_LINES - frames, 2 * len(filled))
    for place, table in enumerate(tables):
        if not table.rows:
            yield table
            continue
        after = sum(len(t.rows) for t in tables[place + 1 :])
        later = sum(1 for t in tables[place + 1 :] if t.rows)
        most = max(2, left - min(after, left // 2 if later else 0))
        shown = table.rows
        if len(shown) > most:
            rest = len(shown) - (most - 1)
            shown = shown[: most - 1]
            more = (f"... {rest} more: `report.table()`",)
            shown += (more + ("",) * (len(table.columns) - 1),)
        left -= len(shown)
        yield dataclasses.replace(table, rows=shown)


def _text(tables, width=100):
    import rich.box
    import rich.console
    import rich.table

    console = rich.console.Console(width=width, color_system=None)
    with console.capture() as capture:
        for table in tables:
            if not table.rows:
                console.print(
                    "\n".join(filter(None, (table.title, table.caption))),
                    markup=False,
                    highlight=False,
                )
                continue
            drawn = rich.table.Table(
                title=table.title,
                caption=table.caption or None,
                box=rich.box.SIMPLE_HEAD,
                show_edge=False,
                title_justify="left",
                caption_justify="left",
            )
            for name, cells in zip(table.columns, zip(*table.rows)):
                numeric = all(c[:1].isdigit() or not c for c in cells)
                drawn.add_column(
                    name,
                    justify="right" if numeric else "left",
                    no_wrap=True,
                    overflow="ellipsis",
                )
            for row in table.rows:
                drawn.add_row(*map(rich.text.Text, row))
            if table.total:
                drawn.add_section()
                drawn.add_row(*map(rich.text.Text, table.total))
            console.print(drawn)
    lines = capture.get().splitlines()
    return "\n".join(line.rstrip() for line in lines)


def _html(table):
    def line(tag, cells):
        cells = "".join(f"<{tag}>{html.escape(c)}</{tag}>" for c in cells)
        return f"<tr>{cells}</tr>"

    lines = [f"<caption>{html.escape(table.title)}</caption>"]
    if table.rows:
        lines += [line("th", table.columns)]
        lines += [line("td", row) for row in table.rows]
        if table.total:
            lines += [line("th", table.total)]
    text = f"<table>{''.join(lines)}</table>"
    return text + (
        f"<p>{html.escape(table.caption)}</p>" if table.caption else ""
    )


def _plain(value):
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: _plain(getattr(value, field.name))
            for field in dataclasses.fields(value)
            if field.repr
        }
    if isinstance(value, collections.abc.Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(each) for each in value]
    if hasattr(value, "shape") and tuple(value.shape):
        return {"shape": list(value.shape), "dtype": str(value.dtype)}
    return value.item() if hasattr(value, "item") else value
