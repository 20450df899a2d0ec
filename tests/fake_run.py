"""The process of ``fpe gpu`` that measures, on the fake device, small: ``fake_run.py FAULTS PLAN OPTIONS``."""

import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from fake_device import FakeDevice, Fault, fake_device

LAYER = (96, 128)


@contextmanager
def small_plan() -> Iterator[None]:
    """The plan of ``fpe gpu`` over a layer that a CPU can run, a few batch sizes and a few checks."""
    from fpe.bench.gpu import plan, roof, steps
    from fpe.bench.latency import shapes

    with ExitStack() as stack:
        stack.enter_context(patch.dict(shapes.SETS, dict.fromkeys(shapes.SETS, (LAYER,))))
        stack.enter_context(patch.object(shapes, "KEY_ROWS", (3, 5, 72)))  # the last is none of the direct kernels'
        stack.enter_context(patch.object(shapes, "ROWS", (3, 5, 7, 72)))
        stack.enter_context(patch.object(plan, "LIMITS", (0.0, 2)))
        stack.enter_context(patch.object(plan, "MOST", 2))
        stack.enter_context(patch.object(roof, "COPIED", 1 << 16))
        stack.enter_context(patch.object(roof, "GEMM", 32))
        few = partial(plan.checks, few=True)
        stack.enter_context(patch.object(plan, "checks", lambda **unused: few()))
        stack.enter_context(patch.object(steps, "PATIENCE", (20.0, 1.0)))
        yield


class _Nvml:
    """NVML of a board that draws 400 W, on a clock of its own: how busy this machine is changes nothing.

    A wait for the device takes a millisecond, a reading a tenth of one, a look at the clock a microsecond.
    """

    NVMLError = RuntimeError

    def __init__(self, device: FakeDevice) -> None:
        self.device, self.readings, self.looks = device, 0, 0

    def perf_counter(self) -> float:
        self.looks += 1
        return 1e-3 * self.device.waits + 1e-4 * self.readings + 1e-6 * self.looks

    def nvmlInit(self) -> None: ...  # noqa: N802

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:  # noqa: N802
        self.readings += 1
        return round(400e3 * self.perf_counter())


class InThisProcess(Executor):
    """In place of a pool, whose processes know nothing of the device and would import everything first."""

    def __init__(self, *unused: Any, **options: Any) -> None: ...

    def submit(self, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        done: Future = Future()
        try:
            done.set_result(call(*args, **kwargs))
        except Exception as error:
            done.set_exception(error)
        return done


@contextmanager
def whole_plan(device: FakeDevice) -> Iterator[None]:
    """Every step of the plan, each with a few units; a board that counts its energy, none of the tools that watch."""
    from fpe.bench.gpu import ahead, checks, plan, steps, tune, warm
    from fpe.bench.latency import energy, shapes

    jobs, first, every = tune.jobs, plan.kernels_first, checks.checks

    def few_jobs() -> list[tune.Job]:
        first = (next(job for job in jobs() if job.family == family) for family in ("partition", "block"))
        return [replace(job, shape=(128, 128)) for job in first]

    board = _Nvml(device)
    with small_plan(), ExitStack() as stack:
        stack.enter_context(patch.dict(shapes.SETS, headline=(LAYER, (64, 48))))
        for where, name, value in (
            (steps, "PATIENCE", (600.0, 1.0)),  # nothing hangs here, however busy this machine is
            (shapes, "KEY_ROWS", (3,)),
            (shapes, "ROWS", (3, 7)),
            (plan, "DECODE_ROWS", (1,)),
            (plan, "TRAINING_ROWS", (5,)),
            (plan, "ENERGY_ROWS", (1,)),
            (plan, "TUNED", 2),
            (plan, "kernels_first", lambda context: first(context)[:3]),
            (plan, "checks", lambda **unused: islice(every(), 2)),
            (checks, "checks", lambda **unused: islice(every(), 1)),
            (plan, "shutil", SimpleNamespace(which=lambda tool: None)),
            (tune, "jobs", few_jobs),
            (tune, "headline_jobs", few_jobs),
            (energy, "spent", partial(energy.spent, seconds=0.01)),
            (energy, "BATCH", 0.001),
            (energy, "time", board),
            (energy, "find_spec", lambda name: name == "pynvml"),
            (warm, "ProcessPoolExecutor", InThisProcess),
            (ahead, "ProcessPoolExecutor", InThisProcess),
        ):
            stack.enter_context(patch.object(where, name, value))
        stack.enter_context(patch.dict(sys.modules, pynvml=board))
        yield


def main(faults: str, which: str, options: str) -> int:
    """The measuring process, with faults in JSON, over the ``"small"`` plan or the ``"whole"`` one."""
    from fpe.bench.gpu import worker

    torch.set_num_threads(1)
    found = tuple(Fault(**{**fault, "shape": tuple(fault.get("shape", ()))}) for fault in json.loads(faults))
    with fake_device(faults=found) as device, whole_plan(device) if which == "whole" else small_plan():
        return worker.main([options])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
