"""A study as a list of cells: run, written after each, resumed where it was cut."""

import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import click
import torch
from joblib import Parallel, delayed

from fpe.expansion import PaddingWarning

from ..cli.options import EPOCHS_HELP, common, data_option, epochs_option, one_job_option, output_option, trials_option
from ..cli.output import GOES_ON, print_path, print_results, print_table, stopping
from ..cli.progress import progress
from ..results import Results, commits
from ..table import Table
from .study import Study, committed


class ImpossibleError(ValueError):
    """A cell that cannot exist: its data do not admit its masks. The others can go on."""


@dataclass(frozen=True)
class Settings:
    """What the cells of a study share; each study has defaults of its own, and more fields.

    Attributes:
        trials: Networks trained for each cell.
        epochs: Epochs before and again after the split.
        seed: Seed of all randomness.
        device: Where networks are trained.
    """

    trials: int = 5
    epochs: int = 25
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True)
class Sweep(Study):
    """A study whose configurations are independent of one another.

    Attributes:
        about: The command's help.
        rows_in: Name of its results. Studies of one name and data share a file, so that a cell runs once.
        settings: What its cells share, with ``data`` among the fields where the study reads some.
        cells: Its configurations: dataclasses whose fields every row of theirs carries.
        run_cell: From a cell and the settings to the cell's rows.
        table: From the results and cells to what is printed.
        small: Cells of ``--quick``.
        quick: Settings of ``--quick``, by name.
        epochs_help: What the epochs of its settings are.
    """

    about: str
    rows_in: str
    settings: type[Settings]
    cells: Callable[[], Sequence[Any]]
    run_cell: Callable[[Any, Any], list[dict[str, Any]]]
    table: Callable[[Results, Sequence[Any]], Table]
    small: Sequence[Any]
    quick: dict[str, Any]
    epochs_help: str = EPOCHS_HELP

    def run(
        self, folder: Path, quick: bool = False, quiet: bool = False, jobs: int = 1, **given: Any
    ) -> tuple[Path, Results, Sequence[Any]]:
        """Runs the cells that the study's file lacks under a progress bar, each on one core.

        A cell that cannot exist is left out; standard error says which, and why.

        Args:
            folder: Where the file lies, or will.
            quick: A few steps of small cells, in a file of their own.
            quiet: No progress bar.
            jobs: Cells that run side by side, each in a process of its own; rows are the same for any number.
            **given: Settings that differ from the study's.

        Returns:
            The file, all its rows, and the study's cells, without those that cannot exist.

        Raises:
            OSError: There is no such data.
            ValueError: The data are of another kind, or the file was made with other settings.
        """
        settings = self.settings(**{**(self.quick if quick else {}), **given})
        cells = list(dict.fromkeys(self.small if quick else self.cells()))
        shared = asdict(settings)
        del shared["device"]  # stands in the provenance
        path = self.path(folder, quick, settings)
        if "data" in shared:
            shared["data"] = Path(shared["data"]).stem
        results = _begin(self.rows_in, shared, path)
        todo = [cell for cell in cells if len(_rows_of(cell, results.rows)) < settings.trials]
        for cell in todo:  # a cell of which a file was cut runs again
            for row in _rows_of(cell, results.rows):
                results.rows.remove(row)
        parallel = Parallel(jobs, return_as="generator", batch_size=1)
        made = parallel(delayed(_on_one_core)(self.run_cell, cell, settings) for cell in todo)
        impossible = []
        shown = progress(made, self.name, len(cells), len(cells) - len(todo), quiet)
        for cell, (rows, reason) in zip(todo, shown, strict=True):
            if reason:
                impossible.append(cell)
                print(f"{self.name}: left out {cell}: {reason}", file=sys.stderr)
                continue
            results.rows.extend(rows)
            results.write(path)
        return path, results, [cell for cell in cells if cell not in impossible]

    def shown(self, rows: str) -> Table:
        """Its table of all cells, from committed rows by the file's name."""
        return self.table(committed(rows), list(dict.fromkeys(self.cells())))

    def command(self) -> click.Command:
        """A command with the study's settings for options."""

        def run(output: Path, quick: bool, jobs: int, seed: int, device: str, form: str | None, **given: Any) -> None:
            chosen = {name: value for name, value in given.items() if value is not None}
            try:
                with stopping(GOES_ON):
                    path, results, cells = self.run(output, quick, bool(form), jobs, seed=seed, device=device, **chosen)
            except FileNotFoundError as error:
                raise click.BadParameter(str(error), param_hint="'--data'") from error
            except (OSError, ValueError) as error:
                raise click.ClickException(str(error)) from error
            if form:
                print_results(results, form)
                return
            print_table(self.table(results, cells))
            print_path("Rows", path)

        default = {field.name: field.default for field in fields(self.settings)}
        options = [
            trials_option(default["trials"]),
            epochs_option(default["epochs"], self.epochs_help),
            one_job_option,
            click.option("--quick", is_flag=True, help="A few steps of small networks: to see that it runs."),
            output_option(),
        ]
        if "data" in default:
            options.insert(0, data_option)
        command = common(run)
        for option in reversed(options):
            command = option(command)
        text = f"{self.about}\n\nThe same command continues an interrupted run; rows of other settings are refused."
        return click.command(self.name, help=text)(command)

    def path(self, folder: Path, quick: bool, settings: Any) -> Path:
        """The study's file in a folder."""
        data = f"-{Path(settings.data).stem}" if hasattr(settings, "data") else ""
        return folder / f"{self.rows_in}{data}{'-quick' if quick else ''}.jsonl"


def _on_one_core(run_cell: Callable, cell: Any, settings: Any) -> tuple[list[dict[str, Any]], str]:
    """A cell's rows, or why it has none."""
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PaddingWarning)  # blocks that fit badly are a study's own choice
        try:
            return run_cell(cell, settings), ""
        except ImpossibleError as error:
            return [], str(error)


def _begin(name: str, settings: dict[str, Any], path: Path) -> Results:
    """The rows that a file holds already, none where there is no file; the provenance names the commits of all runs."""
    fresh = Results(name, settings, [])
    if not path.exists():
        return fresh
    before = Results.read(path, cut=True)
    if before.study != name or dict(before.settings) != settings:
        raise ValueError(
            f"{path} holds {before.study} with {dict(before.settings)}; expected {name} with {settings}: move it away "
            "or choose another folder"
        )
    return replace(before, provenance={**before.provenance, "commit": commits(before.provenance, fresh.provenance)})


def _rows_of(cell: Any, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    wanted = asdict(cell).items()
    return [row for row in rows if wanted <= row.items()]
