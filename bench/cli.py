"""The command line."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

from . import summary
from .cost_cli import COMMANDS
from .lab.cli import lab
from .output import console, finish, print_json, print_path, print_table
from .results import COMMITTED, Results
from .studies import boolean, vision
from .studies import cli as sweeps


def common(command: Callable) -> Callable:
    """The options that every measuring command takes."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print JSON rows to standard output and nothing else."),
        click.option("--device", default="cpu", show_default=True, callback=_device, help="A PyTorch device."),
        click.option("--seed", default=0, show_default=True, help="Seed of all randomness."),
    ):
        command = option(command)
    return command


def _device(context: click.Context, parameter: click.Parameter, value: str) -> str:
    try:
        torch.empty(0, device=value)
    except (RuntimeError, AssertionError) as error:
        raise click.BadParameter(f"{value!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return value


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="fixed-parameter-expansion", prog_name="fpe")
def cli() -> None:
    """Fixed Parameter Expansion: wider networks at the same number of non-zero weights.

    Start with 'fpe report', which runs the case studies and writes a page to look at.
    """


@cli.group()
def study() -> None:
    """Run one of the paper's experiments and print it beside the published figures."""


@study.command("boolean")
@click.option("--trials", type=click.IntRange(1), help="Networks trained.  [default: 5]")
@click.option("--epochs", type=click.IntRange(1), help="Epochs before and again after the split.  [default: 1000]")
@click.option("--quick", is_flag=True, help="A few steps of two small trials: to see that it runs.")
@click.option("--sensitivity", is_flag=True, help="Move each unpublished choice in turn instead (hours).")
@click.option("--output", type=click.Path(path_type=Path), default=Path("out"), show_default=True, help="Folder.")
@common
def boolean_command(
    trials: int | None,
    epochs: int | None,
    quick: bool,
    sensitivity: bool,
    output: Path,
    seed: int,
    device: str,
    as_json: bool,
) -> None:
    """Learn a DNF of 8 clauses with 8 neurons: dense, random split, clause split.

    The published accuracies are 78.7 %, 88.7 % and 99.4 %.
    """
    from .report import figures

    given: dict[str, Any] = {
        name: value for name, value in (("trials", trials), ("epochs", epochs)) if value is not None
    }
    choices = replace(boolean.QUICK if quick else boolean.Choices(), **given)
    if sensitivity:
        results = boolean.run_sensitivity(choices, seed, device, quiet=as_json)
        finish(results, output / "boolean-sensitivity.jsonl", summary.sensitivity(results), as_json)
        return
    done = boolean.run(choices, seed, device, quiet=as_json)
    done.curves.write(output / "boolean-curves.jsonl")
    for name, figure in figures.boolean_figures(done).items():
        figures.save(figure, output / f"boolean-{name}.svg")
    finish(done.results, output / "boolean.jsonl", summary.boolean(done.results), as_json)


@study.command("vision")
@click.option("--data", help="'fashion-mnist', 'digits' or an .npz with X, y, Xt, yt.  [default: what is installed]")
@click.option("--neurons", type=click.IntRange(1), help="Hidden neurons before the split.")
@click.option("--alpha", type=click.IntRange(2), help="Children per neuron.")
@click.option("--trials", type=click.IntRange(1), help="Networks trained.")
@click.option("--epochs", type=click.IntRange(1), help="Epochs before and again after the split.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("out"), show_default=True, help="Folder.")
@common
def vision_command(output: Path, seed: int, device: str, as_json: bool, **given: Any) -> None:
    """Classify real data with one hidden layer, dense and expanded."""
    chosen = {name: value for name, value in given.items() if value is not None}
    choices = replace(vision.default_choices(chosen.get("data")), **chosen)
    try:
        results = vision.run(choices, seed, device, quiet=as_json)
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    finish(results, output / "vision.jsonl", summary.vision(results), as_json)


@cli.command()
@click.option("--quick", is_flag=True, help="A few steps of every study: to see that it runs.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("out"), show_default=True, help="Folder.")
@common
def report(quick: bool, output: Path, seed: int, device: str, as_json: bool) -> None:
    """Run the case studies and write one HTML page with their figures (minutes on two cores)."""
    from .report import build

    page, results, tables = build(output, seed=seed, device=device, quick=quick, quiet=as_json)
    if as_json:
        for result in results:
            print_json(result)
        return
    for table in tables:
        print_table(table)
    print_path("Report", page)


@cli.command("results")
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


@cli.command("tune")
@click.option("--budget", type=click.FloatRange(0), default=300.0, show_default=True, help="Seconds.")
@click.option("--output", type=click.Path(path_type=Path), default=Path("out"), show_default=True, help="Folder.")
@click.option("--dry-run", is_flag=True, help="Walk the plan at small sizes under TRITON_INTERPRET=1, timing nothing.")
def tune_command(budget: float, output: Path, dry_run: bool) -> None:
    """Find the fastest tiles of the block and partition kernels on the GPU at hand.

    Copy the files that it writes to kernels/configs/ to have them used.
    """
    from ..kernels.device import KNOWN, device_of, interpreting
    from . import tune

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

    entries = tune.run(todo, device, output, measure, budget, target, limit, console.print, workers)
    for family in dict.fromkeys(entry["family"] for entry in entries):
        print_path("Table", tune.table_path(output, family, device))


@cli.command()
def docs() -> None:
    """Fill the tables and figures of README.md and docs/ from the committed results."""
    from .documents import refresh

    for path in refresh():
        console.print(path)


for command in (lab, *COMMANDS):
    cli.add_command(command)
sweeps.add_to(study, common)
