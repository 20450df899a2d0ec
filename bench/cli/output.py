"""What a command prints and writes: raw rows to a file, and a table or JSON to the terminal."""

import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from ..results import Results
from ..table import Table, raw


def finish(results: Results, path: Path, table: Table, form: str | None) -> None:
    """Writes a results file and prints its rows as JSON or CSV, or the table and the file's path."""
    results.write(path)
    if form:
        print_results(results, form)
        return
    print_table(table)
    print_path("Rows", path)


def print_results(results: Results, form: str) -> None:
    """Prints the rows of a study, each with its name."""
    print_rows([{"study": results.study, **row} for row in results.rows], form)


def print_rows(rows: Sequence[Mapping[str, Any]], form: str) -> None:
    """Prints raw rows, as :func:`~fpe.bench.table.raw` writes them, and nothing else."""
    click.echo(raw(rows, form), nl=False)


def width() -> int:
    """Characters in a line of the terminal, or the variable ``COLUMNS``; 80 if neither is known."""
    return shutil.get_terminal_size((80, 24)).columns


def print_table(table: Table) -> None:
    """Prints a table no wider than the terminal, and an empty line after it."""
    click.echo(f"{table.fitted(width())}\n")


def print_text(text: str) -> None:
    """Prints paragraphs, one for each line of ``text``, no wider than the terminal."""
    for line in text.splitlines():
        indent = " " * (len(line) - len(line.lstrip()))
        click.echo(textwrap.fill(line, width(), subsequent_indent=indent, break_on_hyphens=False))


def print_path(what: str, path: Path) -> None:
    """Prints where something was written, on one line, however long it is."""
    click.echo(f"{what}: {path.resolve()}")


@contextmanager
def stopping(says: str) -> Iterator[None]:
    """On Ctrl-C says what is left of the run and ends the program with status 130, as shells expect."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo(f"\nStopped. {says}", err=True)
        raise SystemExit(130) from None


NOTHING_WRITTEN = "Nothing was written; the same command starts again."
GOES_ON = "What is done is kept; the same command goes on from there."
