"""A table of text, and how it fits a terminal: columns that say the same in every row are said once, above."""

import csv
import io
import json
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

GAP = 2
"""Spaces between two columns."""


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        title: What it shows.
        columns: Headings.
        rows: Cells, as they are printed.
    """

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def __str__(self) -> str:
        """Columns aligned with spaces, the title above."""
        return "\n".join([self.title, *_lines(self, _natural(self))])

    def records(self) -> list[dict[str, str]]:
        """The rows by the names of their columns."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]

    def fitted(self, width: int) -> str:
        """The table in lines of at most ``width`` characters; no text is left out.

        As wide as it likes where it can be. Else columns that are the same in every row are said once above it, cells
        are broken at spaces and after ``/ _ +``, and what is still too wide is continued below, the first columns
        that tell rows apart repeated. Only a word that is longer than the terminal is broken elsewhere.
        """
        if _total(_natural(self)) <= width:
            return "\n".join([*_wrapped(self.title, width), *_lines(self, _natural(self))])
        table, common = _shared(self)
        above = [*_wrapped(self.title, width), *(_wrapped(f"All rows: {'; '.join(common)}", width) if common else [])]
        bands = ["\n".join(_lines(band, _shrunk(band, width))) for band in _bands(table, width)]
        return "\n".join([*above, "\n\n".join(bands)])


def raw(rows: Sequence[Mapping[str, Any]], form: str) -> str:
    """Rows for a program to read, each line with its end.

    Args:
        rows: Facts by name.
        form: ``"json"``, an object a line, or ``"csv"`` with a heading; what is no plain value is JSON in its cell.
    """
    if form == "json":
        return "".join(f"{json.dumps(row)}\n" for row in rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: json.dumps(v) if isinstance(v, (dict, list, tuple)) else v for k, v in row.items()})
    return text.getvalue()


def _natural(table: Table) -> list[int]:
    """The widths of columns in which nothing is broken."""
    return [max(len(line[i]) for line in (table.columns, *table.rows)) for i in range(len(table.columns))]


Pieces = Callable[[str], list[str]]
"""Divides a cell into pieces that are never broken over two lines."""


def _least(table: Table, heading: Pieces, cell: Pieces) -> list[int]:
    """The widths of columns in which every piece of a heading, and of a cell, stands on a line of its own."""
    columns = zip(table.columns, *table.rows, strict=True)
    return [
        max(len(piece) for pieces in (heading(first), *map(cell, rest)) for piece in pieces) for first, *rest in columns
    ]


def _whole(cell: str) -> list[str]:
    return [cell]


def _words(cell: str) -> list[str]:
    """Words; an equation stays together, and so does a number with its interval."""
    return re.split(r"(?<!=)\s+(?!=)", cell) if _is_text(cell) else [cell]


def _parts(cell: str) -> list[str]:
    """Words, broken after ``/ _ +`` where more than a unit's letter follows."""
    return [part for word in _words(cell) for part in re.split(r"(?<=[/_+])(?=[^\s/_+]{2})", word)]


def _is_text(cell: str) -> bool:
    return bool(re.search(r"[A-Za-z]{2}", cell))


def _numbers(cells: Sequence[str]) -> bool:
    """Whether a column is one of numbers, most of them at least; versions are none."""
    return 2 * sum(bool(re.match(r"(?!\d+\.\d+\.)[-+±≥]?\s?[\d.]|-$", cell)) for cell in cells) >= len(cells)


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + GAP * (len(widths) - 1)


def _shared(table: Table) -> tuple[Table, list[str]]:
    """The table without columns that say the same in every row, and what those say; the first column stays."""
    same = [
        len(table.rows) > 1 and i > 0 and len({row[i] for row in table.rows}) == 1 for i in range(len(table.columns))
    ]
    said = [f"{name} {table.rows[0][i]}" for i, name in enumerate(table.columns) if same[i]]
    return _chosen(table, [i for i, gone in enumerate(same) if not gone]), said


def _chosen(table: Table, places: Sequence[int]) -> Table:
    return replace(
        table,
        columns=tuple(table.columns[i] for i in places),
        rows=[tuple(row[i] for i in places) for row in table.rows],
    )


def _bands(table: Table, width: int) -> list[Table]:
    """The table in parts that fit, each beginning with the columns that tell its rows apart."""
    least, count = _least(table, _parts, _parts), len(table.columns)
    if _total(least) <= width:
        return [table]
    keys = next((i for i in range(1, count) if len({row[:i] for row in table.rows}) == len(table.rows)), 1)
    while keys > 1 and _total(least[:keys]) > width // 2:
        keys -= 1
    bands: list[list[int]] = [[]]
    for i in range(keys, count):
        if bands[-1] and _total([*least[:keys], *(least[j] for j in bands[-1]), least[i]]) > width:
            bands.append([])
        bands[-1].append(i)
    return [_chosen(table, [*range(keys), *band]) for band in bands]


def _shrunk(table: Table, width: int) -> list[int]:
    """Widths that fit: the widest column that can give a character gives one, until they do.

    Headings are broken before cells are, and names at their underscores only where no space is left to break at.
    """
    widths = _natural(table)
    for least in (_least(table, _words, _whole), _least(table, _words, _words), _least(table, _parts, _parts)):
        while _total(widths) > width and (able := [i for i in range(len(widths)) if widths[i] > least[i]]):
            widths[max(able, key=lambda i: widths[i])] -= 1
    while _total(widths) > width and max(widths) > 1:
        widths[widths.index(max(widths))] -= 1
    return widths


def _lines(table: Table, widths: Sequence[int]) -> list[str]:
    """Headings and rows, each over as many lines as its fullest cell needs; the first column and words stand left."""
    lines = []
    left = [i == 0 or not _numbers([row[i] for row in table.rows]) for i in range(len(table.columns))]
    for row in (table.columns, *table.rows):
        cells = [_broken(cell, width) for cell, width in zip(row, widths, strict=True)]
        for i in range(max(map(len, cells), default=0)):
            parts = [cell[i] if i < len(cell) else "" for cell in cells]
            shown = [p.ljust(w) if text else p.rjust(w) for p, w, text in zip(parts, widths, left, strict=True)]
            lines.append((" " * GAP).join(shown).rstrip())
    return lines


def _broken(cell: str, width: int) -> list[str]:
    """A cell in lines of at most ``width`` characters; what does not fit a line is broken ever smaller."""
    if len(cell) <= width:
        return [cell]
    lines = [""]
    for word in _words(cell) if _is_text(cell) else cell.split():
        for i, part in enumerate([word] if len(word) <= width else _parts(word)):
            joined = f"{lines[-1]}{'' if i or not lines[-1] else ' '}{part}"
            if len(joined) <= width:
                lines[-1] = joined
                continue
            lines += [part[at : at + width] for at in range(0, len(part), width)]
    return lines if lines[0] or len(lines) == 1 else lines[1:]


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_on_hyphens=False) or [""]
