"""How ``fpe gpu`` runs a step: units that are skipped where they are done, cut by the clock, and red each on its own.

A step's rows go to ``<step>.jsonl``, those of a unit appended whole as it ends, with the unit's ``key`` and the ``run``
that made them. A unit that is there is not run again, but for one of an earlier run in which something was red or
blocked: it is tried again, and its rows take the place of the old ones.
"""

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..results import Results, provenance
from .lost import LostError, raise_if_lost

Rows = list[dict[str, Any]]
RED = ("wrong", "error")
"""Statuses of a row that say that something is not as it must be."""
AGAIN = (*RED, "blocked")
"""Statuses that another run tries again."""
PATIENCE = (60.0, 5.0)
"""A unit that takes longer than so many seconds and so many times what is expected of it is taken to hang."""


@dataclass(frozen=True)
class Unit:
    """The smallest part of a step: it is done, or not.

    Attributes:
        key: Its name, the same in every run.
        work: Does it and returns its rows.
        seconds: That it is expected to take.
        rows: That it is expected to bring, at least.
    """

    key: str
    work: Callable[[], Rows]
    seconds: float
    rows: int = 1


@dataclass
class Context:
    """What the steps share.

    Attributes:
        device: ``"cuda"``, or ``"cpu"`` in a dry run.
        folder: Of the rows.
        deadline: Of ``clock``: no unit begins that would not end by then.
        run: Name of this run: red rows of another are tried again.
        say: Called with a line of progress.
        providers: Who is timed; all without one.
        provenance: Of the machine and the code.
        arch: Compute capability that kernels are compiled for, as 90.
        jobs: Processes that compile.
        clock: Seconds.
    """

    device: str
    folder: Path
    deadline: float
    run: str = "1"
    say: Callable[[str], None] = print
    providers: tuple[str, ...] = ()
    provenance: dict[str, Any] = field(default_factory=provenance)
    arch: int = 80
    jobs: int = 1
    clock: Callable[[], float] = time.monotonic

    @property
    def dry(self) -> bool:
        """Whether this only walks the plan."""
        return self.device == "cpu"

    @property
    def settings(self) -> dict[str, Any]:
        """Of every step's file."""
        name = "CPU, dry run" if self.dry else self.provenance["device"]
        return {"device": name, "dry_run": self.dry}

    def path(self, step: str) -> Path:
        """The results file of a step."""
        return self.folder / f"{step}.jsonl"

    def rows(self, step: str) -> Rows:
        """Rows of a step, none where it was not run."""
        return Results.read(self.path(step)).rows if self.path(step).exists() else []

    def results(self, step: str) -> Results:
        """Rows of a step to be added to.

        Raises:
            ValueError: The file is damaged or of another device.
        """
        return Results.resume(self.path(step), step, self.settings, self.provenance)

    @property
    def beat(self) -> Path:
        """The file that says what is being done, for whoever watches."""
        return self.folder / ".now.json"


@dataclass(frozen=True)
class Step:
    """A part of the plan.

    Attributes:
        name: As in ``--only``, and of its file.
        units: Lists what is to be done, without touching the device.
        help: What it does.
        share: Of the whole time, at most.
    """

    name: str
    units: Callable[[Context], Iterator[Unit]]
    help: str
    share: float = 1.0


def run(step: Step, context: Context, budget: float) -> None:
    """Runs a step's units that are not done yet, for as long as there is time.

    Raises:
        ValueError: The step's file is damaged or of another run.
        LostError: The device no longer answers; the unit that lost it has a red row.
    """
    results = context.results(step.name)
    done, stop = settled(results.rows, context.run), min(context.deadline, context.clock() + step.share * budget)
    ran = left = 0
    for unit in step.units(context):
        if unit.key in done:
            continue
        if context.clock() + unit.seconds > stop:
            left += 1
            continue
        begin(context, step.name, unit)
        start, lost = context.clock(), None
        try:
            rows = unit.work() or [{"status": "absent", "reason": "nothing to do"}]
        except Exception as error:  # a row and a red line, and the rest of the plan goes on
            rows, lost = [failed(error)], _lost(error)
        keep(context, results, unit.key, rows, context.clock() - start)
        context.beat.unlink(missing_ok=True)
        ran += 1
        if lost:
            raise lost
    context.say(f"{step.name}: {ran} done, {len(done)} were there, {left} left for another run")


def settled(rows: Rows, this_run: str) -> set[str]:
    """Keys that are not to be run: of units with nothing to try again, and of those that this run has tried."""
    again = {row["key"] for row in rows if row.get("status") in AGAIN and row.get("run") != this_run}
    return {row["key"] for row in rows} - again


def begin(context: Context, step: str, unit: Unit) -> None:
    """Tells whoever watches what begins, and when it is to be taken for a hang."""
    limit = time.time() + PATIENCE[0] + PATIENCE[1] * unit.seconds
    part = context.beat.with_suffix(".part")
    part.write_text(json.dumps({"step": step, "key": unit.key, "began": time.time(), "limit": limit}))
    part.replace(context.beat)


def keep(context: Context, results: Results, key: str, rows: Rows, seconds: float) -> None:
    """Writes a unit's rows, in the place of an earlier run's; says what is red."""
    path = context.path(results.study)
    if any(row["key"] == key for row in results.rows):
        results.rows[:] = [row for row in results.rows if row["key"] != key]
        results.write(path)
    results.append(path, *({"key": key, "run": context.run, **row, "seconds": seconds} for row in rows))
    for row in rows:
        if row.get("status") in RED:
            context.say(f"  RED {in_words(results.study, {'key': key, **row})}")


def in_words(step: str, row: dict[str, Any]) -> str:
    """A red row on one line."""
    who = " ".join(row[name] for name in ("provider", "of_pass") if name in row)
    return f"{step}: {row['key']}{': ' * bool(who)}{who}: {row['reason']}"


def failed(error: Exception) -> dict[str, Any]:
    """The row of a unit that raised: absent where only room or time was short."""
    short = isinstance(error, (torch.OutOfMemoryError, subprocess.TimeoutExpired))
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return {"status": "absent" if short else "error", "reason": reason}


def _lost(error: Exception) -> LostError | None:
    try:
        raise_if_lost(error)
    except LostError as lost:
        return lost
    return None


def red(context: Context, steps: tuple[str, ...]) -> list[str]:
    """What is red of this run, as lines."""
    return [
        in_words(step, row)
        for step in steps
        for row in context.rows(step)
        if row.get("status") in RED and row.get("run") == context.run
    ]
