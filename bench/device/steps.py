"""The plan of ``fpe gpu``: steps in the order of what matters, each a list of units that can be skipped or cut.

A step's rows go to ``<step>.jsonl``, one appended whole as it comes, with the unit's ``key``; a unit whose key is there
is not run again.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fpe.kernels.device import KNOWN, device_of, interpreting
from fpe.kernels.dispatch import BACKENDS
from fpe.kernels.model import Roof

from .. import shapes, suite, tune
from ..problems import Case
from ..providers import PROVIDERS, Provider, find
from ..results import Results
from . import child, gate
from . import roof as roofs

Unit = tuple[str, Callable[[], list[dict[str, Any]]]]


class RedError(Exception):
    """A correctness check failed or was not made: nothing is timed."""


class LostError(Exception):
    """The device no longer answers this process."""


@dataclass
class Context:
    """What the steps share.

    Attributes:
        device: ``"cuda"``, or ``"cpu"`` in a dry run.
        output: Folder of the results.
        deadline: ``time.monotonic()`` at which no unit begins any more.
        say: Called with a line of progress.
        providers: Who is timed.
        problems: Keys of units that went wrong.
    """

    device: str
    output: Path
    deadline: float
    say: Callable[[str], None] = print
    providers: tuple[str, ...] = ()
    problems: list[str] = field(default_factory=list)

    @property
    def dry(self) -> bool:
        """Whether this only walks the plan."""
        return self.device == "cpu"

    def path(self, step: str) -> Path:
        """The results file of a step."""
        return self.output / f"{step}.jsonl"


@dataclass(frozen=True)
class Step:
    """A part of the plan.

    Attributes:
        name: As in ``--only``, and of its file.
        units: Lists what is to be done.
        share: Of the whole budget, at most.
        help: What it does.
    """

    name: str
    units: Callable[[Context], Iterator[Unit]]
    share: float
    help: str


def run(step: Step, context: Context, budget: float) -> None:
    """Runs a step's units that are not done yet, until its share of the time or all of it is used up.

    Raises:
        ValueError: The step's file is damaged or of another run.
        RedError: The step times something and the gate is not green.
        LostError: Nothing can be run any more.
    """
    name = "CPU, dry run" if context.dry else torch.cuda.get_device_name()
    path = context.path(step.name)
    results = Results.resume(path, step.name, {"device": name, "dry_run": context.dry})
    done, stop = {row["key"] for row in results.rows}, min(context.deadline, time.monotonic() + step.share * budget)
    ran = left = 0
    for key, work in step.units(context):
        if key in done:
            continue
        if time.monotonic() > stop:
            left += 1
            continue
        start = time.perf_counter()
        try:
            rows = work()
        except Exception as error:  # a row and a red line, and the rest of the plan goes on
            no_room = isinstance(error, (torch.OutOfMemoryError, subprocess.TimeoutExpired))
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            rows = [{"status": "absent" if no_room else "error", "reason": reason}]
            lost = "CUDA error" in reason
        else:
            lost = False
        spent = time.perf_counter() - start
        kept = rows or [{"status": "absent", "reason": "nothing to do"}]
        results.append(path, *({"key": key, **row, "seconds": spent} for row in kept))
        ran += 1
        bad = [row["reason"] for row in rows if row.get("status") in ("wrong", "error")]
        if bad:
            context.problems.append(f"{step.name}: {key}: {bad[0]}")
            context.say(f"  RED {key}: {bad[0]}")
        if lost:
            raise LostError(f"the device is lost to this process after {key}; run the command again to go on")
    context.say(f"{step.name}: {ran} done, {len(done)} were there, {left} left for another run -> {path}")


def _roof(context: Context) -> Iterator[Unit]:
    def measured() -> list[dict[str, Any]]:
        found = roofs.measure(context.device)
        _write_roof(context.output / "roof.json", found)
        return [found]

    yield "roof", measured


def _write_roof(path: Path, found: dict[str, Any]) -> None:
    """Writes a roof aside and renames it."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1) + "\n")
    part.replace(path)


def fit_shares(context: Context) -> None:
    """Puts the shares that were reached on the device into the roof's file."""
    path, rows = context.output / "roof.json", []
    for step in ("latency", "sweep"):
        rows += Results.read(context.path(step)).rows if context.path(step).exists() else []
    if path.is_file() and not context.dry:
        given = json.loads(path.read_text())
        assumed = Roof.of({name: value for name, value in given.items() if name != "shares"}, str(path))
        _write_roof(path, {**given, "shares": roofs.fit(rows, assumed)})


def _gate(context: Context) -> Iterator[Unit]:
    """Every check by each backend that insists, so that none hides behind another; then as users call it."""
    insisting = [backend for backend in BACKENDS if backend not in ("auto", "eager")]
    for backend in ([] if context.dry and not interpreting() else insisting) + ["auto"]:
        for dtype in ("bf16", "fp32", "fp16", "tf32"):
            for check in gate.checks(context.device, few=context.dry):
                key = f"{check.name} {dtype} {backend}"
                yield key, partial(_compared, check, dtype, backend)


def _compared(check: gate.Check, dtype: str, backend: str) -> list[dict[str, Any]]:
    return [gate.compare(check, dtype, backend)]


def require_green(context: Context) -> None:
    """Refuses to time anything while a check is red or none was made.

    Raises:
        RedError: Of the gate's rows one is red, or there is no green one.
    """
    path = context.path("gate")
    rows = Results.read(path).rows if path.exists() else []
    red = [row["key"] for row in rows if row["status"] in ("wrong", "error")]
    if red:
        raise RedError(f"{len(red)} of {len(rows)} correctness checks are red, first {red[0]!r}: nothing is timed")
    if not any(row["status"] == "ok" for row in rows):
        raise RedError("no correctness check has been made yet: run the step 'gate' first")


def _timed(
    context: Context, cases: Iterator[Case] | list[Case], level: str, providers: list[Provider], passes: tuple = ()
) -> Iterator[Unit]:
    """A unit for each case, all providers side by side."""
    require_green(context)
    limits: dict[str, Any] = {"seconds": 0.01, "rounds": (2, 3)} if context.dry else {"seconds": 0.15}
    for case in cases:
        key = " ".join([level, *passes, *(str(value) for value in case.row().values())])

        def work(case: Case = case) -> list[dict[str, Any]]:
            return suite.measure(case, providers, context.device, level, passes, **limits)

        yield key, work


def _providers(context: Context) -> list[Provider]:
    """Everyone but the eager backend, which on a device only repeats "masked" more slowly."""
    chosen = context.providers or tuple(name for name in PROVIDERS if context.dry or name != "fpe/eager")
    return find(chosen)


def _plan(context: Context, **options: Any) -> list[Case]:
    if context.dry:
        options |= {"shapes": shapes.SETS["tiny"], "rows": (3,), "block": (16, 32), "dtypes": ("fp32",)}
    return list(suite.Plan(**options).cases())


def _latency(context: Context) -> Iterator[Unit]:
    """The headline: two shapes, three structures, the batch sizes where things change; then blocks of other sizes."""
    cases = _plan(context, shapes=shapes.SETS["headline"], rows=shapes.KEY_ROWS)
    yield from _timed(context, cases, "op", _providers(context))
    more = _plan(context, shapes=shapes.SETS["headline"], rows=(1, 64, 1024), alphas=(4,))
    yield from _timed(context, more, "op", _providers(context))
    rest = _plan(context, shapes=shapes.SETS["headline"], rows=shapes.ROWS)
    yield from _timed(context, [c for c in rest if c not in cases], "op", _providers(context))


def _training(context: Context) -> Iterator[Unit]:
    """Layers, MLPs and steps with Adam, with their memory."""
    for level in ("step", "mlp", "layer"):
        cases = _plan(context, shapes=shapes.SETS["headline"][1:], rows=(64, 2048, 8192))
        yield from _timed(context, cases, level, _providers(context))


def _sweep(context: Context) -> Iterator[Unit]:
    """Every shape of language models at decode and training sizes, then the others, other dtypes and alphas."""
    for names, rows, more in (
        ("llm", (1, 16, 64, 2048), {}),
        ("vision", (1, 197, 6304), {}),
        ("paper", (512,), {"dtypes": ("fp32",)}),
        ("headline", (16, 1024), {"dtypes": ("fp16", "tf32")}),
        ("headline", (16, 1024), {"alphas": (8,)}),
    ):
        cases = _plan(context, shapes=shapes.SETS[names], rows=rows, **more)
        yield from _timed(context, cases, "op", _providers(context), ("forward",))
        if context.dry:
            return


def _tune(context: Context) -> Iterator[Unit]:
    """The tuner's jobs; the tables are ready to be copied to ``kernels/configs/``."""
    require_green(context)
    if context.dry and not interpreting():
        yield "tune", lambda: [{"status": "absent", "reason": "needs a GPU, or TRITON_INTERPRET=1 in a dry run"}]
        return
    device = KNOWN[80] if context.dry else device_of(torch.empty(0, device="cuda"))
    jobs = tune.small(tune.jobs())[:1] if context.dry else tune.jobs()

    def measured(call: Callable[[], Any]) -> float:
        if context.dry:
            call()
            return 0.0
        from triton.testing import do_bench

        return do_bench(call, warmup=5, rep=20, return_mode="median")

    target, limit = ("cpu", 2) if context.dry else ("cuda", TUNED)
    for job in jobs:

        def work(job: tune.Job = job) -> list[dict[str, Any]]:
            entry, line = tune.tune(job, device, measured, target, limit)
            context.say(f"  {line}")
            earlier = [row for row in Results.read(context.path("tune")).rows if "config" in row]
            tune.write(context.output, device, [*earlier, entry])
            return [entry]

        yield job.id, work


WATCHED_SECONDS = 120.0
"""At most, for a process that another tool watches."""
TUNED = 24
"""Configurations tried for each entry of the table: each has to be compiled."""


def _traffic(context: Context) -> Iterator[Unit]:
    def work() -> list[dict[str, Any]]:
        options = ["--csv", "--print-units", "base", "--metrics", child.METRICS, "--clock-control", "none"]
        options += ["--cache-control", "none", "--profile-from-start", "off"]
        done = _watch(context, ["ncu", *options], "traffic")
        if isinstance(done, str):
            return [{"status": "absent", "reason": done}]
        return child.read_traffic(done.stdout, child.watched())

    yield "ncu", work


def _sanitize(context: Context) -> Iterator[Unit]:
    for tool in ("memcheck", "racecheck"):

        def work(tool: str = tool) -> list[dict[str, Any]]:
            done = _watch(context, ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"], "gate")
            if isinstance(done, str):
                return [{"tool": tool, "status": "absent", "reason": done}]
            last = (done.stdout.strip().splitlines() or ["it printed nothing"])[-1]
            status = "ok" if done.returncode == 0 else "wrong" if done.returncode == 9 else "error"
            return [{"tool": tool, "status": status, "reason": last}]

        yield tool, work


def _watch(context: Context, tool: list[str], what: str) -> "subprocess.CompletedProcess[str] | str":
    """Runs a child under a tool; a string says why it cannot be."""
    if context.dry:
        return "a dry run has no GPU"
    if shutil.which(tool[0]) is None:
        return f"{tool[0]} is not installed"
    command = [*tool, sys.executable, "-m", "fpe.bench.device.child", what]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if what == "gate" else None
    seconds = min(max(context.deadline - time.monotonic(), 10.0), WATCHED_SECONDS)
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds, env=environment)


STEPS = (
    Step("roof", _roof, 0.1, "copy bandwidth, GEMM rates and launch time of the device"),
    Step("gate", _gate, 0.35, "every operation and layer against float64 truth"),
    Step("latency", _latency, 0.4, "the headline: ours beside the parent, the wide layer and the peers"),
    Step("training", _training, 0.2, "layers, MLPs and Adam steps, with their memory"),
    Step("tune", _tune, 0.3, "the fastest tiles of the block and partition kernels"),
    Step("traffic", _traffic, 0.2, "DRAM bytes by Nsight Compute"),
    Step("sanitize", _sanitize, 0.2, "compute-sanitizer on small shapes"),
    Step("sweep", _sweep, 1.0, "the other shapes, dtypes and alphas"),
)
