"""The plan of ``fpe gpu``: steps in the order of what matters, and the units of each.

First come the headline's own kernels, compiled by all cores; then the headline, each layer checked where it is timed;
then what a model's decode and training cost; then the wide gate, and what follows from it.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fpe.kernels.device import KNOWN, Device, device_of, interpreting
from fpe.kernels.roofs import PUBLISHED, Roof, roof_named
from fpe.kernels.structures import BLOCK, RANDOM, SEEDED, TWO_FOUR

from ..families import Case as Launch
from ..latency import energy, shapes, suite
from ..latency.problems import AbsentError, Case, Problem
from ..latency.providers import PROVIDERS, Provider, find
from . import child, tune, warm
from . import roof as roofs
from .ahead import Ahead
from .blocks import skip_red
from .checks import checks
from .estimate import POOL, seconds_of_case, seconds_of_compiling
from .gate import compare
from .steps import Context, Rows, Step, Unit, run

LIMITS = (0.12, 5)
"""Seconds that are spent on a pass, and the fewest samples of each provider."""
MOST = 60
"""The most samples."""
DECODE_ROWS = (1, 16, 64)
TRAINING_ROWS = (64, 2048, 8192)
MEASURED = (RANDOM, TWO_FOUR, BLOCK)
"""Structures of every step. Labels of a seed are timed where they save bytes, in decoding."""


class Promise(NamedTuple):
    """A unit, and after how many seconds it is expected to be done; none where time does not suffice."""

    step: Step
    unit: Unit
    end: float | None


Part = tuple[list[Case], str, tuple[str, ...], tuple[str, ...]]
"""Cases, level, passes and providers that are timed one after the other."""


def _plan(context: Context, **options: Any) -> list[Case]:
    options = {"structures": MEASURED, **options}
    if context.dry:
        options |= {"shapes": shapes.SETS["tiny"], "rows": (3,), "block": (16, 32), "dtypes": ("fp32",)}
    return list(suite.Plan(**options).cases())


def headline(context: Context) -> list[Part]:
    """Two layers, batches of 1 to 8192, both alphas, every backend by name, both directions."""
    cases, both = partial(_plan, context, shapes=shapes.SETS["headline"], rows=shapes.KEY_ROWS), ("random", "block")
    passes = ("forward", "dX", "dW")
    layers: list[Part] = [(cases(alphas=(2,)), "op", (*passes, "forward+backward"), ())]
    layers.append((cases(alphas=(4,)), "op", passes, ()))
    return layers + [(cases(alphas=(a,), structures=both), "merge", ("forward", "dX"), ()) for a in (2, 4)]


def decode(context: Context) -> list[Part]:
    """Small batches over every shape of language models; labels of a seed beside the parent alone."""
    who = ("parent", "wide", "fpe/auto", "fpe/triton")
    cases = partial(_plan, context, shapes=shapes.SETS["llm"])
    return [
        (cases(structures=(RANDOM, BLOCK), rows=DECODE_ROWS), "op", ("forward",), who),
        (cases(structures=(SEEDED,), rows=DECODE_ROWS[:2]), "op", ("forward",), ("parent", "fpe/triton")),
    ]


def training(context: Context) -> list[Part]:
    """Steps with Adam, networks and layers with their bias, and their memory."""
    cases = _plan(context, shapes=shapes.SETS["headline"][1:], rows=TRAINING_ROWS)
    return [(cases, level, (), ()) for level in ("step", "mlp", "layer")]


def sweep(context: Context) -> list[Part]:
    """What is left: other batch sizes, shapes, dtypes and alphas."""
    parts: list[Part] = []
    for names, rows, more in (
        ("headline", tuple(m for m in shapes.ROWS if m not in shapes.KEY_ROWS), {}),
        ("llm", (2048,), {}),
        ("vision", (1, 197, 6304), {}),
        ("paper", (512,), {"dtypes": ("fp32",)}),
        ("headline", (16, 1024), {"dtypes": ("fp16", "tf32")}),
        ("headline", (16, 1024), {"alphas": (8,)}),
    ):
        parts.append((_plan(context, shapes=shapes.SETS[names], rows=rows, **more), "op", ("forward",), ()))
    return parts[:1] if context.dry else parts


def _timed(context: Context, parts: Sequence[Part]) -> Iterator[Unit]:
    """A unit for each case, all providers side by side."""
    limits: dict[str, Any] = {"seconds": LIMITS[0], "rounds": (LIMITS[1], MOST)}
    if context.dry:
        limits = {"seconds": 0.01, "rounds": (2, 3)}
    roof = expected_roof(context)
    for cases, level, passes, names in parts:
        providers = who_is_timed(context, names)
        for case in cases:
            key = " ".join([level, *passes, *(str(value) for value in case.row().values())])

            def work(
                case: Case = case, level: str = level, passes: tuple = passes, providers: list[Provider] = providers
            ) -> Rows:
                skip = skip_red(context.rows("gate"), case, level)
                return suite.measure(case, providers, context.device, level, passes, **limits, skip=skip)

            seconds = seconds_of_case(case, providers, level, passes, roof, LIMITS)
            rows = len(passes or suite.PASSES[level]) * 3  # the yardsticks and the automatic choice, at least
            yield Unit(key, work, seconds, rows)


def who_is_timed(context: Context, names: tuple[str, ...] = ()) -> list[Provider]:
    """Providers of a part, those asked for; a device leaves "eager" out, which does what "masked" does, but slower."""
    everyone = tuple(name for name in PROVIDERS if context.dry or name != "fpe/eager")
    return find(tuple(name for name in names or everyone if name in (context.providers or everyone)))


def expected_roof(context: Context) -> Roof:
    """The published roof of the device, or of one like it."""
    try:
        return roof_named(context.provenance["device"], context.arch)
    except ValueError:
        return PUBLISHED["h200"]


def kernels_of(parts: Iterable[Part]) -> list[Launch]:
    """What parts launch, in their order, each launch once."""
    found = [
        launch
        for cases, level, passes, names in parts
        if not names or "fpe/triton" in names
        for case in cases
        for launch in warm.launches(case, level, passes)
    ]
    return list(dict.fromkeys(found))


def device_here(context: Context) -> Device:
    """What kernels are compiled for: the GPU at hand, or a known one of the architecture."""
    return KNOWN[context.arch] if context.dry else device_of(torch.empty(0, device="cuda"))


def kernels_first(context: Context) -> list[Launch]:
    """What the steps before the gate launch."""
    return kernels_of(headline(context) + decode(context) + training(context))


def _compile(context: Context) -> Iterator[Unit]:
    todo = kernels_first(context)
    yield Unit("kernels", partial(_compiled, context, todo), seconds_of_compiling(todo, context.jobs))


def _compiled(context: Context, todo: list[Launch]) -> Rows:
    if context.dry:
        return [{"status": "absent", "reason": "a dry run compiles nothing"}]
    return warm.compile_all(todo, context.arch, device_here(context), context.jobs)


def _compile_gate(context: Context) -> Iterator[Unit]:
    for dtype in ("bf16", "fp32", "fp16", "tf32"):

        def work(dtype: str = dtype) -> Rows:
            if context.dry:
                return [{"status": "absent", "reason": "a dry run compiles nothing"}]
            return warm.compile_gate(dtype, context.arch, device_here(context), context.jobs)

        yield Unit(f"gate {dtype}", work, POOL + GATE_COMPILED / max(context.jobs, 1))


GATE_COMPILED = 150.0
"""Processor seconds of a dtype's binaries of the wide gate, roughly."""
GATE_CHECK = 0.04
"""Seconds of a check on a device, compiled already."""


def _gate(context: Context) -> Iterator[Unit]:
    """Every check by each backend that insists, so that none hides behind another; then as users call it."""
    every = list(checks(few=context.dry, large=not context.dry))
    for dtype in ("bf16", "fp32", "fp16", "tf32"):
        for check in every:
            insisting = () if context.dry and not interpreting() else check.backends
            for backend in (*insisting, "auto"):
                work = partial(_compared, context, check, dtype, backend)
                yield Unit(f"{check.name} {dtype} {backend}", work, GATE_CHECK)


def _compared(context: Context, check: Any, dtype: str, backend: str) -> Rows:
    return [compare(check, dtype, backend, context.device)]


def _roof(context: Context) -> Iterator[Unit]:
    def measured() -> Rows:
        found = roofs.measure(context.device)
        write_roof(context.folder / "roof.json", found)
        return [found]

    yield Unit("roof", measured, 6.0)


def write_roof(path: Path, found: dict[str, Any]) -> None:
    """Writes a roof aside and renames it."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1) + "\n")
    part.replace(path)


def fit_shares(context: Context) -> None:
    """Puts the shares that were reached on the device into the roof's file."""
    path, rows = context.folder / "roof.json", context.rows("latency") + context.rows("sweep")
    if path.is_file() and not context.dry:
        given = json.loads(path.read_text())
        assumed = Roof.of({name: value for name, value in given.items() if name != "shares"}, str(path))
        write_roof(path, {**given, "shares": roofs.fit(rows, assumed)})


ENERGY_ROWS = (1, 64, 1024, 8192)
ENERGY_PROVIDERS = ("parent", "wide", "fpe/auto")


def _energy(context: Context) -> Iterator[Unit]:
    """Joules of a forward, in a second of them."""
    providers = who_is_timed(context, ENERGY_PROVIDERS)
    options: dict[str, Any] = {"shapes": shapes.SETS["headline"][:1], "rows": ENERGY_ROWS}
    for case in _plan(context, **options, structures=("random", "block")):

        def work(case: Case = case) -> Rows:
            problem = Problem.make(case, context.device)
            calls = {}
            for provider in providers:
                made = suite.call(problem, provider.build(problem, False), "forward")
                assert made is not None
                calls[provider.name] = made
            try:
                spent = energy.spent(calls, context.device)
            except AbsentError as error:
                return [{"status": "absent", "reason": str(error)}]
            level = {"level": "op", "pass": "forward"}
            return [{**level, "provider": name, **case.row(), **e.columns()} for name, e in spent.items()]

        yield Unit(" ".join(str(value) for value in case.row().values()), work, 1.5 * len(providers) + 0.5)


@contextmanager
def _compilers(context: Context) -> Iterator[Callable[[], tuple[Device, Ahead]]]:
    """The device and a pool that compiles ahead for it, made when they are first asked for."""
    made: list[tuple[Device, Ahead]] = []

    def ask() -> tuple[Device, Ahead]:
        if not made:
            device = KNOWN[80] if context.dry else device_here(context)
            made.append((device, Ahead(device, 0 if context.dry else context.jobs)))
        return made[0]

    try:
        yield ask
    finally:
        for _, ahead in made:
            ahead.__exit__()


def _needs_a_gpu(context: Context) -> str:
    """Why a step of the tuner cannot be walked, in words."""
    return "needs a GPU, or TRITON_INTERPRET=1 in a dry run" if context.dry and not interpreting() else ""


def _neighbours(context: Context) -> Iterator[Unit]:
    """The configurations that the rules choose for the headline, beside their five nearest neighbours."""
    reason = _needs_a_gpu(context)
    if reason:
        yield Unit("neighbours", lambda: [{"status": "absent", "reason": reason}], 0.0)
        return
    todo, target = (tune.small(tune.headline_jobs())[:1], "cpu") if context.dry else (tune.headline_jobs(), "cuda")
    with _compilers(context) as ask:
        for job in todo:

            def work(job: tune.Job = job) -> Rows:
                device, ahead = ask()
                return tune.nearest(job, device, target, ahead)

            yield Unit(job.id, work, 1.5)


TUNED = 24
"""Configurations tried for each entry of the table: each has to be compiled."""
TUNED_SECONDS = 8.0
"""After which no configuration of an entry is begun any more."""


def _tune(context: Context) -> Iterator[Unit]:
    """The tuner's jobs; the tables are ready to be copied to ``kernels/configs/``."""
    reason = _needs_a_gpu(context)
    if reason:
        yield Unit("tune", lambda: [{"status": "absent", "reason": reason}], 0.0)
        return
    todo = tune.small(tune.jobs())[:1] if context.dry else tune.jobs()

    def measured(call: Callable[[], Any]) -> float:
        if not context.dry:
            return tune.device_milliseconds(call)
        call()
        return 0.0

    target, limit = ("cpu", 2) if context.dry else ("cuda", TUNED)
    following: list[tune.Job | None] = [*todo[1:], None]
    with _compilers(context) as ask:
        for job, after in zip(todo, following, strict=True):

            def work(job: tune.Job = job, after: tune.Job | None = after) -> Rows:
                device, ahead = ask()
                for coming in [job] if after is None else [job, after]:
                    ahead.begin(coming, tune.planned(coming, device, limit))
                entry, line = tune.tune(job, device, measured, target, limit, ahead, TUNED_SECONDS)
                context.say(f"  {line}")
                tune.write(context.folder, device, [*(r for r in context.rows("tune") if "config" in r), entry])
                return [entry]

            yield Unit(job.id, work, 5.0)


WATCHED_SECONDS = 120.0
"""At most, for a process that another tool watches."""


def _traffic(context: Context) -> Iterator[Unit]:
    def work() -> Rows:
        options = ["--csv", "--print-units", "base", "--metrics", child.METRICS, "--clock-control", "none"]
        options += ["--cache-control", "none", "--profile-from-start", "off"]
        done = _watch(context, ["ncu", *options], "traffic")
        if isinstance(done, str):
            return [{"status": "absent", "reason": done}]
        return child.read_traffic(done.stdout, child.watched())

    yield Unit("ncu", work, 60.0)


def _sanitize(context: Context) -> Iterator[Unit]:
    for tool in ("memcheck", "racecheck"):

        def work(tool: str = tool) -> Rows:
            done = _watch(context, ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"], "gate")
            if isinstance(done, str):
                return [{"tool": tool, "status": "absent", "reason": done}]
            last = (done.stdout.strip().splitlines() or ["it printed nothing"])[-1]
            status = "ok" if done.returncode == 0 else "wrong" if done.returncode == 9 else "error"
            return [{"tool": tool, "status": status, "reason": last}]

        yield Unit(tool, work, 45.0)


def _watch(context: Context, tool: list[str], what: str) -> Any:
    """Runs a child under a tool; a string says why it cannot be."""
    if context.dry:
        return "a dry run has no GPU"
    if shutil.which(tool[0]) is None:
        return f"{tool[0]} is not installed"
    command = [*tool, sys.executable, "-m", "fpe.bench.gpu.child", what]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if what == "gate" else None
    seconds = min(max(context.deadline - context.clock(), 10.0), WATCHED_SECONDS)
    return child.watch(command, seconds, environment)


def _units(parts: Callable[[Context], list[Part]]) -> Callable[[Context], Iterator[Unit]]:
    return lambda context: _timed(context, parts(context))


STEPS = (
    Step("compile", _compile, "kernels of the next steps, by all cores, before the device is used"),
    Step("latency", _units(headline), "the headline: every backend beside the parent, the wide layer and the peers"),
    Step("roof", _roof, "copy bandwidth, GEMM rates and launch time of the device"),
    Step("decode", _units(decode), "up to 64 rows over every shape of language models"),
    Step("training", _units(training), "layers, MLPs and Adam steps, with their memory"),
    Step("energy", _energy, "joules of a forward, by the device's own counter"),
    Step("compile-gate", _compile_gate, "kernels of the next step"),
    Step("gate", _gate, "every operation, layer and backend against float64 truth"),
    Step("neighbours", _neighbours, "the rules' choices beside their nearest neighbours"),
    Step("tune", _tune, "the fastest tiles of the block and partition kernels", share=0.3),
    Step("traffic", _traffic, "DRAM bytes by Nsight Compute"),
    Step("sanitize", _sanitize, "compute-sanitizer on small shapes"),
    Step("sweep", _units(sweep), "the other batch sizes, shapes, dtypes and alphas"),
)
"""In this order."""


def walk(context: Context, names: Sequence[str], budget: float) -> None:
    """Runs the steps of these names in their order, and says what the device reached of its roof.

    Raises:
        ValueError: A step's file is damaged or of another run.
        LostError: The device no longer answers this process.
    """
    for step in STEPS:
        if step.name in names:
            run(step, context, budget)
    fit_shares(context)


def promised(context: Context, names: Sequence[str], seconds: float, start: float = 0.0) -> list[Promise]:
    """What is expected to be done when, by the rule of :func:`walk`: a unit that would end too late is left."""
    now, found = start, []
    for step in STEPS:
        stop = min(seconds, now + step.share * seconds)
        for unit in step.units(context) if step.name in names else ():
            fits = now + unit.seconds <= stop
            now += unit.seconds if fits else 0.0
            found.append(Promise(step, unit, now if fits else None))
    return found
