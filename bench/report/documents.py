"""Fills the documents with tables and figures drawn from committed results: none of these is typed by hand.

A document holds marked places, ``<!-- table: boolean -->`` ... ``<!-- end -->``; :func:`refresh` fills them.
"""

import re
from pathlib import Path

from ..studies.drawing import save
from ..table import Table, raw
from .committed import FIGURES, TABLES

ROOT = Path(__file__).resolve().parents[2]
"""The root of the checkout; only a checkout has the documents, not an installed package."""

DOCUMENTS = (
    "README.md",
    "docs/benchmarks.md",
    "docs/boolean.md",
    "docs/installation.md",
    "docs/kernels.md",
    "docs/lab.md",
    "docs/seeded.md",
    "docs/semi_structured.md",
    "docs/studies.md",
)

DOWNLOADS = ("traffic", "compiled")
"""Tables that are too long to read, written to ``docs/tables`` as CSV."""

_PLACE = re.compile(r"(<!-- table: ([\w-]+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def fill(text: str) -> str:
    """A document's text with every marked place filled from the committed results.

    Raises:
        ValueError: A place names no table.
    """

    def replace(match: re.Match[str]) -> str:
        name = match.group(2)
        if name not in TABLES:
            raise ValueError(f"documents: expected one of {', '.join(TABLES)} in a place, got {name!r}")
        return f"{match.group(1)}{markdown(TABLES[name]())}{match.group(4)}"

    return _PLACE.sub(replace, text)


def in_checkout() -> bool:
    """Whether the documents are there: an installed package has none."""
    return all((ROOT / name).is_file() for name in DOCUMENTS)


def refresh() -> list[Path]:
    """Fills the documents and draws their figures; returns what was written."""
    written = []
    for name in DOCUMENTS:
        path = ROOT / name
        path.write_text(fill(path.read_text()))
        written.append(path)
    for name, text in downloads().items():
        path = ROOT / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        written.append(path)
    written += [save(draw(), ROOT / "docs/figures" / f"{name}.svg") for name, draw in FIGURES.items()]
    return written


PROSE = 100
"""A column with a cell of more characters holds sentences, and is aligned left."""


def downloads() -> dict[str, str]:
    """The long tables as CSV, by the path of their files."""
    return {f"docs/tables/{name}.csv": raw(TABLES[name]().records(), "csv") for name in DOWNLOADS}


def markdown(table: Table) -> str:
    """The table in Markdown, its title above it."""
    prose = [max((len(row[i]) for row in table.rows), default=0) > PROSE for i in range(len(table.columns))]
    alignment = ["---", *("---" if text else "---:" for text in prose[1:])]
    lines = [table.columns, alignment, *table.rows]
    return f"*{table.title}*\n\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
