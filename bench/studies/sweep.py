"""A study as a list of cells: run one after the other, written after each, resumed where it was cut."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from ..results import Results


def run(
    name: str,
    settings: dict[str, Any],
    cells: Sequence[Any],
    run_cell: Callable[[Any], list[dict[str, Any]]],
    path: Path,
    what: str,
    quiet: bool = False,
) -> Results:
    """Runs the cells of a study that its file does not hold yet, on one core, under a progress bar.

    Args:
        name: Of the file's contents.
        settings: Every choice that all cells share.
        cells: Dataclasses; every row of a cell carries its fields.
        run_cell: From a cell to its rows.
        path: The file; rows that it holds of the same settings are kept.
        what: Label of the progress bar.
        quiet: No progress bar.

    Raises:
        ValueError: The file was made with other settings.
    """
    results = Results(name, settings, [])
    if path.exists():
        before = Results.read(path)
        if before.study != name or dict(before.settings) != settings:
            raise ValueError(
                f"{path} holds {before.study} with {dict(before.settings)}; expected {name} with {settings}: move it "
                "away or choose another folder"
            )
        results = before
    torch.set_num_threads(1)
    todo = [cell for cell in cells if not _done(cell, results.rows)]
    for cell in track(todo, description=what, disable=quiet):
        results.rows.extend(run_cell(cell))
        results.write(path)
    return results


def _done(cell: Any, rows: list[dict[str, Any]]) -> bool:
    wanted = asdict(cell).items()
    return any(wanted <= row.items() for row in rows)
