"""Latency under pytest-benchmark: ``pytest bench --benchmark-only``, also ``--benchmark-compare`` and ``-histogram``.

On a CPU small layers through the eager paths; on a GPU the headline layers, from a cold L2, timed by events: there the
benchmark's clock is the device's. Groups are cases, so that a table compares the providers of one.
"""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fpe.bench.latency import shapes
from fpe.bench.latency.problems import AbsentError, Case, Problem
from fpe.bench.latency.providers import PROVIDERS
from fpe.bench.latency.suite import PASSES, call
from fpe.bench.latency.timing import flusher
from fpe.kernels.structures import STRUCTURES

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SIZES = [(m, n, k) for n, k in shapes.SETS["headline"] for m in (1, 64, 1024)]
SIZES = SIZES if CUDA else [(1, 384, 512), (64, 384, 512)]
CASES = [
    Case(m, n, k, structure=structure, dtype="bf16" if CUDA else "fp32")
    for m, n, k in SIZES
    for structure in STRUCTURES
]


def case_id(case: Case) -> str:
    """As it appears in the benchmark's name."""
    return f"{case.structure}-M{case.m}-{case.n}x{case.k}-{case.dtype}"


def device_clock() -> Callable[[], float]:
    """A timer that counts the device's own time, in seconds.

    pytest-benchmark reads its timer before and after each call; here each reading records an event, and the second of
    a pair adds what the device took between them.
    """
    begun: list[Any] = []
    total = 0.0

    def read() -> float:
        nonlocal total
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        if not begun:
            begun.append(event)
        else:
            event.synchronize()
            total += begun.pop().elapsed_time(event) / 1e3
        return total

    return read


@pytest.mark.benchmark(timer=device_clock() if CUDA else time.perf_counter)
@pytest.mark.parametrize("name", PROVIDERS)
@pytest.mark.parametrize("pass_", PASSES["op"])
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_latency(benchmark: Any, case: Case, pass_: str, name: str) -> None:
    """One provider's pass of a case."""
    provider = PROVIDERS[name]
    if case.structure not in provider.structures:
        pytest.skip(f"{name} has no structure {case.structure!r}")
    problem = Problem.make(case, DEVICE)
    try:
        module = provider.build(problem, False)
        made = call(problem, module, pass_, provider.trains)
        if made is None:
            pytest.skip(f"{name} has no gradients")
        made()
    except (AbsentError, ValueError, RuntimeError, ImportError, NotImplementedError) as error:
        pytest.skip(f"{name} is absent: {str(error).partition(chr(10))[0]}")
    benchmark.group = f"{case_id(case)} {pass_}"
    benchmark.extra_info.update(case.row(), provider=name, **{"pass": pass_})
    run(benchmark, made)


def run(benchmark: Any, made: Callable[[], object]) -> None:
    """Rounds of one call each, from a cold cache."""
    benchmark.pedantic(made, setup=flusher(DEVICE), rounds=30 if CUDA else 5, warmup_rounds=2)
