"""A study as a list of cells: run, written after each, resumed where it was cut."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from joblib import Parallel, delayed

from ..cli.progress import progress
from ..results import Results
from ..table import Table


class ImpossibleError(ValueError):
    """A cell that cannot exist: its data do not admit its masks. The others can go on."""


@dataclass(frozen=True)
class Study:
    """A study whose configurations are independent of one another.

    Attributes:
        name: Of its command.
        about: The command's help.
        rows_in: Name of its results. Studies of one name and data share a file, so that a cell runs once.
        settings: What its cells share, a dataclass with defaults; among its fields ``trials``, ``epochs``, ``seed``
            and ``device``, and ``data`` where the study reads some.
        cells: Its configurations: dataclasses whose fields every row of theirs carries.
        run_cell: From a cell and the settings to the cell's rows.
        table: From the results and cells to what is printed.
        small: Cells of ``--quick``.
        quick: Settings of ``--quick``, by name.
    """

    name: str
    about: str
    rows_in: str
    settings: type
    cells: Callable[[], Sequence[Any]]
    run_cell: Callable[[Any, Any], list[dict[str, Any]]]
    table: Callable[[Results, Sequence[Any]], Table]
    small: Sequence[Any]
    quick: dict[str, Any]

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
            shared["data"] = Path(settings.data).stem
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

    def path(self, folder: Path, quick: bool, settings: Any) -> Path:
        """The study's file in a folder."""
        data = f"-{Path(settings.data).stem}" if hasattr(settings, "data") else ""
        return folder / f"{self.rows_in}{data}{'-quick' if quick else ''}.jsonl"


def _on_one_core(run_cell: Callable, cell: Any, settings: Any) -> tuple[list[dict[str, Any]], str]:
    """A cell's rows, or why it has none."""
    torch.set_num_threads(1)
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
    commits = dict.fromkeys([*str(before.provenance.get("commit")).split(", "), str(fresh.provenance["commit"])])
    return replace(before, provenance={**before.provenance, "commit": ", ".join(commits)})


def _rows_of(cell: Any, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    wanted = asdict(cell).items()
    return [row for row in rows if wanted <= row.items()]
