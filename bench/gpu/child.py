"""What other tools watch: a few launches in a process of their own, for Nsight Compute and compute-sanitizer."""

import csv
import io
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch

from ..latency.problems import Case, Problem
from ..latency.providers import find
from ..latency.shapes import SETS
from ..latency.suite import call
from ..latency.timing import flusher
from . import gate, guard
from .checks import checks

MARKER = "linspace"
"""A kernel of this name is launched before each call that is watched."""
METRICS = "dram__bytes_read.sum,dram__bytes_write.sum"
PASSES = ("forward", "dX", "dW")
WATCHED = ("parent", "wide", "fpe/auto")


def watch(
    command: Sequence[str], seconds: float, environment: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """Runs a command that starts processes of its own, and leaves none of them behind.

    A tool that is killed does not take what it watches with it, which would go on holding the device. Both are put into
    a process group of their own, and what is left of the group is killed when the command ends, however it does; also
    where this process is killed: the group's leader is a guard that notices (:mod:`fpe.bench.gpu.guard`).

    Args:
        command: Program and arguments.
        seconds: At most.
        environment: Instead of this process's.

    Returns:
        Status and output, as :func:`subprocess.run` does; a signal that ended it counts as 128 and its number.

    Raises:
        TimeoutExpired: It took longer; ``output`` holds what it had printed.
    """
    pipe, guarded = subprocess.PIPE, [sys.executable, guard.__file__, *command]
    told, held = os.pipe()  # one of Popen's would be closed by communicate()
    with os.fdopen(held, "wb"), os.fdopen(told) as stdin, subprocess.Popen(
        guarded, stdin=stdin, stdout=pipe, stderr=pipe, text=True, env=environment, start_new_session=True
    ) as process:  # fmt: skip
        try:
            output, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            _kill_group(process.pid)
            output, errors = process.communicate()
            raise subprocess.TimeoutExpired(command, seconds, output, errors) from None
        finally:
            _kill_group(process.pid)
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


def _kill_group(leader: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def traffic_cases() -> list[Case]:
    """The layers whose DRAM bytes are measured."""
    n, k = SETS["headline"][0]
    return [Case(m, n, k, structure=s) for m in (1, 64, 1024, 8192) for s in ("block", "random")]


def watched() -> Iterator[dict[str, Any]]:
    """The calls of :func:`run_traffic` in their order, as rows without results."""
    for case in traffic_cases():
        for name in WATCHED:
            for pass_ in PASSES:
                yield {"pass": pass_, "provider": name, **case.row()}


def run_traffic() -> None:
    """Makes every watched call once between the profiler's start and stop, from a cold L2."""
    flush = flusher("cuda")
    for case in traffic_cases():
        problem = Problem.make(case, "cuda")
        for provider in find(WATCHED):
            module = provider.build(problem, False)
            for pass_ in PASSES:
                made = call(problem, module, pass_)
                assert made is not None
                made()
                flush()
                torch.cuda.synchronize()
                torch.cuda.profiler.start()
                torch.linspace(0, 1, 8, device="cuda")
                made()
                torch.cuda.synchronize()
                torch.cuda.profiler.stop()


def read_traffic(output: str, calls: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Reads Nsight Compute's CSV into rows with ``dram_read``, ``dram_write`` and ``kernels``.

    Args:
        output: Standard output of ``ncu --csv --print-units base``.
        calls: From :func:`watched`; fewer calls in the output than here are a run that was cut.

    Raises:
        ValueError: The output has no such table.
    """
    table = [line for line in output.splitlines() if line.startswith('"')]
    lines = list(csv.DictReader(io.StringIO("\n".join(table))))
    if not lines or not {"ID", "Kernel Name", "Metric Name", "Metric Value"} <= set(lines[0]):
        raise ValueError(f"expected Nsight Compute's CSV, got {output[-300:].strip()!r}")
    found: list[dict[str, Any]] = []
    kernels: set[str] = set()
    for line in lines:
        if MARKER in line["Kernel Name"]:
            if line["ID"] not in kernels:
                found.append({"dram_read": 0.0, "dram_write": 0.0, "kernels": 0})
                kernels.add(line["ID"])
            continue
        if not found:
            continue
        column = "dram_read" if "read" in line["Metric Name"] else "dram_write"
        found[-1][column] += float(line["Metric Value"].replace(",", ""))
        found[-1]["kernels"] += line["ID"] not in kernels
        kernels.add(line["ID"])
    return [{**row, **counts} for row, counts in zip(calls, found, strict=False)]


def run_gate() -> None:
    """A few checks of each family; prints those that are red and exits with 1 if there are any."""
    rows = [gate.compare(check, dtype, "auto", "cuda") for check in checks(few=True) for dtype in ("bf16", "fp32")]
    red = [row for row in rows if row["status"] in ("wrong", "error")]
    print(*red, f"{len(rows) - len(red)} of {len(rows)} checks are right", sep="\n")
    sys.exit(bool(red))


if __name__ == "__main__":
    {"traffic": run_traffic, "gate": run_gate}[sys.argv[1]]()
