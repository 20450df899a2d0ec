"""The commands on reports, results, tuning and documents."""

from collections.abc import Callable
from pathlib import Path

import click
import torch

from ..results import COMMITTED, Results
from .options import common, output_option
from .output import NOTHING_WRITTEN, console, errors, print_json, print_path, print_table, stopping


@click.command()
@click.option("--quick", is_flag=True, help="A few steps of every study: to see that it runs.")
@output_option()
@common
def report(quick: bool, output: Path, seed: int, device: str, as_json: bool) -> None:
    """Run the case studies and write one HTML page with their figures (minutes on two cores)."""
    from ..report.page import build

    with stopping(NOTHING_WRITTEN):
        page, results, tables = build(output, seed=seed, device=device, quick=quick, quiet=as_json)
    if as_json:
        for result in results:
            print_json(result)
        return
    for table in tables:
        print_table(table)
    print_path("Report", page)


@click.command("results")
@click.argument("path", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=False)
def results_command(path: Path | None) -> None:
    """Print a results file, or list the committed ones."""
    if path is None:
        for file in sorted(COMMITTED.rglob("*.jsonl")):
            console.print(file)
        return
    try:
        results = Results.read(path)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    click.echo(results.frame.to_string(index=False))


@click.command("tune")
@click.option("--budget", type=click.FloatRange(0), default=300.0, show_default=True, help="Seconds.")
@output_option()
@click.option("--dry-run", is_flag=True, help="Walk the plan at small sizes under TRITON_INTERPRET=1, timing nothing.")
def tune_command(budget: float, output: Path, dry_run: bool) -> None:
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
            raise click.ClickException("tuning needs a CUDA device, and PyTorch sees none; --dry-run walks the plan")
        device, todo, target, limit, workers = device_of(torch.empty(0, device="cuda")), tune.jobs(), "cuda", None, None
        measure = tune.device_milliseconds

    with stopping("The tables hold what has been tuned; the same command begins anew."):
        entries = tune.run(todo, device, output, measure, budget, target, limit, errors.print, workers)
    for family in dict.fromkeys(entry["family"] for entry in entries):
        print_path("Table", tune.table_path(output, family, device))


@click.command()
def docs() -> None:
    """Fill the tables and figures of README.md and docs/ from the committed results."""
    from ..report.documents import ROOT, in_checkout, refresh

    if not in_checkout():
        raise click.ClickException(f"the documents are in a checkout of the repository alone, and {ROOT} is none")
    for path in refresh():
        console.print(path)
