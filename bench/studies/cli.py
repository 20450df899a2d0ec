"""The commands of the sweeps: ``fpe study budget`` and kin, one made from each :class:`.sweep.Study`."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from ..output import print_json, print_path, print_table
from . import boolean_sweep, catalogue, cnn, transformer
from .features import features_command
from .sweep import Study

STUDIES: tuple[Study, ...] = (boolean_sweep.STUDY, *catalogue.STUDIES, cnn.STUDY, transformer.STUDY)


def add_to(group: click.Group, common: Callable) -> None:
    """Adds the commands to a group; ``common`` are the options that measuring commands share."""
    for study in STUDIES:
        group.add_command(_command(study, common))
    group.add_command(features_command)


def _command(study: Study, common: Callable) -> click.Command:
    def run(output: Path, quick: bool, jobs: int, seed: int, device: str, as_json: bool, **given: Any) -> None:
        chosen = {name: value for name, value in given.items() if value is not None}
        try:
            path, results, cells = study.run(output, quick, as_json, jobs, seed=seed, device=device, **chosen)
        except (OSError, ValueError) as error:
            raise click.ClickException(str(error)) from error
        if as_json:
            print_json(results)
            return
        print_table(study.table(results, cells))
        print_path("Rows", path)

    default = {field.name: field.default for field in fields(study.settings)}
    folder = click.Path(path_type=Path)
    options = [
        click.option("--trials", type=click.IntRange(1), help=f"Networks of a kind.  [default: {default['trials']}]"),
        click.option("--epochs", type=click.IntRange(1), help=f"Before, and after.  [default: {default['epochs']}]"),
        click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="Processes side by side."),
        click.option("--quick", is_flag=True, help="A few steps of small networks: to see that it runs."),
        click.option("--output", type=folder, default=Path("out"), show_default=True, help="Folder."),
    ]
    if "data" in default:
        options.insert(0, click.option("--data", help="A data set's name or path.  [default: what is installed]"))
    command = common(run)
    for option in reversed(options):
        command = option(command)
    text = f"{study.about}\n\nA run that was cut goes on where it stopped; rows of other settings are refused."
    return click.command(study.name, help=text)(command)
