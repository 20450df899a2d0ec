"""A table of text, and how it looks without any library."""

from collections.abc import Sequence
from dataclasses import dataclass


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
        widths = [max(len(line[i]) for line in (self.columns, *self.rows)) for i in range(len(self.columns))]
        lines = [
            "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
            for line in (self.columns, *self.rows)
        ]
        return "\n".join([self.title, *(line.rstrip() for line in lines)])
