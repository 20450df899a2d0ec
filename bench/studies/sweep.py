"""A study as a list of cells: run, written after each, resumed where it was cut."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from joblib import Parallel, delayed
from rich.progress import track

from ..results import Results
from ..summary import Table


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

        Args:
            folder: Where the file lies, or will.
            quick: A few steps of small cells, in a file of their own.
            quiet: No progress bar.
            jobs: Cells that run side by side, each in a process of its own; rows are the same for any number.
            **given: Settings that differ from the study's.

        Returns:
            The file, all its rows, and the study's cells.

        Raises:
            OSError: There is no such data.
            ValueError: The data are of another kind, or the file was made with other settings.
        """
        settings = self.settings(**{**(self.quick if quick else {}), **given})
        cells = list(dict.fromkeys(self.small if quick else self.cells()))
        shared = asdict(settings)
        del shared["device"]  # stands in the provenance
        path = folder / f"{self.rows_in}{'-quick' if quick else ''}.jsonl"
        if "data" in shared:
            shared["data"] = Path(settings.data).stem
            path = path.with_stem(path.stem.replace(self.rows_in, f"{self.rows_in}-{shared['data']}"))
        results = _begin(self.rows_in, shared, path)
        todo = [cell for cell in cells if not _done(cell, results.rows)]
        parallel = Parallel(jobs, return_as="generator", batch_size=1)
        done = parallel(delayed(_on_one_core)(self.run_cell, cell, settings) for cell in todo)
        for rows in track(done, description=self.name, total=len(todo), disable=quiet):
            results.rows.extend(rows)
            results.write(path)
        return path, results, cells


def _on_one_core(run_cell: Callable, cell: Any, settings: Any) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    return run_cell(cell, settings)


def _begin(name: str, settings: dict[str, Any], path: Path) -> Results:
    """The rows that a file holds already, none where there is no file; the provenance names the commits of all runs."""
    fresh = Results(name, settings, [])
    if not path.exists():
        return fresh
    before = Results.read(path)
    if before.study != name or dict(before.settings) != settings:
        raise ValueError(
            f"{path} holds {before.study} with {dict(before.settings)}; expected {name} with {settings}: move it away "
            "or choose another folder"
        )
    commits = dict.fromkeys([*str(before.provenance.get("commit")).split(", "), str(fresh.provenance["commit"])])
    return replace(before, provenance={**before.provenance, "commit": ", ".join(commits)})


def _done(cell: Any, rows: list[dict[str, Any]]) -> bool:
    wanted = asdict(cell).items()
    return any(wanted <= row.items() for row in rows)
