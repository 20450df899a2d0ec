"""The commands on reports, results, tuning and documents."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from ..results import COMMITTED, Results
from ..table import Table
from .options import Number, common, output_option, rows_options
from .output import NOTHING_WRITTEN, print_path, print_results, print_rows, print_table, print_text, stopping


@click.command()
@click.option("--quick", is_flag=True, help="A few steps of every study: to see that it runs.")
@output_option()
@common
def report(quick: bool, output: Path, seed: int, device: str, form: str | None) -> None:
    """Run the case studies and write one HTML page with their figures (minutes on two cores)."""
    from ..report.page import build

    with stopping(NOTHING_WRITTEN):
        page, results, tables = build(output, seed=seed, device=device, quick=quick, quiet=bool(form))
    if form:
        print_rows([{"study": result.study, **row} for result in results for row in result.rows], form)
        return
    for table in tables:
        print_table(table)
    print_path("Report", page)


MOST_ROWS = 30
"""Rows that ``fpe results`` prints unless asked for all."""


@click.command("results")
@click.argument("name", required=False)
@click.option("--all", "every", is_flag=True, help=f"Print every row, not only the first {MOST_ROWS}.")
@click.option("--table", "drawn", is_flag=True, help="Print a table of the documents by its name, such as should-i.")
@rows_options
def results_command(name: str | None, every: bool, drawn: bool, form: str | None) -> None:
    """Print a committed results file by its name, or any by its path.

    The name is that of the file: boolean, or studies/boolean if two folders have one. With --table it is the name of a
    table that is drawn from these files. Without a name, the committed files or the tables are listed.
    """
    if drawn:
        _print_drawn(name, form)
        return
    if name is None:
        files = [(_name_of(path), Results.read(path)) for path in sorted(COMMITTED.rglob("*.jsonl"))]
        if form:
            print_rows([{"name": n, "study": r.study, "rows": len(r.rows), **r.provenance} for n, r in files], form)
            return
        cells = [(n, str(len(r.rows)), str(r.provenance["device"])) for n, r in files]
        print_table(Table("Committed results: `fpe results NAME` prints one", ("name", "rows", "measured on"), cells))
        return
    try:
        results = Results.read(_found(name))
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    if form:
        print_results(results, form)
        return
    columns = list(dict.fromkeys(column for row in results.rows for column in row))
    shown = results.rows if every else results.rows[:MOST_ROWS]
    body = [tuple(_cell(row.get(column)) for column in columns) for row in shown]
    print_table(Table(f"{results.study}, {results.origin}", tuple(columns), body))
    if len(shown) < len(results.rows):
        print_text(f"{len(results.rows) - len(shown)} more rows: --all prints them, and so do --csv and --json.")


def _print_drawn(name: str | None, form: str | None) -> None:
    """Prints a table of the documents, or the names of all."""
    from ..report.committed import TABLES

    if name is None:
        shown = Table("Tables: `fpe results --table NAME` prints one", ("name",), [(key,) for key in TABLES])
    elif name in TABLES:
        shown = TABLES[name]()
    else:
        raise click.BadParameter(f"{name!r} is none of {', '.join(TABLES)}", param_hint="'NAME'")
    if form:
        print_rows(shown.records(), form)
    else:
        print_table(shown)


def _name_of(path: Path) -> str:
    return str(path.relative_to(COMMITTED).with_suffix(""))


def _found(name: str) -> Path:
    """A results file by its path, or a committed one by its name."""
    path = Path(name)
    if path.is_file():
        return path
    known = {_name_of(file): file for file in sorted(COMMITTED.rglob("*.jsonl"))}
    fitting = [key for key in known if name in (key, Path(key).name)]
    if len(fitting) == 1:
        return known[fitting[0]]
    says = f"is the name of {' and '.join(fitting)}" if fitting else f"is neither a file nor one of {', '.join(known)}"
    raise click.BadParameter(f"{name!r} {says}", param_hint="'NAME'")


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


@click.command("tune")
@click.option("--minutes", type=Number(0), default=5.0, show_default=True, help="Start nothing that would end later.")
@output_option()
@click.option("--dry-run", is_flag=True, help="Run the plan at small sizes under TRITON_INTERPRET=1, without timing.")
@rows_options
def tune_command(minutes: float, output: Path, dry_run: bool, form: str | None) -> None:
    """Find the fastest tiles of the block and partition kernels on the GPU at hand.

    Copy the files that it writes to kernels/configs/ to have them used.
    """
    from ...kernels.device import KNOWN, device_of, interpreting
    from ..gpu import tune

    if dry_run:
        if not interpreting():
            raise click.ClickException("--dry-run needs TRITON_INTERPRET=1")
        device, todo, target, limit, workers = KNOWN[80], tune.small(tune.jobs()), "cpu", 3, 0

        def measure(call: Callable) -> float:
            call()
            return 0.0
    else:
        if not torch.cuda.is_available():
            raise click.ClickException(
                "tuning needs a CUDA device, and PyTorch sees none; --dry-run runs the plan, small"
            )
        device, todo, target, limit, workers = device_of(torch.empty(0, device="cuda")), tune.jobs(), "cuda", None, None
        measure = tune.device_milliseconds

    with stopping("The tables hold what was tuned so far; the same command starts again."):
        entries = tune.run(
            todo, device, output, measure, 60 * minutes, target, limit, partial(click.echo, err=True), workers
        )
    if form:
        print_rows(entries, form)
        return
    for family in dict.fromkeys(entry["family"] for entry in entries):
        print_path("Table", tune.table_path(output, family, device))


@click.command()
def docs() -> None:
    """Fill the tables and figures of README.md and docs/ from the committed results."""
    from ..report.documents import ROOT, in_checkout, refresh

    if not in_checkout():
        raise click.ClickException(f"only a checkout of the repository has the documents, and {ROOT} is not one")
    for path in refresh():
        click.echo(path)
