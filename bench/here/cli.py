"""``fpe here``: the claim on the machine at hand."""

from pathlib import Path

import click

from ...kernels.here import write
from ..cli.options import output_option
from ..cli.output import NOTHING_WRITTEN, console, finish, print_path, print_table, stopping
from . import draw, measure


@click.command("here")
@click.option("--seconds", type=click.FloatRange(0), default=1.5, show_default=True, help="To spend on each point.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of weights and labels.")
@click.option("--quick", is_flag=True, help="A small layer: to see that it runs. Nothing is kept for 'auto'.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON rows to standard output and nothing else.")
@output_option()
def here(seconds: float, seed: int, quick: bool, as_json: bool, output: Path) -> None:
    """Measure this CPU, and an expanded layer on it beside its dense parent and the wide layer (half a minute).

    What the CPU can do is kept in the user's cache folder, where backend="auto" finds it.
    """
    reason = measure.why_not()
    if reason:
        raise click.ClickException(f"the CPU kernels cannot run: {reason}")
    with stopping(NOTHING_WRITTEN):
        roof, results = measure.run(quick, seconds, seed)
    kept = None if quick else write(roof)
    finish(results, output / "here.jsonl", draw.table(results), as_json)
    if not as_json:
        print_table(draw.crossover_table(results))
        console.print(draw.sentence(results), highlight=False)
        if kept:
            print_path("Roof, for backend='auto'", kept)
