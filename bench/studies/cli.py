"""The command ``fpe study``: the two case studies, and the sweeps, one command from each :class:`.sweep.Study`."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import click

from ..cli.options import common, output_option
from ..cli.output import GOES_ON, NOTHING_WRITTEN, finish, print_json, print_path, print_table, stopping
from ..report import summary
from . import boolean, boolean_sweep, catalogue, cnn, transformer, vision
from .features import features_command
from .sweep import Study

STUDIES: tuple[Study, ...] = (boolean_sweep.STUDY, *catalogue.STUDIES, cnn.STUDY, transformer.STUDY)


@click.group()
def study() -> None:
    """Run one of the paper's experiments and print it beside the published figures."""


@study.command("boolean")
@click.option("--trials", type=click.IntRange(1), help="Networks trained.  [default: 5]")
@click.option("--epochs", type=click.IntRange(1), help="Epochs before and again after the split.  [default: 1000]")
@click.option("--quick", is_flag=True, help="A few steps of two small trials: to see that it runs.")
@click.option("--sensitivity", is_flag=True, help="Move each unpublished choice in turn instead (hours).")
@output_option()
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
    from ..report import figures

    given: dict[str, Any] = {
        name: value for name, value in (("trials", trials), ("epochs", epochs)) if value is not None
    }
    choices = replace(boolean.QUICK if quick else boolean.Choices(), **given)
    end = "-quick" if quick else ""
    if sensitivity:
        path = output / f"boolean-sensitivity{end}.jsonl"
        with stopping(GOES_ON):
            try:
                results = boolean.run_sensitivity(choices, path, seed, device, quiet=as_json)
            except ValueError as error:
                raise click.ClickException(str(error)) from error
        finish(results, path, summary.sensitivity(results), as_json)
        return
    with stopping(NOTHING_WRITTEN):
        done = boolean.run(choices, seed, device, quiet=as_json)
    done.curves.write(output / f"boolean-curves{end}.jsonl")
    for name, figure in figures.boolean_figures(done).items():
        figures.save(figure, output / f"boolean-{name}{end}.svg")
    finish(done.results, output / f"boolean{end}.jsonl", summary.boolean(done.results), as_json)


@study.command("vision")
@click.option("--data", help="'fashion-mnist', 'digits' or an .npz with X, y, Xt, yt.  [default: what is installed]")
@click.option("--neurons", type=click.IntRange(1), help="Hidden neurons before the split.")
@click.option("--alpha", type=click.IntRange(2), help="Children per neuron.")
@click.option("--trials", type=click.IntRange(1), help="Networks trained.")
@click.option("--epochs", type=click.IntRange(1), help="Epochs before and again after the split.")
@output_option()
@common
def vision_command(output: Path, seed: int, device: str, as_json: bool, **given: Any) -> None:
    """Classify real data with one hidden layer, dense and expanded."""
    chosen = {name: value for name, value in given.items() if value is not None}
    choices = replace(vision.default_choices(chosen.get("data")), **chosen)
    try:
        with stopping(NOTHING_WRITTEN):
            results = vision.run(choices, seed, device, quiet=as_json)
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    finish(results, output / "vision.jsonl", summary.vision(results), as_json)


def _command(study: Study) -> click.Command:
    def run(output: Path, quick: bool, jobs: int, seed: int, device: str, as_json: bool, **given: Any) -> None:
        chosen = {name: value for name, value in given.items() if value is not None}
        try:
            with stopping(GOES_ON):
                path, results, cells = study.run(output, quick, as_json, jobs, seed=seed, device=device, **chosen)
        except (OSError, ValueError) as error:
            raise click.ClickException(str(error)) from error
        if as_json:
            print_json(results)
            return
        print_table(study.table(results, cells))
        print_path("Rows", path)

    default = {field.name: field.default for field in fields(study.settings)}
    options = [
        click.option("--trials", type=click.IntRange(1), help=f"Networks of a kind.  [default: {default['trials']}]"),
        click.option("--epochs", type=click.IntRange(1), help=f"Before, and after.  [default: {default['epochs']}]"),
        click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Processes side by side."),
        click.option("--quick", is_flag=True, help="A few steps of small networks: to see that it runs."),
        output_option(),
    ]
    if "data" in default:
        options.insert(0, click.option("--data", help="A data set's name or path.  [default: what is installed]"))
    command = common(run)
    for option in reversed(options):
        command = option(command)
    text = f"{study.about}\n\nA run that was cut goes on where it stopped; rows of other settings are refused."
    return click.command(study.name, help=text)(command)


for _study in STUDIES:
    study.add_command(_command(_study))
study.add_command(features_command)
