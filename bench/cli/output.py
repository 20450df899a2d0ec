"""What a command prints and writes: raw rows to a file, and a table or JSON to the terminal."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table as RichTable

from ..results import Results
from ..table import Table

console = Console()
errors = Console(stderr=True)


def finish(results: Results, path: Path, table: Table, as_json: bool) -> None:
    """Writes a results file and prints its rows as JSON, or the table and the file's path."""
    results.write(path)
    if as_json:
        print_json(results)
        return
    print_table(table)
    print_path("Rows", path)


def print_json(results: Results) -> None:
    """Prints the rows, one JSON object a line."""
    for row in results.rows:
        click.echo(json.dumps({"study": results.study, **row}))


def print_table(table: Table) -> None:
    """Prints a table as wide as the terminal."""
    shown = RichTable(title=table.title, title_justify="left", title_style="bold")
    for i, name in enumerate(table.columns):
        shown.add_column(name, justify="left" if i == 0 else "right")
    for row in table.rows:
        shown.add_row(*row)
    console.print(shown)


def print_path(what: str, path: Path) -> None:
    """Prints where something was written, on one line however long."""
    console.print(f"{what}: [bold]{path.resolve()}[/bold]", soft_wrap=True)


@contextmanager
def stopping(says: str) -> Iterator[None]:
    """Ends the program on Ctrl-C with a word on what is left of the run, and the status that shells expect."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo(f"\nStopped. {says}", err=True)
        raise SystemExit(130) from None


NOTHING_WRITTEN = "Nothing was written; the same command begins anew."
GOES_ON = "What is done is kept; the same command goes on from there."
