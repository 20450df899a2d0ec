"""Fills the tables of tuned configurations on the GPU at hand.

For each operation, structure and batch size every valid candidate is first compared with the eager twin and then timed
with a cold L2; the fastest goes into the device's table of the family, best so far written after each problem, so that
a cut run leaves usable tables. A candidate that cannot run is left out, and its reason counted.

:func:`nearest` asks less: how far the configuration that the rule chooses is from the best of it and its neighbours.
"""

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, fields
from functools import partial
from math import inf, log2
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from fpe.kernels.device import Device
from fpe.kernels.tables import table_name

from .. import accuracy
from ..latency.timing import interleaved
from ..results import provenance
from .ahead import Ahead
from .lost import raise_if_lost
from .tune_jobs import Config, Job, headline_jobs, jobs, small

__all__ = ["Config", "Job", "headline_jobs", "jobs", "nearest", "run", "small", "tune"]


def run(
    todo: list[Job],
    device: Device,
    folder: Path,
    measure: Callable[[Callable[[], Tensor]], float],
    budget: float,
    target: str = "cuda",
    limit: int | None = None,
    report: Callable[[str], None] = print,
    workers: int | None = None,
) -> list[dict[str, Any]]:
    """Tunes jobs in order until the time is used up; returns the tables' entries.

    Args:
        todo: What to tune.
        device: Of the GPU at hand.
        folder: Where the tables go, whole after every job.
        measure: Milliseconds of a call.
        budget: Seconds.
        target: Where tensors are made.
        limit: At most so many candidates for each job, the rule's and others drawn at random.
        report: Called with a line for each job.
        workers: Processes that compile: see :class:`~fpe.bench.gpu.ahead.Ahead`.
    """
    end = time.monotonic() + budget
    entries: list[dict[str, Any]] = []
    with Ahead(device, workers) as ahead:
        for job, after in zip(todo, [*todo[1:], None], strict=True):
            if time.monotonic() > end:
                report(f"time is up: {len(entries)} of {len(todo)} tuned")
                break
            for coming in (job, after):
                if coming is not None:
                    ahead.begin(coming, planned(coming, device, limit))
            try:
                entry, line = tune(job, device, measure, target, limit, ahead, end - time.monotonic())
            except NoneCorrectError as error:
                report(str(error))
                continue
            entries.append(entry)
            report(line)
            write(folder, device, entries)
    return entries


def table_path(folder: Path, family: str, device: Device) -> Path:
    """Where a family's table is written."""
    return folder / table_name(family, device)


def write(folder: Path, device: Device, entries: list[dict[str, Any]]) -> None:
    """Writes each family's table aside and renames it."""
    for family in dict.fromkeys(entry["family"] for entry in entries):
        table = table_path(folder, family, device)
        kept = [entry for entry in entries if entry["family"] == family]
        folder.mkdir(parents=True, exist_ok=True)
        part = table.with_suffix(".part")
        part.write_text(json.dumps({"provenance": provenance(), "entries": kept}, indent=1) + "\n")
        part.replace(table)


class NoneCorrectError(RuntimeError):
    """No candidate of a job ran and was right."""


class Trial(NamedTuple):
    """What came of a candidate.

    Attributes:
        config: The candidate.
        call: Its launch on the job's data, where it ran and was right.
        reason: Why it is left out, in words; empty where it is not.
    """

    config: Config
    call: Callable[[], Tensor] | None
    reason: str = ""


def planned(job: Job, device: Device, limit: int | None = None) -> list[Config]:
    """The candidates of a job, the rule's first.

    Args:
        job: What to tune.
        device: Of the GPU at hand.
        limit: At most so many: the others are drawn at random, the same ones each time.
    """
    problem = job.setup("meta")[2]
    others = list(job.candidates(problem, device))
    if limit is not None and limit <= len(others):
        others = random.Random(0).sample(others, limit - 1)
    return [job.choose(problem, device), *others]


def neighbours(config: Config, others: Iterable[Config], count: int = 5) -> list[Config]:
    """The configurations nearest to one: by how many doublings their numbers are apart, all together.

    A flag that differs counts as one doubling.
    """

    def apart(a: int, b: int) -> float:
        return float(a != b) if isinstance(a, bool) else abs(log2(a / b))

    def distance(other: Config) -> float:
        return sum(apart(getattr(config, f.name), getattr(other, f.name)) for f in fields(config))

    return sorted((other for other in others if other != config), key=distance)[:count]


def trials(job: Job, configs: Iterable[Config], target: str, ahead: Ahead) -> Iterator[Trial]:
    """Launches candidates on a job's data, one after the other, and compares each with the eager twin.

    One that cannot run is a reason, not an error.

    Raises:
        LostError: The device no longer answers.
    """
    launch, eager, _ = job.setup(target)
    expected = accuracy.expected(eager)
    for config in configs:
        reason = ahead.why_not(job, config)
        if reason:
            yield Trial(config, None, reason)
            continue
        try:
            error = accuracy.excess(launch(config=config), *expected, accuracy.dtype_name(job.dtype))
        except Exception as failure:
            raise_if_lost(failure)
            yield Trial(config, None, f"it does not run: {type(failure).__name__}")
            continue
        wrong = "" if error <= 1 else "it is wrong"
        yield Trial(config, None if wrong else partial(launch, config=config), wrong)


def tune(
    job: Job,
    device: Device,
    measure: Callable[[Callable[[], Tensor]], float],
    target: str,
    limit: int | None,
    ahead: Ahead | None = None,
    seconds: float = inf,
) -> tuple[dict[str, Any], str]:
    """The fastest correct configuration of a job, as a table entry, and a line that says so.

    Args:
        job: What to tune.
        device: Of the GPU at hand.
        measure: Milliseconds of a call.
        target: Where tensors are made.
        limit: Of :func:`planned`.
        ahead: Compiles the candidates; without it each is compiled as it is launched.
        seconds: After which no candidate is begun; the best so far counts.

    Raises:
        NoneCorrectError: No candidate ran and was right; the message counts the reasons.
        LostError: The device no longer answers.
    """
    end, configs = time.monotonic() + seconds, planned(job, device, limit)
    best, times, skipped = configs[0], dict[Config, float](), Counter[str]()
    for trial in trials(job, configs, target, ahead or Ahead(device, 0)):
        if trial.call is None:
            skipped[trial.reason] += 1
        else:
            times[trial.config] = measure(trial.call)
            best = min(times, key=times.__getitem__)
        if time.monotonic() > end:
            break
    if not times:
        raise NoneCorrectError(f"no configuration of {job} ran and agrees with the eager twin: {dict(skipped)}")
    rule = times.get(configs[0])
    entry = {
        "family": job.family,
        **job.conditions(job.setup("meta")[2]),
        "max_m": job.m,
        "config": asdict(best),
        "milliseconds": times[best],
        "rule_milliseconds": rule,
        "tried": len(times),
        "skipped": dict(skipped),
    }
    beside = "the rule's does not run" if rule is None else f"rule {rule:.4f}"
    left = len(configs) - len(times) - sum(skipped.values())
    line = f"{job.id}: {times[best]:.4f} ms ({beside}), {len(times)} tried, {sum(skipped.values())} cannot run"
    return entry, line + (f", {left} left when time was up" if left else "")


def nearest(job: Job, device: Device, target: str, ahead: Ahead, seconds: float = 0.2) -> list[dict[str, Any]]:
    """Times the configuration that is chosen beside its five nearest neighbours, all in turns.

    Args:
        job: Whose.
        device: Of the GPU at hand.
        target: Where tensors are made.
        ahead: Compiles the candidates.
        seconds: To spend on all, roughly.

    Returns:
        A row for each configuration: ``chosen`` marks the one that is chosen; ``over_best`` is its time over that of
        the fastest, or ``status`` ``"absent"`` and a ``reason``.
    """
    problem = job.setup("meta")[2]
    chosen = job.choose(problem, device)
    configs = [chosen, *neighbours(chosen, job.candidates(problem, device))]
    ahead.begin(job, configs)
    found = list(trials(job, configs, target, ahead))
    calls = {str(i): trial.call for i, trial in enumerate(found) if trial.call is not None}
    taken = interleaved(calls, target, seconds) if calls else {}
    fastest = min((t.median for t in taken.values()), default=inf)
    rows = []
    for i, trial in enumerate(found):
        row = {"job": job.id, "N": job.shape[0], "K": job.shape[1], "M": job.m, "chosen": trial.config == chosen}
        row |= {"family": job.family, **job.conditions(problem), "config": asdict(trial.config)}
        if str(i) in taken:
            rows.append({**row, **taken[str(i)].columns(), "over_best": taken[str(i)].median / fastest})
        else:
            rows.append({**row, "status": "absent", "reason": trial.reason})
    return rows


def device_milliseconds(call: Callable[[], object]) -> float:
    """The device's own time of a call, from a cold L2: what the tuner compares."""
    return interleaved({"call": call}, "cuda", seconds=0.02, rounds=(5, 20))["call"].median
