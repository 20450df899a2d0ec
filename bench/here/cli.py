"""``fpe here``: the claim on the machine at hand."""

from pathlib import Path

import click

from ...kernels.here import write
from ..cli.options import output_option, rows_options, seed_option
from ..cli.output import NOTHING_WRITTEN, finish, print_path, print_table, print_text, stopping
from . import draw, measure


@click.command("here")
@click.option(
    "--rounds", type=click.IntRange(1), default=2, show_default=True, help="Rounds in which everything is measured."
)
@seed_option
@click.option("--quick", is_flag=True, help="Small layers, to see that it runs. Nothing is kept for 'auto'.")
@rows_options
@output_option()
def here(rounds: int, seed: int, quick: bool, form: str | None, output: Path) -> None:
    """Measure this CPU, and an expanded layer on it beside its dense parent and the wide layer (half a minute).

    What the CPU can do is kept in the user's cache folder, where backend="auto" finds it.
    """
    reason = measure.why_not()
    if reason:
        raise click.ClickException(f"the CPU kernels cannot run: {reason}")
    with stopping(NOTHING_WRITTEN):
        roof, results = measure.run(quick, rounds, seed)
    kept = None if quick else write(roof)
    finish(results, output / "here.jsonl", draw.table(results), form)
    if not form:
        print_table(draw.model_table(results))
        print_table(draw.crossover_table(results))
        print_text(draw.sentence(results))
        if kept:
            print_path("Roof, for backend='auto'", kept)
            print_text(draw.disturbed(results))
