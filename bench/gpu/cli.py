"""The command line of ``fpe gpu``, on the standard library's parser: a GPU machine may lack the one of the others."""

import argparse
import math
import os
import re
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from shutil import get_terminal_size
from typing import Any, NoReturn

import torch

from ..latency.providers import OURS, PROVIDERS, find
from ..results import provenance
from ..table import Table, raw
from . import archive
from .lost import LostError
from .plan import STEPS, promised, walk
from .steps import Context, Rows, keep, red
from .supervise import supervise

NAMES = tuple(step.name for step in STEPS)
WORKER = (sys.executable, "-m", "fpe.bench.gpu.worker")
START = 8.0
"""Seconds until a process has imported everything and the device is ready."""
PACKED_EVERY = 10.0
"""Seconds between two archives while the measurement runs."""
CORES = 16
"""Of a GPU machine, for a plan that is made elsewhere."""


class _Parser(argparse.ArgumentParser):
    """A parser whose messages have the form of the other commands'."""

    def error(self, message: str) -> NoReturn:
        """Says what is wrong, and ends with status 2."""
        self.print_usage(sys.stderr)
        said = re.sub(r"^argument (\S+): ", r"Invalid value for '\1': ", message)
        self.exit(2, f"Error: {said}\n")


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = _Parser(
        prog="fpe gpu",
        description="Measure everything that needs a GPU. Every result is checked before it is timed. A wrong result "
        "is red: it gets no time, and everything else goes on. Rows are written as they come, so an interrupted run "
        "leaves results, and the same command continues it.",
        epilog="steps, in order: " + "; ".join(f"{step.name} ({step.help})" for step in STEPS),
    )
    made.add_argument("--minutes", type=_minutes, default=9.0, metavar="N", help="start nothing that ends later [9]")
    made.add_argument("--plan", action="store_true", help="print what is measured when, without a GPU")
    made.add_argument("--json", dest="form", action="store_const", const="json", help="print the plan's rows as JSON")
    made.add_argument("--csv", dest="form", action="store_const", const="csv", help="print the plan's rows as CSV")
    made.add_argument("--merge", type=Path, metavar="ARCHIVE", help="put an archive into bench/results/<device>/")
    made.add_argument("--only", nargs="+", action="extend", choices=NAMES, metavar="STEP", help="run only these steps")
    made.add_argument(
        "--provider",
        dest="providers",
        nargs="+",
        action="extend",
        metavar="NAME",
        help=f"any of {', '.join(PROVIDERS)} [all]",
    )
    made.add_argument("--output", type=Path, default=Path("out/gpu"), metavar="FOLDER",
                      help=f"folder for {archive.NAME} and summary.txt [out/gpu]")  # fmt: skip
    made.add_argument(
        "--rows", type=Path, metavar="FOLDER", help="folder for the rows while it runs [out/gpu/<device>]"
    )
    made.add_argument("--resume", type=Path, metavar="ARCHIVE", help="continue with another machine's rows")
    made.add_argument("--commit", metavar="HASH", help="commit of the code, if it is not a git checkout")
    made.add_argument("--jobs", type=_jobs, metavar="N", help=f"processes that compile [all cores; {CORES} in a plan]")
    made.add_argument("--dry-run", action="store_true", help="run the plan on the CPU, small and eager")
    return made


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number of minutes, got {text}")
    return value


def _jobs(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a positive number of processes, got {text}")
    return int(text)


def main(arguments: Sequence[str] | None = None, worker: Sequence[str] = WORKER) -> int:
    """Runs the plan; returns the exit status: 0, or 1 where something was red or stood in the way.

    Args:
        arguments: Of the command line.
        worker: The command that measures.
    """
    options = parser().parse_args(arguments)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS wants it for equal bits, as the gate does
    try:
        if options.merge:
            for path in archive.merge(options.merge):
                print(path)
            return 0
        find(tuple(options.providers or ()))
        if options.plan:
            device = torch.cuda.get_device_name() if torch.cuda.is_available() else "NVIDIA H200"
            context = planning(device, options.providers or (), options.jobs or CORES)
            table = plan_table(context, options.only or NAMES, 60 * options.minutes)
            if options.form:
                print(raw(table.records(), options.form), end="")
            else:
                print(table.fitted(_width()))
            return 0
        if options.form:
            raise ValueError("--json and --csv print a plan: give --plan too; a run writes its rows to files")
        if not options.dry_run and not torch.cuda.is_available():
            raise ValueError("it needs a CUDA device, and PyTorch sees none; --dry-run runs the plan on the CPU, small")
        problems = _measure(options, worker)
    except (ValueError, OSError, LostError) as error:
        return _fail(str(error))
    return _fail(f"{len(problems)} went wrong, first {problems[0]}") if problems else 0


def _fail(message: str) -> int:
    print(f"Error: {message}", file=sys.stderr)
    return 1


def planning(device: str = "NVIDIA H200", providers: Sequence[str] = (), jobs: int = CORES) -> Context:
    """The context of a plan for a device, with the published roof of it."""
    return Context("cuda", Path(), 0.0, providers=tuple(providers), provenance={"device": device}, arch=90, jobs=jobs)


def _measure(options: argparse.Namespace, worker: Sequence[str]) -> list[str]:
    """Measures, and leaves the archive and the summary; returns what is red."""
    begun, device = time.time(), "cpu" if options.dry_run else "cuda"
    slug = "dry-run" if options.dry_run else archive.slug(torch.cuda.get_device_name())
    folder, seconds, steps = options.rows or options.output / slug, 60 * options.minutes, options.only or NAMES
    folder.mkdir(parents=True, exist_ok=True)
    if options.resume:
        archive.unpack(options.resume, folder)
    given: dict[str, Any] = {
        "device": device,
        "folder": str(folder),
        "deadline": begun + seconds,
        "run": time.strftime("%Y%m%dT%H%M%S", time.gmtime(begun)),
        "providers": options.providers or (),
        "commit": options.commit,
        "jobs": options.jobs or os.cpu_count() or 1,
        "steps": list(steps),
        "seconds": seconds,
    }
    made = provenance(options.commit)
    context = Context(device, folder, given["deadline"], given["run"], provenance=made, arch=90, clock=time.time)
    context.providers, context.jobs = tuple(given["providers"]), given["jobs"]
    runs, packed = context.results("runs"), begun
    asked = {"minutes": options.minutes, "steps": list(steps)}
    runs.append(context.path("runs"), {"key": context.run, "run": context.run, **made, **asked})

    def pack_now_and_then() -> None:
        nonlocal packed
        if time.time() - packed > PACKED_EVERY:
            packed = time.time()
            archive.pack(folder, options.output / archive.NAME)

    try:
        if options.dry_run:
            walk(context, steps, seconds)
        else:
            supervise(worker, given, context, pack_now_and_then)
    finally:
        keep(context, runs, context.run, [{**made, **asked}], time.time() - begun)
        problems = red(context, NAMES)
        text = summary(context, problems)
        print(f"\n{text}")
        archive.pack(folder, options.output / archive.NAME)
        (options.output / "summary.txt").write_text(text + "\n")
        print(f"{(options.output / archive.NAME).resolve()}")
    return problems


def summary(context: Context, problems: Sequence[str]) -> str:
    """What was measured, short: ours over the yardsticks, and what is red."""
    rows = context.rows("latency")
    parts = [headline(rows, context.dry).fitted(_width())] if rows else ["nothing was timed"]
    red = [textwrap.fill(problem, _width(), break_on_hyphens=False, break_long_words=False) for problem in problems]
    return "\n\n".join([*parts, *(["\n".join(["Red:", *red])] if red else [])])


def _width() -> int:
    """Characters in a line of the terminal, or ``COLUMNS``; 80 where nobody says."""
    return get_terminal_size((80, 24)).columns


def headline(rows: Rows, dry: bool = False) -> Table:
    """Forward times of the layers over the parent's and the wide dense layer's.

    Args:
        rows: Of the latency step.
        dry: Whether they come from a dry run, which the title then says.
    """
    timed = [r for r in rows if r.get("milliseconds") and r["pass"] == "forward" and r["level"] in ("op", "merge")]
    names = ("level", "N", "K", "alpha", "structure", "M")
    cells = []
    for case in dict.fromkeys(tuple(r[name] for name in names) for r in timed):
        group = {r["provider"]: r for r in timed if tuple(r[name] for name in names) == case}
        ours = min((r for n, r in group.items() if n.startswith(OURS)), key=lambda r: r["milliseconds"], default=None)
        if ours is None or not {"parent", "wide"} <= set(group):
            continue
        level, n, k, alpha, structure, m = case
        over = [f"{ours['milliseconds'] / group[name]['milliseconds']:.3f}" for name in ("parent", "wide")]
        layer = f"{n}x{k}" if level == "op" else f"after {n}x{k}"
        shown = (layer, f"{alpha}", structure, f"{m}", ours["provider"], f"{1e3 * ours['milliseconds']:.1f}")
        cells.append((*shown, *over))
    title = "Forward, measured" + (" on the CPU in a dry run: no GPU figures" if dry else "")
    return Table(title, ("layer", "alpha", "structure", "M", "fastest", "us", "over parent", "over wide"), cells)


def plan_table(context: Context, names: Sequence[str], seconds: float) -> Table:
    """What is measured when, by the cost model and by what kernels took to compile offline."""
    found, rows = promised(context, names, seconds, START), []
    for step in STEPS:
        mine = [p for p in found if p.step is step]
        ends = [p.end for p in mine if p.end is not None]
        if mine:
            sizes = f"{len(ends)} of {len(mine)}", f"{max(ends) / 60:.1f}" if ends else "-"
            left = sum(p.unit.seconds for p in mine if p.end is None)
            rows.append((step.name, *sizes, f"{left / 60:.1f}" if left else "-", step.help))
    title = (
        f"{seconds / 60:g} minutes, {context.provenance['device']}, {context.jobs} cores: expected by the cost model, "
        "not measured"
    )
    return Table(title, ("step", "units", "done after min", "min left", "what"), rows)
