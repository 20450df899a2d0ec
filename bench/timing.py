"""How long calls take: side by side in one run, caches cold, medians and 20th to 80th percentiles.

Triton's ``do_bench`` times one call at a time; clocks and temperatures drift between them. Here the calls of a case
take turns, each from a cache that was just overwritten, and the device is read only at the end.
"""

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch

Call = Callable[[], object]
FLUSH = 256 << 20
"""Bytes overwritten before a call on a GPU, four times over: more than any L2, and long enough that the host has
launched all of a call's kernels before the first may start."""
FLUSH_CPU = 8 << 20


class Timing(NamedTuple):
    """Milliseconds of a call.

    Attributes:
        median: Of all samples.
        low: 20th percentile.
        high: 80th percentile.
        samples: How many.
        host: Median of the time in which the host made the call, launches included; on a CPU the time itself.
    """

    median: float
    low: float
    high: float
    samples: int
    host: float


def interleaved(
    calls: Mapping[str, Call], device: str, seconds: float = 1.0, rounds: tuple[int, int] = (5, 100)
) -> dict[str, Timing]:
    """Times calls in turns.

    Args:
        calls: What to time, by name.
        device: ``"cuda"`` (events) or ``"cpu"`` (wall clock).
        seconds: To spend on all of them, roughly.
        rounds: At least and at most so many samples of each.

    Returns:
        A :class:`Timing` by name.
    """
    cuda = device.startswith("cuda")
    buffer = torch.empty(FLUSH if cuda else FLUSH_CPU, dtype=torch.int8, device=device)

    def flush() -> None:
        for _ in range(4 if cuda else 1):
            buffer.zero_()

    for call in calls.values():  # compiles kernels, loads modules, fills allocators
        call()
        call()
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for call in calls.values():
        flush()
        call()
    if cuda:
        torch.cuda.synchronize()
    once = time.perf_counter() - start
    count = int(min(max(seconds / max(once, 1e-9), rounds[0]), rounds[1]))

    taken: dict[str, list] = {name: [] for name in calls}
    host: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    for turn in range(count):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            flush()
            if cuda:
                events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                events[0].record()
            start = time.perf_counter()
            calls[name]()
            passed = 1e3 * (time.perf_counter() - start)
            if cuda:
                events[1].record()
            host[name].append(passed)
            taken[name].append(events if cuda else passed)
    if cuda:
        torch.cuda.synchronize()
        taken = {name: [begun.elapsed_time(ended) for begun, ended in pairs] for name, pairs in taken.items()}
    return {name: _summary(taken[name], host[name]) for name in names}


def _summary(taken: list[float], host: list[float]) -> Timing:
    low, median, high = np.quantile(taken, (0.2, 0.5, 0.8))
    return Timing(float(median), float(low), float(high), len(taken), float(np.median(host)))
